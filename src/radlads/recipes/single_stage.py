"""One stage from a configuration: what `radlads train` does."""

import re
from collections import Counter
from pathlib import Path

import torch

from radlads.checkpoint.manifest import weights_hash
from radlads.checkpoint.model_folder import load_model
from radlads.config.schema import Config, stage_of
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher, layer_mixers
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.callbacks import Console
from radlads.train.fit import StageResult, run_stage


def train_stage(config: Config, console: Console) -> StageResult:
    """Run the stage a configuration describes and write its folder.

    The student comes from train.load_model; without one, the align stage sets it up from the teacher. Raises ValueError
    if neither is possible, and as run_stage does.
    """
    train = config.train
    teacher_path = train.teacher.path or train.teacher.hf_path
    torch.manual_seed(train.seed_everything)
    teacher = build_teacher(open_teacher(teacher_path)) if teacher_path else None
    student, parent = _starting_student(config, teacher_path)
    check_student(config, student, teacher)
    folder = run_folder(config, student)
    console.line(f"{stage_of(train)}: from {parent} to {folder}")
    return run_stage(config, student, teacher, folder, console, parent=parent)


def check_student(config: Config, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None) -> None:
    """Raise ValueError if the student has other mixers than the configuration names, or does not fit the teacher."""
    wanted = layer_mixers(config.model, student.config.num_hidden_layers)
    if student.config.time_mixers != wanted:
        raise ValueError(
            f"{config.train.load_model} holds the mixers {_counted(student.config.time_mixers)}, but the configuration "
            f"names {_counted(wanted)}: pass the model's own mixer file with -c"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if teacher is not None and getattr(teacher.config, name) != getattr(student.config, name):
            raise ValueError(
                f"the teacher's {name} is {getattr(teacher.config, name)}, the student's "
                f"{getattr(student.config, name)}: they are not the same model"
            )


def _counted(mixers: list[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(mixers).items())


def run_folder(config: Config, student: RadladsForCausalLM) -> Path:
    """proj_dir/proj_name, or the released system's name made of layers, width, mixers and suffixes."""
    train, model = config.train, config.model
    if train.proj_name:
        return Path(train.proj_dir) / train.proj_name
    size = f"L{student.config.num_hidden_layers}-D{student.config.hidden_size}"
    words = [size, f"{model.tmix}_{model.tmix2 or 'qwen2'}", train.proj_suffix0, train.proj_suffix]
    return Path(train.proj_dir) / re.sub(r"[^\w.-]", "_", "-".join(word for word in words if word))


def _starting_student(config: Config, teacher_path: str) -> tuple[RadladsForCausalLM, str]:
    train = config.train
    if train.load_model:
        folder = Path(train.load_model)
        return load_model(folder), f"{folder} sha256:{weights_hash(folder)[:16]}"
    if stage_of(train) != "align":
        raise ValueError(
            f"the {stage_of(train)} stage starts from an earlier stage's model: "
            "name its folder with --train.load_model out/..."
        )
    origin = config.model.hf_path or teacher_path
    if not origin:
        raise ValueError("the align stage needs a teacher: name its folder or hub name with --train.teacher.hf_path")
    source = open_teacher(origin)
    student, rows = build_student(source, config.model)
    counts = ", ".join(f"{count} {action}" for action, count in rows.items())
    return student, f"setup of {source.folder} ({counts})"
