"""What a stage needs on a machine, and what of it is chosen here: strategy, recomputation and micro-batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from radlads.config.schema import Checkpointing, Stage
from radlads.planning.machines import Machine
from radlads.planning.memory import Peak, Precision, Step, host_bytes, largest_micro_batch, peak
from radlads.planning.models import Models
from radlads.planning.speed import stage_hours
from radlads.train.engines.table import ALONE, engine_class

# Fewer at a time leave a GPU idle between kernels
ENOUGH_TOKENS = 4096


@dataclass(frozen=True)
class Recipe:
    """The paper's stage: tokens in all, sequences an optimiser step, tokens of a sequence."""

    total_tokens: float
    batch: int
    sequence_tokens: int


RECIPES: dict[Stage, Recipe] = {
    "align": Recipe(100e6, 32, 512),
    "distill": Recipe(500e6, 96, 512),
    "extend": Recipe(100e6, 96, 16384),
}
# Hours on 8 x MI300X, arXiv 2505.03005
PAPER_HOURS: dict[str, dict[Stage, float]] = {
    "7b": {"align": 0.75, "distill": 5.5, "extend": 1.0},
    "32b": {"align": 2.5, "distill": 27.0, "extend": 3.0},
    "72b": {"align": 7.5, "distill": 54.0, "extend": 6.0},
}
PAPER_MACHINE = Machine("mi300x", 8)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for. None and auto: chosen here."""

    stage: Stage
    recipe: Recipe
    machine: Machine
    strategy: str = "auto"
    precision: Precision = "bf16-true"
    teacher_precision: Literal["same", "fp8"] = "same"
    checkpointing: Checkpointing | Literal["auto"] = "auto"
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        recipe = self.recipe
        for option, value in (("--batch", recipe.batch), ("--ctx-len", recipe.sequence_tokens)):
            if value < 1:
                raise ValueError(f"{option} must be 1 or more, not {value}")
        if not 0 < recipe.total_tokens < math.inf:
            raise ValueError(f"--tokens must be more than 0 and finite, not {recipe.total_tokens:g}")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.share:
            raise ValueError(
                f"--micro-batch must be 1 to {self.share}, one GPU's share of {recipe.batch} sequences, "
                f"not {self.micro_batch}"
            )
        if self.strategy == ALONE and self.machine.num_gpus > 1:
            raise ValueError(f"strategy single runs on one GPU, not {self.machine.num_gpus}: choose ddp or fsdp")
        if self.strategy not in ("auto", ALONE) and self.machine.num_gpus == 1:
            raise ValueError(f"one GPU has nothing to share out, as {self.strategy} would: leave out --strategy")
        if why := self.refused(self.strategy):
            raise ValueError(why)
        if self.teacher_precision == "fp8" and not self.machine.gpu.has_fp8:
            raise ValueError(f"{self.machine.kind} has no 8-bit products: leave out --teacher-precision fp8")

    def refused(self, strategy: str) -> str:
        """Why training would not have the strategy with these settings; empty where it would."""
        if strategy == "auto":
            return ""
        engine = engine_class(strategy)
        if not engine.supports_fp8_teacher and self.teacher_precision == "fp8" and self.stage != "extend":
            return f"{strategy} has no fp8 teacher, whose matrices are rounded whole: leave out --teacher-precision"
        if not engine.supports_bf16_true and self.precision == "bf16-true":
            return f"{strategy} has no bf16-true, as it keeps fp32 weights: add --precision bf16"
        return ""

    @property
    def share(self) -> int:
        """One GPU's sequences of an optimiser step."""
        return -(-self.recipe.batch // self.machine.num_gpus)

    def step(self, strategy: str, checkpointing: Checkpointing, sequences: int) -> Step:
        """A step on one GPU."""
        return Step(
            stage=self.stage,
            sequences=sequences,
            sequence_tokens=self.recipe.sequence_tokens,
            strategy=strategy,
            num_gpus=self.machine.num_gpus,
            precision=self.precision,
            teacher_precision=self.teacher_precision if self.stage != "extend" else "same",
            checkpointing=checkpointing,
            accumulates=sequences < self.share,
        )


@dataclass(frozen=True)
class StagePlan:
    """A stage on a machine.

    largest: the most sequences at a time by recomputation, 0 where one does not fit. host_bytes: what each process
    takes of the host's memory for models.
    """

    step: Step
    peak: Peak
    fits: bool
    largest: dict[Checkpointing, int]
    host_bytes: float
    hours: float


def plan_stage(models: Models, measured: Models, request: Request) -> StagePlan:
    """The first strategy with a micro-batch that fits and keeps a GPU busy, with as little recomputation as that
    takes; else the one that comes nearest. measured: the models of speed.MEASURED."""
    step, largest = _choose(models, request)
    fullest = peak(models, step)
    recipe, machine = request.recipe, request.machine
    hours = stage_hours(models, measured, step, machine, batch=recipe.batch, total_tokens=recipe.total_tokens)
    return StagePlan(step, fullest, fullest.total <= machine.gpu.usable_bytes, largest, host_bytes(models, step), hours)


def _choose(models: Models, request: Request) -> tuple[Step, dict[Checkpointing, int]]:
    found: list[tuple[Step, dict[Checkpointing, int]]] = []
    for strategy in strategies(request):
        largest = largest_micro_batches(models, request, strategy)
        for kind in _wanted_kinds(request, largest):
            sequences = request.micro_batch or _divisor(request.share, largest[kind])
            step = request.step(strategy, kind, sequences or 1)
            fits = 0 < sequences <= largest[kind]
            if fits and (request.micro_batch or sequences == request.share or step.tokens >= ENOUGH_TOKENS):
                return step, largest
            found.append((step, largest))
    return max(found, key=lambda each: (each[0].sequences, -peak(models, each[0]).total))


def strategies(request: Request) -> Sequence[str]:
    """The strategy asked for; for auto, those that are tried in turn."""
    if request.strategy != "auto":
        return (request.strategy,)
    usual = (ALONE,) if request.machine.num_gpus == 1 else ("ddp", "fsdp")
    return [strategy for strategy in usual if not request.refused(strategy)]


def largest_micro_batches(models: Models, request: Request, strategy: str) -> dict[Checkpointing, int]:
    """The most sequences at a time, of one GPU's share, for each kind of recomputation that the stage has."""
    usable = request.machine.gpu.usable_bytes
    return {
        kind: largest_micro_batch(models, request.step(strategy, kind, 1), request.share, usable)
        for kind in _kinds(request.stage)
    }


def _kinds(stage: Stage) -> tuple[Checkpointing, ...]:
    # Aligning holds one layer's graph at a time and recomputes nothing
    return ("none",) if stage == "align" else get_args(Checkpointing)


def _wanted_kinds(request: Request, largest: dict[Checkpointing, int]) -> list[Checkpointing]:
    return [kind for kind in largest if len(largest) == 1 or request.checkpointing in ("auto", kind)]


def _divisor(share: int, most: int) -> int:
    """The largest divisor of share up to `most`; 0 where there is none."""
    return max((number for number in range(1, most + 1) if share % number == 0), default=0)


def on_the_papers_machine(request: Request) -> Request:
    """The same stage as the paper ran it."""
    return replace(
        request,
        machine=PAPER_MACHINE,
        recipe=RECIPES[request.stage],
        strategy="auto",
        checkpointing="auto",
        teacher_precision="same",
        micro_batch=None,
    )
