"""Hours of a stage: the arithmetic it calls for, at the share of the machine's matrix products measured on an H200.

Every other GPU is assumed to reach the same share of its maker's figure, which nobody has measured.
"""

import math
from typing import NamedTuple

from radlads.config.schema import Checkpointing, Stage
from radlads.convert.shapes import Shape
from radlads.distill.arithmetic import train_flops
from radlads.model.configuration import RadladsConfig
from radlads.planning.machines import Machine
from radlads.planning.memory import Step
from radlads.planning.models import Models
from radlads.train.logging.gpus import GPUS


class Measured(NamedTuple):
    """One row of benchmarks/README.md: Qwen2.5-7B's shape, RAD-RWKV7 group-normed, bf16-true, one H200."""

    stage: Stage
    checkpointing: Checkpointing
    teacher_precision: str
    sequences: int
    sequence_tokens: int
    tokens_per_s: float
    peak_gb: float


MEASURED = (
    Measured("align", "none", "same", 4, 512, 22_772, 37.5),
    Measured("align", "none", "same", 32, 512, 25_686, 43.8),
    Measured("align", "none", "fp8", 4, 512, 27_330, 31.0),
    Measured("align", "none", "fp8", 32, 512, 31_654, 37.3),
    Measured("distill", "none", "same", 12, 512, 9_016, 110.4),
    Measured("distill", "none", "fp8", 12, 512, 9_692, 104.0),
    Measured("distill", "selective", "same", 12, 512, 8_178, 82.0),
    Measured("distill", "selective", "fp8", 12, 512, 9_111, 75.4),
    Measured("distill", "full", "same", 12, 512, 7_099, 78.6),
    Measured("distill", "full", "same", 24, 512, 7_419, 81.2),
    Measured("extend", "selective", "same", 1, 16384, 10_949, 95.6),
)
MEASURED_KIND, MEASURED_TFLOP_PER_S, MEASURED_GB_PER_S = "h200", 791.0, 4287.0
# Of several GPUs' speed, what is left beside communication: an assumption
SEVERAL_GPUS = 0.9


def stage_hours(
    models: Models, measured: Models, step: Step, machine: Machine, *, batch: int, total_tokens: float
) -> float:
    """Hours of a stage of `total_tokens`, `batch` sequences an optimiser step. measured: the models of MEASURED."""
    rounds = math.ceil(batch / (machine.num_gpus * step.sequences))
    flops = rounds * step.tokens * train_flops(step.stage, *_configs(models.shape), step.sequence_tokens)
    row = closest(step)
    seconds = flops / (share(row, measured) * tflop_per_s(machine) * 1e12)
    seconds += update_bytes(models, step) / (gb_per_s(machine) * 1e9)
    efficiency = SEVERAL_GPUS if machine.num_gpus > 1 else 1.0
    return total_tokens / (batch * step.sequence_tokens) * seconds / efficiency / 3600


def tflop_per_s(machine: Machine) -> float:
    """Matrix products of one GPU, from the maker's figure as an H200's measured ones are."""
    return MEASURED_TFLOP_PER_S / GPUS[MEASURED_KIND].tflop_per_s * machine.gpu.tflop_per_s


def gb_per_s(machine: Machine) -> float:
    """Copies of one GPU, likewise."""
    return MEASURED_GB_PER_S / GPUS[MEASURED_KIND].gb_per_s * machine.gpu.gb_per_s


def closest(step: Step) -> Measured:
    """The measured row most like a step: by stage, then recomputation, then the teacher's precision, then tokens.

    Extending was measured with selective recomputation alone: another kind takes distilling's row.
    """

    def unlike(row: Measured) -> tuple[bool, bool, bool, float]:
        same_kind = row.checkpointing == step.checkpointing
        same_stage = row.stage == step.stage or (step.stage == "extend" and row.stage == "distill" and same_kind)
        distance = abs(math.log(step.tokens / (row.sequences * row.sequence_tokens)))
        teacher = "same" if step.stage == "extend" else step.teacher_precision
        return not same_stage, not same_kind, row.teacher_precision != teacher, distance

    return min(MEASURED, key=unlike)


def share(row: Measured, measured: Models) -> float:
    """The share of the H200's matrix products in a row's time, the update's excepted."""
    step = step_of(row)
    flops = step.tokens * train_flops(row.stage, *_configs(measured.shape), row.sequence_tokens)
    update_s = update_bytes(measured, step) / (MEASURED_GB_PER_S * 1e9)
    return flops / (step.tokens / row.tokens_per_s - update_s) / (MEASURED_TFLOP_PER_S * 1e12)


def step_of(row: Measured) -> Step:
    """The step that a row measured."""
    return Step(
        stage=row.stage,
        sequences=row.sequences,
        sequence_tokens=row.sequence_tokens,
        checkpointing=row.checkpointing,
        teacher_precision="fp8" if row.teacher_precision == "fp8" else "same",
    )


def update_bytes(models: Models, step: Step) -> float:
    """Bytes that norm and update move on one GPU: weights, gradients and moments twice each."""
    trained = sum(models.aligned) if step.stage == "align" else models.student.total
    return 2.0 * trained * sum(step.footprint.size) / step.footprint.shared.optimizer


def _configs(shape: Shape) -> tuple[RadladsConfig, RadladsConfig]:
    return shape.student, shape.teacher
