"""Where the models of a stage are: whole in every process, or in shards over all of them."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import init_device_mesh

from radlads.config.schema import Config, TrainConfig, stage_of
from radlads.convert.blueprint import Blueprint
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.deepspeed_engine import check_engine, uses_engine
from radlads.train.processes import Processes
from radlads.train.sharding import build_sharded


@dataclass(frozen=True)
class Models:
    """The student, its frozen teacher if there is one, and what filling the student returned (see Blueprint.fill)."""

    student: RadladsForCausalLM
    teacher: RadladsForCausalLM | None
    rows: Counter


def shards(train: TrainConfig, processes: Processes) -> bool:
    """Whether the stage keeps its models in shards; one process has nothing to share out."""
    return train.strategy == "fsdp" and processes.size > 1


def build_models(config: Config, student: Blueprint, teacher: Blueprint | None, processes: Processes) -> Models:
    """Build both models as the stage wants them: on the CPU, or in shards on the devices.

    The student begins in fp32 unless the stage keeps bf16 weights. Raises ValueError as the blueprints and
    sharding.build_sharded do, and for settings that shards do not go with.
    """
    if uses_engine(config.train, processes):
        check_engine(config.train, processes)
    if not shards(config.train, processes):
        built, rows = student.build()
        frozen = None if teacher is None else teacher.build()[0].eval().requires_grad_(False)
        return Models(built.eval(), frozen, rows)
    check_shardable(config.train)
    if student.config.tie_word_embeddings:
        raise ValueError("the student's head is its embedding, and train.strategy fsdp shards them apart: set ddp")
    assert processes.device is not None
    device = processes.device
    mesh = init_device_mesh(device.type, (processes.size,))
    dtype = torch.bfloat16 if config.train.precision == "bf16-true" else torch.float32
    is_align = stage_of(config.train) == "align"
    built, rows = build_sharded(student, mesh, device, dtype=dtype, mixers_run_alone=is_align)
    frozen = None
    if teacher is not None:
        frozen, _ = build_sharded(teacher, mesh, device, dtype=dtype, mixers_run_alone=False)
        frozen.eval().requires_grad_(False)
    return Models(built.eval(), frozen, rows)


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
