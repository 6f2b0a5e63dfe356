"""Where the models of a stage are: whole in every process, or spread over all of them."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import init_device_mesh

from radlads.config.schema import Config, TrainConfig, stage_of
from radlads.convert.blueprint import Blueprint
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.corpora.samples import runs_teacher
from radlads.train.engines.rows import build_in_rows
from radlads.train.engines.sharding import build_sharded
from radlads.train.engines.zero import check_engine, uses_engine
from radlads.train.hardware import models_out_of_memory, only_device
from radlads.train.processes.group import Processes


@dataclass(frozen=True)
class Models:
    """The student, its frozen teacher if there is one, and how many weights came which way (see Blueprint.fill)."""

    student: RadladsForCausalLM
    teacher: RadladsForCausalLM | None
    ways: Counter


def shards(train: TrainConfig, processes: Processes) -> bool:
    """Whether the stage keeps its models in shards; one process has nothing to share out."""
    return train.strategy == "fsdp" and processes.size > 1


def build_models(config: Config, student: Blueprint, teacher: Blueprint | None, processes: Processes) -> Models:
    """Build both models where the stage wants them: on the device they train on, whole, in shards, or in rows that
    DeepSpeed makes whole. A teacher that is to be copied in 8 bits, or that the stage does not run, is on the CPU; in
    shards it is where all are.

    The student begins in fp32 unless the stage keeps bf16 weights. Raises ValueError as the blueprints and
    sharding.build_sharded do, for settings that the strategy does not go with, and where a GPU's memory is too small.
    """
    train = config.train
    by_engine, in_shards = uses_engine(train, processes), shards(train, processes)
    if by_engine:
        check_engine(train, processes)
    if in_shards:
        check_shardable(train)
        if student.config.tie_word_embeddings:
            raise ValueError("the student's head is its embedding, and train.strategy fsdp shards them apart: set ddp")
    device = processes.device or only_device(train)
    dtype = torch.bfloat16 if train.precision == "bf16-true" else torch.float32

    def build(blueprint: Blueprint, *, is_student: bool) -> tuple[RadladsForCausalLM, Counter]:
        if not is_student and not in_shards and (train.teacher_precision == "fp8" or not runs_teacher(config)):
            return blueprint.build()
        if not by_engine and not in_shards:
            return blueprint.build(dtype=dtype, device=device)
        mesh = init_device_mesh(device.type, (processes.size,))
        if by_engine:
            return build_in_rows(blueprint, mesh, device)
        mixers_run_alone = is_student and stage_of(train) == "align"
        return build_sharded(blueprint, mesh, device, dtype=dtype, mixers_run_alone=mixers_run_alone)

    try:
        built, ways = build(student, is_student=True)
        frozen = None if teacher is None else build(teacher, is_student=False)[0].eval().requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise ValueError(models_out_of_memory(train, device, processes)) from error
    return Models(built.eval(), frozen, ways)


def check_shardable(train: TrainConfig) -> None:
    """Raise ValueError for what cannot be done on shards."""
    refused = {
        "train.reset_state_at_eos 1": (train.reset_state_at_eos, "cuts rows into more sequences on some processes"),
        "train.teacher_precision fp8": (train.teacher_precision == "fp8", "needs whole matrices to round"),
        "train.optimizer adam8bit": (train.optimizer == "adam8bit", "scales blocks that rows are no multiple of"),
        "train.optimizer muon": (train.optimizer == "muon", "needs whole matrices to update"),
    }
    for setting, (is_set, why) in refused.items():
        if is_set:
            raise ValueError(f"{setting} {why}, which train.strategy fsdp does not have: set train.strategy ddp")
