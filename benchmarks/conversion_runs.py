"""What python_conversion.py and real_conversion.py share: plans whose numbers are options, a console, stages' keys."""

import argparse
import time
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

_PROGRESS_EVERY_S = 5


def knob(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


def add_knobs(parser: argparse.ArgumentParser, plan: type, *, default: str) -> None:
    """An option for each of a plan's numbers; default: how its help gives the default, with a {}."""
    for each in fields(plan):
        text = f"{each.metadata['help']} ({default.format(each.default)})".replace("%", "%%")
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), help=text)


def with_knobs(plan: Any, arguments: argparse.Namespace) -> Any:
    """The plan with the numbers given. Raises ValueError as the plan does."""
    given = {each.name: getattr(arguments, each.name) for each in fields(plan)}
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


class Budget(NamedTuple):
    """What a plan gives to a stage. lr: at its start. context, batch_tokens: tokens of a sequence and of a step."""

    tokens: int
    lr: float
    context: int
    batch_tokens: int


def budget(plan: Any, stage: str) -> Budget:
    """A stage's part of a plan: extend is at the long context, align and distill at the short one."""
    is_long = stage == "extend"
    return Budget(
        tokens=getattr(plan, f"{stage}_tokens"),
        lr=getattr(plan, f"{stage}_lr"),
        context=plan.long_context if is_long else plan.context,
        batch_tokens=plan.long_batch_tokens if is_long else plan.batch_tokens,
    )


def stage_keys(
    budget: Budget, *, seed: int, data: str, folder: Path, teacher: Path | None, device: str
) -> dict[str, Any]:
    """Configuration keys of a stage; data: train.data_file, folder: where its folder will be."""
    on_gpu = device == "cuda"
    return {
        "model.ctx_len": budget.context,
        "train.my_exit_tokens": budget.tokens,
        "train.micro_bsz": max(1, budget.batch_tokens // budget.context),
        "train.lr_init": budget.lr,
        "train.seed_everything": seed,
        "train.data_file": data,
        "train.proj_dir": str(folder),
        "train.teacher.hf_path": "" if teacher is None else str(teacher),
        "train.accelerator": "gpu" if on_gpu else "cpu",
        "train.precision": "bf16" if on_gpu else "fp32",
    }


class TimedConsole:
    """Prints every line with the seconds since the start, and progress every few seconds."""

    def __init__(self, began: float) -> None:
        self._began, self._shown = began, 0.0

    def line(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f}s  {text}", flush=True)

    def progress(self, text: str) -> None:
        if time.monotonic() - self._shown >= _PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            self.line(text)


def device_name(device: str) -> str:
    """What the run runs on, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
