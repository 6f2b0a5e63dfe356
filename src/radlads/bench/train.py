"""Training steps: forward, backward, clipping and optimiser of the three stages, teacher included."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from radlads.bench.cases import TrainCase
from radlads.bench.measure import Ceilings, held_bytes, peak_bytes, release_memory, timed
from radlads.bench.models import random_model, weight_bytes
from radlads.bench.record import Record, Row
from radlads.config.schema import TrainConfig
from radlads.convert.shapes import Shape
from radlads.distill.arithmetic import train_flops
from radlads.distill.fp8_teacher import fp8_copy
from radlads.distill.logits import build_stage
from radlads.distill.stage import is_trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.cuda_graph import GraphedPasses, records_graph
from radlads.train.optimizers.optim import build_optimizers
from radlads.train.optimizers.step import backward_parts, optimizer_step

WARMUP_STEPS, STEPS = 4, 4  # a CUDA graph is recorded in the third
CLIP = 1.0
_STAGE_NUMBERS = {"align": 1, "distill": 2, "extend": -1}
# What fits 7B into 141 GB: a whole stack's activations for 16k tokens would not
_DEFAULT_CHECKPOINTING = {"align": "none", "distill": "none", "extend": "selective"}


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """checkpointing: none, selective or full; auto = none, but selective when extending. compiled: torch.compile.
    teacher_precision: as train.teacher_precision."""

    checkpointing: str
    teacher_precision: str
    compiled: bool


def bench_train(
    cases: list[TrainCase],
    shape: Shape,
    settings: TrainSettings,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: Ceilings,
    record: Record,
) -> None:
    """Measure the cases one after the other with one student and one teacher, which is let go when no case needs it."""
    student = random_model(shape.student, device=device, dtype=dtype)
    teacher: RadladsForCausalLM | None = None
    if any(case.stage != "extend" for case in cases):
        teacher = random_model(shape.teacher, device=device, dtype=dtype).requires_grad_(False)
        if settings.teacher_precision == "fp8":
            teacher = fp8_copy(teacher, device, dtype)
    if settings.compiled:
        student.compile_blocks()
    if settings.compiled and teacher is not None:
        teacher.compile_blocks()
    record.say("models built")
    for number, case in enumerate(cases):
        if all(later.stage == "extend" for later in cases[number:]):
            teacher = None
        if settings.compiled:
            torch.compiler.reset()  # else a second shape is compiled for changing shapes, which no training run has
        release_memory(device)
        work = _work(case, settings)
        with record.attempt(Row(case=case.name, of="student", work=work), lower=_advice(case)):
            record.add(_measure(case, work, student, teacher, shape, device, ceilings))
        student.zero_grad(set_to_none=True)


def _work(case: TrainCase, settings: TrainSettings) -> dict:
    # Aligning holds one layer's graph at a time and has nothing to recompute
    automatic, is_align = settings.checkpointing == "auto", case.stage == "align"
    return {
        "stage": case.stage,
        "batch": case.batch,
        "tokens": case.tokens,
        "checkpointing": _DEFAULT_CHECKPOINTING[case.stage] if automatic or is_align else settings.checkpointing,
        "compiled": settings.compiled,
        "teacher_precision": settings.teacher_precision if case.stage != "extend" else None,
    }


def _advice(case: TrainCase) -> str:
    if case.stage == "align":
        return f"lower --batch from {case.batch}, or --tokens from {case.tokens}"
    return f"lower --batch from {case.batch}, or --tokens from {case.tokens}, or use --checkpointing full"


def _measure(
    case: TrainCase,
    work: dict,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM | None,
    shape: Shape,
    device: torch.device,
    ceilings: Ceilings,
) -> Row:
    train = TrainConfig(attention_distillation_stage=_STAGE_NUMBERS[case.stage], lr_init=1e-5, lr_final=1e-5)
    stage = build_stage(train)
    student.train()
    student.set_activation_checkpointing(work["checkpointing"])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trainable(name, student, stage.trainable))
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizers = build_optimizers(student, train)
    tokens = torch.randint(shape.student.vocab_size, (case.batch, case.tokens + 1), device=device)

    run: Callable = functools.partial(backward_parts, stage, student, teacher)
    graphed = device.type == "cuda" and records_graph(train, stage, student, compiled=work["compiled"])
    if graphed:
        run = GraphedPasses(run, student, teacher)
    norm = torch.zeros(())

    def step() -> None:
        nonlocal norm
        parts = run(tokens)
        count, sums = sum(part.count for part in parts), torch.stack([part.sum for part in parts])
        norm = optimizer_step(optimizers, parameters, count=count, clip_val=CLIP, sums=sums).whole

    held_bytes(device)
    timing = timed(step, device, warmup=WARMUP_STEPS, runs=STEPS)
    peak = peak_bytes(device)
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient's norm is {norm.item()}: a step without an update was timed")
    weights = weight_bytes(student) + (0 if teacher is None else weight_bytes(teacher))
    num_tokens = case.batch * case.tokens
    flops = train_flops(case.stage, shape.student, shape.teacher, case.tokens)
    return Row(
        case=case.name,
        of="student",
        work=work | {"graphed": graphed, "gflop_per_token": round(flops / 1e9, 3)},
        tokens=num_tokens,
        timing=timing,
        share=num_tokens * flops / (timing.median_ms / 1000) / (ceilings.matmul_tflop_per_s * 1e12),
        peak_bytes=peak,
        beside_bytes=None if peak is None else peak - weights,
    )
