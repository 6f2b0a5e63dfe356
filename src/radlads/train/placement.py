"""Building the models of a stage: where and in how many pieces, its engine says."""

from collections import Counter
from dataclasses import dataclass

import torch

from radlads.config.schema import Config
from radlads.convert.blueprint import Blueprint
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.corpora.samples import runs_teacher
from radlads.train.engines.engine import Engine
from radlads.train.engines.table import engine_for
from radlads.train.hardware import models_out_of_memory, only_device
from radlads.train.processes.group import Processes


@dataclass(frozen=True)
class Models:
    """The student, its frozen teacher if there is one, and how many weights came which way (see Blueprint.fill)."""

    student: RadladsForCausalLM
    teacher: RadladsForCausalLM | None
    ways: Counter


def build_models(config: Config, student: Blueprint, teacher: Blueprint | None, processes: Processes) -> Models:
    """Build both models as the stage's engine holds them, on the device they train on. A teacher that is to be copied
    in 8 bits, or that the stage does not run, is where the engine has idle ones.

    The student begins in fp32 unless the stage keeps bf16 weights. Raises ValueError as the blueprints and the engine
    do, for settings that the engine does not go with, and where a GPU's memory is too small.
    """
    train = config.train
    engine = engine_for(train, processes)
    engine.check(student.config)
    device = processes.device or only_device(train)
    is_idle = train.teacher_precision == "fp8" or not runs_teacher(config)
    try:
        built, ways = engine.build(student, device, is_student=True)
        frozen = None if teacher is None else _frozen(engine, teacher, device, is_idle=is_idle)
    except torch.OutOfMemoryError as error:
        raise ValueError(models_out_of_memory(engine, device)) from error
    return Models(built.eval(), frozen, ways)


def _frozen(engine: Engine, teacher: Blueprint, device: torch.device, *, is_idle: bool) -> RadladsForCausalLM:
    if is_idle:
        built, _ = engine.build_idle_teacher(teacher, device)
    else:
        built, _ = engine.build(teacher, device, is_student=False)
    return built.eval().requires_grad_(False)
