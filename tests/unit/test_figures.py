"""Arithmetic, bytes and peaks of the 7B shape, to the last digit: what bench, MFU and plan are reckoned with.

Taken before the mixers said these things of themselves. A change of one of them changes what results mean.
"""

from typing import NamedTuple

import pytest

from radlads.bench.costs import decode_state_bytes, prefill_flops
from radlads.convert.shapes import open_shape
from radlads.distill.arithmetic import train_flops
from radlads.planning.memory import Step, peak
from radlads.planning.models import Models
from radlads.planning.speed import MEASURED, step_of

STAGES = (("align", 512), ("distill", 512), ("extend", 16384))
STRATEGIES = ("ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


class Figures(NamedTuple):
    """train_flops: of STAGES, a token. prefill_flops: of 8,192 tokens, student and teacher. decode_bytes: at token 512,
    of the student in bf16 and fp32 and of the teacher in bf16. parameters: of student, teacher, the matrices of the
    student's blocks, and its time mixers. peaks_gb: of the steps that were measured. all_strategies_gb: the sum of many
    steps' on 8 GPUs."""

    train_flops: list[float]
    prefill_flops: list[float]
    decode_bytes: list[int]
    parameters: list[int]
    peaks_gb: list[float]
    all_strategies_gb: float


FIGURES = {
    ("rad_rwkv7", "group_norm"): Figures(
        train_flops=[18179883008.0, 57818349568.0, 43575017472.0],
        prefill_flops=[13435144128.0, 14694877120.0],
        decode_bytes=[102760448, 102760448, 29360128],
        parameters=[7750726144, 7615612928, 6525288448, 957325824],
        peaks_gb=[37.5363, 43.8051, 31.011, 37.2798, 110.3622, 103.8369, 81.9496, 75.4243, 78.3658, 80.7594, 95.8077],
        all_strategies_gb=4007.54,
    ),
    ("rad_rwkv7", "balanced"): Figures(
        train_flops=[18179883008.0, 57818349568.0, 43575017472.0],
        prefill_flops=[13435144128.0, 14694877120.0],
        decode_bytes=[102760448, 102760448, 29360128],
        parameters=[7750324736, 7615612928, 6525288448, 956924416],
        peaks_gb=[37.5322, 43.7946, 31.0069, 37.2693, 110.3213, 103.796, 81.9472, 75.4219, 78.3612, 80.7534, 95.8017],
        all_strategies_gb=4007.08,
    ),
    ("rad_rwkv6", None): Figures(
        train_flops=[19473104896.0, 58052313088.0, 43808980992.0],
        prefill_flops=[13513131968.0, 14694877120.0],
        decode_bytes=[103161856, 103563264, 29360128],
        parameters=[7815413760, 7615612928, 6525288448, 1022013440],
        peaks_gb=[37.7604, 41.535, 31.2351, 35.0097, 116.5349, 110.0097, 82.3377, 75.8125, 79.0456, 81.607, 96.1547],
        all_strategies_gb=4062.99,
    ),
}


def figures(mixer, variant):
    shape = open_shape("7b", mixer=mixer, variant=variant)
    models = Models.of(shape)
    student, teacher = models.student, models.teacher
    steps = [
        Step(
            stage=stage,
            sequences=4,
            sequence_tokens=512,
            strategy=strategy,
            num_gpus=8,
            precision=precision,
            checkpointing=checkpointing,
        )
        for stage, _ in STAGES
        for strategy in STRATEGIES
        for precision in ("bf16", "bf16-true")
        for checkpointing in ("none", "selective", "full")
    ]
    return Figures(
        train_flops=[train_flops(stage, shape.student, shape.teacher, tokens) for stage, tokens in STAGES],
        prefill_flops=[prefill_flops(config, 8192) for config in (shape.student, shape.teacher)],
        decode_bytes=[
            *(decode_state_bytes(shape.student, 512, size) for size in (2, 4)),
            decode_state_bytes(shape.teacher, 512, 2),
        ],
        parameters=[student.total, teacher.total, student.matrices, sum(student.mixers)],
        peaks_gb=[round(peak(models, step_of(row)).total / 1e9, 4) for row in MEASURED],
        all_strategies_gb=round(sum(peak(models, step).total for step in steps) / 1e9, 2),
    )


@pytest.mark.parametrize(("mixer", "variant"), FIGURES)
def test_figures_are_what_they_were(mixer, variant):
    assert figures(mixer, variant) == FIGURES[mixer, variant]
