"""`radlads plan`: its options, and what it says. Imports no torch before it has to."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from radlads.config.schema import ModelConfig, Stage
from radlads.planning.machines import Machine
from radlads.recipes.command import add_model_options, overrides_of
from radlads.train.engines.table import ENGINES, engine_class, is_users
from radlads.train.logging.gpus import GPUS, USABLE_SHARE

if TYPE_CHECKING:
    from radlads.model.configuration import RadladsConfig
    from radlads.planning.models import Models
    from radlads.planning.plan import Recipe, Request, StagePlan

# Stage 4 takes what distilling takes, and the writing of its rows
STAGES = tuple(stage for stage in get_args(Stage) if stage != "instruct")
# So many layers of one mixer are listed by number
_FEW_LAYERS = 12
_CONTEXTS_TOKENS = (1024, 8192, 65536)
_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads plan`. Words are checked later, so that a wrong one is answered by a sentence."""
    parser.add_argument("size", metavar="SIZE", help="of Qwen2.5, 0.5b to 72b, or a Hugging Face folder")
    parser.add_argument("--stage", default="all", help="align, distill, extend or all (default)")
    parser.add_argument("--gpu", default="h200", help=f"{', '.join(GPUS)} (default h200)")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default 1)")
    parser.add_argument(
        "--strategy",
        default="auto",
        help="single, ddp, fsdp, deepspeed_stage_1, _2 or _3 (default: single for one GPU, else ddp, or fsdp to fit)",
    )
    parser.add_argument("--price", type=float, help="of one GPU for an hour, for the cost")
    parser.add_argument("--precision", default="bf16-true", help="bf16-true (default) or bf16, as train.precision")
    parser.add_argument("--teacher-precision", default="same", help="same (default) or fp8, as train.teacher_precision")
    parser.add_argument("--checkpointing", default="auto", help="none, selective, full or auto: the least that fits")
    parser.add_argument("--micro-batch", type=int, help="sequences of a GPU at a time (default: the most that fit)")
    parser.add_argument("--batch", type=int, help="sequences of all GPUs an optimiser step (default: the paper's)")
    parser.add_argument("--ctx-len", type=int, help="tokens of a sequence (default: the paper's)")
    parser.add_argument("--tokens", help="of a stage, such as 500M (default: the paper's)")
    add_model_options(parser, default_variant="group_norm, the released 7B's")


@dataclass(frozen=True)
class _Planned:
    request: "Request"
    plan: "StagePlan"


def plan_lines(arguments: argparse.Namespace) -> Iterator[str]:
    """What `radlads plan` prints. Raises ValueError for values that make no plan."""
    machine, requests = Machine(arguments.gpu, arguments.gpus), _requests(arguments)
    if arguments.price is not None and not 0 <= arguments.price < math.inf:
        raise ValueError(f"--price must be 0 or more, not {arguments.price}")
    from radlads.convert.shapes import open_shape
    from radlads.planning.models import Models
    from radlads.planning.plan import plan_stage

    overrides = overrides_of(arguments)
    models, *aligned = (
        Models.of(open_shape(arguments.size, mixer=arguments.mixer, variant=arguments.variant, overrides=each))
        for each in (overrides, *_before_selection(overrides))
    )
    _check_aligned(models, requests)
    measured = Models.of(open_shape("7b"))
    of_stage = {"align": aligned[0]} if aligned else {}
    planned = [_Planned(each, plan_stage(of_stage.get(each.stage, models), measured, each)) for each in requests]
    yield (
        f"{arguments.size} ({models.student.total / 1e9:.2f}B parameters, teacher {models.teacher.total / 1e9:.2f}B) "
        f"on {machine}, {arguments.mixer}, precision {arguments.precision}; GB are 1e9 bytes"
    )
    yield from _stack_lines(models.shape.student)
    if aligned:
        yield f"{overrides['model.softmax_layers']}: align runs all layers; from distill on, as if these were found"
    for each in planned:
        yield from _stage_lines(each, arguments.price)
    if len(planned) > 1:
        yield _sum_line([each.plan for each in planned], machine, arguments.price)
    if machine.num_gpus > 1:
        yield from _survey_lines(models, requests)
    yield from _paper_lines(arguments.size, models, measured, requests)
    yield from _assumption_lines(arguments, machine, planned)


def _requests(arguments: argparse.Namespace) -> "list[Request]":
    from radlads.planning.memory import Precision
    from radlads.planning.plan import Request

    _one_of("--stage", arguments.stage, (*STAGES, "all"))
    if not is_users(arguments.strategy):
        _one_of("--strategy", arguments.strategy, ("auto", *ENGINES))
    _one_of("--precision", arguments.precision, get_args(Precision))
    _one_of("--teacher-precision", arguments.teacher_precision, ("same", "fp8"))
    _one_of("--checkpointing", arguments.checkpointing, ("auto", "none", "selective", "full"))
    return [
        Request(
            stage=stage,
            recipe=_recipe(stage, arguments),
            machine=Machine(arguments.gpu, arguments.gpus),
            strategy=arguments.strategy,
            precision=arguments.precision,
            teacher_precision=arguments.teacher_precision,
            checkpointing=arguments.checkpointing,
            micro_batch=arguments.micro_batch,
        )
        for stage in (STAGES if arguments.stage == "all" else (arguments.stage,))
    ]


def _before_selection(overrides: "dict[str, str]") -> "list[dict[str, str]]":
    """The keys of the student that is aligned, if its softmax layers are selected only then."""
    from radlads.config.layer_lists import num_selected

    text = overrides.get("model.softmax_layers", "")
    return [overrides | {"model.softmax_layers": ""}] if num_selected(ModelConfig(softmax_layers=text)) else []


def _check_aligned(models: "Models", requests: "list[Request]") -> None:
    if not models.aligned and any(request.stage == "align" for request in requests):
        raise ValueError("no layer of this student has a mixer to align: choose another --mixer, or --stage distill")


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, not {value!r}")


def _recipe(stage: Stage, arguments: argparse.Namespace) -> "Recipe":
    from radlads.planning.plan import RECIPES, Recipe

    usual = RECIPES[stage]
    return Recipe(
        usual.total_tokens if arguments.tokens is None else _number(arguments.tokens),
        usual.batch if arguments.batch is None else arguments.batch,
        usual.sequence_tokens if arguments.ctx_len is None else arguments.ctx_len,
    )


def _number(text: str) -> float:
    """500M as 500 million."""
    factor = _SUFFIXES.get(text[-1:].lower(), 1.0)
    try:
        return float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        raise ValueError(f"--tokens must be a number such as 500M, not {text!r}") from None


def _stack_lines(student: "RadladsConfig") -> Iterator[str]:
    """Which layers have which mixer, and what a sequence's state takes."""
    from radlads.model.configuration import state_bytes
    from radlads.model.registry import mixer_class

    layers: dict[str, list[int]] = {}
    for layer, name in enumerate(student.time_mixers):
        layers.setdefault(name, []).append(layer)
    told = [
        f"{len(own)} {mixer_class(name).name_for_people()}"
        + ("" if len(layers) == 1 or len(own) > _FEW_LAYERS else f" ({', '.join(map(str, own))})")
        for name, own in layers.items()
    ]
    sizes = [f"{state_bytes(student, tokens) / 1e6:,.1f} MB at {tokens:,} tokens" for tokens in _CONTEXTS_TOKENS]
    yield f"{student.num_hidden_layers} layers: {', '.join(told)}"
    if "full_attention" in student.layer_types:
        yield f"state of one sequence: {', '.join(sizes)}"
    else:
        yield f"state of one sequence: {state_bytes(student, 1) / 1e6:,.1f} MB, however long"
    yield "what other students recall, hold and need: docs/which_student.md"


def _stage_lines(planned: _Planned, price: float | None) -> Iterator[str]:
    plan, request = planned.plan, planned.request
    step, recipe, usable = plan.step, request.recipe, request.machine.gpu.usable_bytes
    yield ""
    yield (
        f"{step.stage}: {recipe.total_tokens / 1e6:,.0f}M tokens, {recipe.batch} x {step.sequence_tokens} a step; "
        f"{step.strategy}, {step.sequences} x {step.sequence_tokens} a GPU at a time"
        + ("" if step.stage == "align" else f", checkpointing {step.checkpointing}")
    )
    word = "fits" if plan.fits else "DOES NOT FIT"
    yield f"  {word}: {plan.peak.total / 1e9:.1f} of {usable / 1e9:.1f} GB, fullest at: {plan.peak.moment}"
    yield "    " + ", ".join(f"{part} {size / 1e9:.1f}" for part, size in plan.peak.parts.items() if size)
    most = ", ".join(_most(kind, number, request.share) for kind, number in plan.largest.items())
    yield f"  largest micro-batch: {most}"
    if plan.host_bytes:
        yield f"  host memory for models: {_host_memory(plan.host_bytes, request.machine.num_gpus)}"
    if plan.fits:
        yield f"  {_cost(plan.hours, request.machine, price)}"


def _host_memory(size: float, processes: int) -> str:
    one = f"{size / 1e9:.1f} GB"
    return one if processes == 1 else f"{one} for each GPU's process, {processes * size / 1e9:.0f} GB in all"


def _most(kind: str, number: int, share: int) -> str:
    if number == 0:
        return f"{kind}: not even 1"
    return f"{kind}: {number}" + (" (all of a GPU's share)" if number == share else "")


def _cost(hours: float, machine: Machine, price: float | None) -> str:
    gpu_hours = hours * machine.num_gpus
    text = f"{hours:.2f} hours, {gpu_hours:.1f} GPU-hours"
    return text if price is None else f"{text}, costing {gpu_hours * price:,.2f}"


def _sum_line(plans: "list[StagePlan]", machine: Machine, price: float | None) -> str:
    unfit = [plan.step.stage for plan in plans if not plan.fits]
    if unfit:
        return f"\nas a whole: not on this machine, for {' and '.join(unfit)}"
    return f"\nas a whole: {_cost(sum(plan.hours for plan in plans), machine, price)}"


def _survey_lines(models: "Models", requests: "list[Request]") -> Iterator[str]:
    """What works: every strategy's largest micro-batches."""
    from radlads.planning.plan import largest_micro_batches

    yield "\nlargest micro-batch by strategy (checkpointing none / selective / full; - where one sequence is too much)"
    yield f"{'':20}" + "".join(f"{request.stage:>16}" for request in requests)
    for strategy in list(ENGINES)[1:]:
        cells = []
        for request in requests:
            found = largest_micro_batches(models, request, strategy).values()
            cells.append("refused" if request.refused(strategy) else " / ".join(str(n or "-") for n in found))
        yield f"{strategy:20}" + "".join(f"{cell:>16}" for cell in cells)


def _paper_lines(size: str, models: "Models", measured: "Models", requests: "list[Request]") -> Iterator[str]:
    from radlads.planning.plan import PAPER_HOURS, PAPER_MACHINE, on_the_papers_machine, plan_stage

    hours = PAPER_HOURS.get(size.lower())
    if hours is None:
        return
    yield f"\nthe paper's hours on {PAPER_MACHINE}, and this reckoning's for the same"
    for request in requests:
        own = plan_stage(models, measured, on_the_papers_machine(request)).hours
        paper = hours[request.stage]
        yield f"  {request.stage:8} {paper:6.2f} {own:6.2f}: {paper / own:.1f} times as long"
    yield "  Not all of that is code: products on that GPU fall short of its maker's figure, and a stage is more than"
    yield "  its steps. Take these hours as the least (docs/planning.md)."


def _assumption_lines(arguments: argparse.Namespace, machine: Machine, planned: list[_Planned]) -> Iterator[str]:
    used = {each.plan.step.strategy for each in planned}
    yield "\nassumed (docs/planning.md)"
    yield f"  memory: tensors may take {USABLE_SHARE:.0%} of a GPU's; blocks are compiled; AdamW"
    yield f"  {_PRECISION_NOTES[arguments.precision]}"
    yield from _mixer_notes(arguments)
    notes = [engine_class(strategy).plan_note for strategy in sorted(used, key=[*ENGINES, *used].index)]
    yield from (f"  {note}" for note in notes if note)
    yield from _speed_notes(machine)


def _mixer_notes(arguments: argparse.Namespace) -> Iterator[str]:
    """Where the mixer's activations come from, if it is not the one that was measured."""
    from radlads.model.registry import DEFAULT, mixer_class, registered_name
    from radlads.model.time_mixer import defines_kept_bytes

    if registered_name(arguments.mixer) == DEFAULT and not arguments.set:
        return
    name = " with ".join([arguments.mixer, *arguments.set[:1]]) + (" ..." if arguments.set[1:] else "")
    counted = defines_kept_bytes(mixer_class(arguments.mixer))
    if counted:
        yield f"  {name}: activations counted from equations; neither memory nor speed was ever measured"
        return
    yield f"  {name}: of activations only the inputs and outputs of its matrices are counted. Anything else that its"
    yield "  forward keeps is missing, above all tensors of tokens x tokens: define kept_bytes (docs/mixers.md)"


def _speed_notes(machine: Machine) -> Iterator[str]:
    from radlads.planning.speed import MEASURED_KIND, SEVERAL_GPUS, tflop_per_s

    rate = f"{tflop_per_s(machine):,.0f} TFLOP/s of matrix products on {machine.kind}"
    if machine.kind != MEASURED_KIND:
        rate += (
            f" ({tflop_per_s(machine) / machine.gpu.tflop_per_s:.0%} of its maker's figure, as on an {MEASURED_KIND})"
        )
    yield f"  speed: {rate}, and the share of them that one {MEASURED_KIND} reached at 7B"
    if machine.num_gpus > 1:
        yield f"  {machine.num_gpus} GPUs: {SEVERAL_GPUS:.0%} of their speed is assumed. Two H200s kept, in stages 1"
        yield "  and 2, 96 % and 92 % at 0.5B under ddp, 72 % and 87 % at 7B's width under fsdp (docs/scaling.md)"
    yield "  hours are of steps alone: no compilation, loading, held-out measurements or checkpoints"


_PRECISION_NOTES = {
    "bf16-true": "bf16-true: weights, gradients and moments in bf16; checked on one H200 at 7B, within 1 %",
    "bf16": "bf16: weights, gradients and moments in fp32, rounded weights kept for the way back; checked at 0.5B",
}
