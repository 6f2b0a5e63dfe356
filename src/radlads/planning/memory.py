"""The most memory a training step takes on one GPU: the moments at which it may be fullest, part by part.

Weights, optimiser and teacher are always there; gradients appear in the backward pass while what was kept for it goes.
So the peak is the largest of a few moments, not the sum of each part's own peak.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from radlads.config.schema import Checkpointing, Stage
from radlads.distill.losses import BLOCK_TOKENS
from radlads.model.configuration import RadladsConfig
from radlads.planning import activations
from radlads.planning.models import Models
from radlads.train.engines.footprint import Footprint
from radlads.train.engines.table import ALONE, engine_class

Precision = Literal["bf16-true", "bf16"]
# cuBLAS's workspaces (32 MiB for each thread and stream), RoPE tables, norms, rounding: what an H200 showed beyond what
# is counted here, at every shape measured
WORKSPACE_BYTES = 0.3e9


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step on each of num_gpus GPUs: `sequences` of `sequence_tokens` at a time.

    accumulates: whether gradients of other micro-batches are there already.
    """

    stage: Stage
    sequences: int
    sequence_tokens: int
    strategy: str = ALONE
    num_gpus: int = 1
    precision: Precision = "bf16-true"
    teacher_precision: Literal["same", "fp8"] = "same"
    checkpointing: Checkpointing = "none"
    accumulates: bool = False

    @property
    def tokens(self) -> int:
        """Of one GPU at a time."""
        return self.sequences * self.sequence_tokens

    @property
    def footprint(self) -> Footprint:
        """What the strategy's engine makes of it."""
        return engine_class(self.strategy).footprint(self.num_gpus, self.precision)

    @property
    def wide(self) -> bool:
        """Whether weights and residual stream are fp32."""
        return self.footprint.wide


class Moment(NamedTuple):
    """What a step holds at one time beside what it always holds, in bytes. `gradients`, `gathered`: of how many
    parameters, the latter where weights are sharded."""

    name: str
    gradients: float
    activations: float
    head: float = 0.0
    gathered: float = 0.0


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a step, in bytes by part."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())


def peak(models: Models, step: Step) -> Peak:
    """The fullest moment of a step."""
    always = _always(models, step)
    moments = _align_moments(models, step) if step.stage == "align" else _logit_moments(models, step)
    return max((_at(moment, always, models, step) for moment in moments), key=lambda each: each.total)


def _at(moment: Moment, always: dict[str, float], models: Models, step: Step) -> Peak:
    beside = {
        "gathered": _gathered_bytes(step, moment.gathered),
        "gradients": _gradient_bytes(models, step, moment.gradients),
        "activations": moment.activations,
        "logits": moment.head,
    }
    return Peak(moment.name, always | beside)


def host_bytes(models: Models, step: Step) -> float:
    """What each process takes of its host's memory: in fp32, the teacher of which the GPU has a copy in 8 bits, and
    the process's rows of what is frozen, if the engine keeps them there. Parameters on their way to the GPU count as
    nothing."""
    rounds = step.teacher_precision == "fp8" and step.stage != "extend"
    found = 4.0 * models.teacher.total if rounds else 0.0
    if step.footprint.frozen_on_host and step.stage == "align":
        found += 4.0 * (models.student.total - sum(models.aligned)) / step.num_gpus
    return found


def largest_micro_batch(models: Models, step: Step, most: int, usable_bytes: float) -> int:
    """The most sequences at a time, up to `most` of one GPU's share of a batch, that fit; 0 if one does not.

    All of the share needs no accumulated gradients, fewer do.
    """

    def fits(sequences: int) -> bool:
        tried = replace(step, sequences=sequences, accumulates=sequences < most)
        return peak(models, tried).total <= usable_bytes

    return most if fits(most) else _last(fits, most - 1)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The last of 1 ... most that holds, where all before it hold too; 0 for none."""
    below, above = 0, most + 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if holds(middle) else (below, middle)
    return below


def _always(models: Models, step: Step) -> dict[str, float]:
    shared, size = step.footprint.shared, step.footprint.size
    trained = sum(models.aligned) if step.stage == "align" else models.student.total
    return {
        "weights": models.student.total * size.weight / shared.weights,
        "optimiser": trained * size.optimizer / shared.optimizer,
        "teacher": _teacher_bytes(models, step) / shared.weights,
        "workspace": WORKSPACE_BYTES,
    }


def _teacher_bytes(models: Models, step: Step) -> float:
    if step.stage == "extend":
        return 0.0
    size = 4.0 if step.wide else 2.0
    rounded = models.teacher.matrices if step.teacher_precision == "fp8" else 0
    return size * models.teacher.total - (size - 1) * rounded


def _gathered_bytes(step: Step, count: float) -> float:
    """Sharded weights that are whole for now, in their own type."""
    return count * step.footprint.size.weight if step.footprint.shared.weights > 1 else 0.0


def _gradient_bytes(models: Models, step: Step, count: float) -> float:
    """Of `count` parameters; where they are sharded, those of one block or of the head are whole before that."""
    size, shared = step.footprint.size, step.footprint.shared.gradients
    if shared == 1:
        return count * size.gradient
    student = models.student
    if step.footprint.keeps_all_gradients:
        count = sum(models.aligned) if step.stage == "align" else student.total
    whole = max(models.aligned) if step.stage == "align" else max(student.largest_block, student.head)
    return count * size.gradient / shared + whole * size.weight


def _align_moments(models: Models, step: Step) -> Iterator[Moment]:
    """One layer's graph at a time, and that of the layer whose values later ones share, which waits for the gradients
    that they leave there. Recurrent layers alone have graphs."""
    config, trained, mixers = models.shape.student, sum(models.aligned), models.student.mixers
    first, last = config.first_value_layer, config.recurrent_layers[-1]
    earlier = trained if step.accumulates else 0
    backward = activations.mixer_backward(config, last)
    collected = 4 * config.num_attention_heads * config.head_dim
    own = _graph(config, last, step)
    held, first_mixer = 0.0, 0
    if first is not None and first < last:
        held, first_mixer = _graph(config, first, step) + collected, mixers[first]
    done = trained - mixers[last] - first_mixer
    copies = _rounded_weights(mixers[last] * (2 if held else 1), step)
    gathered = 2 * models.teacher.largest_block + 2 * max(models.aligned)
    # An allowance, not a count: 0.5B's peak, gathered in fp32, had as much more (docs/planning.md)
    backwards = gathered + (models.teacher.embedding if step.wide else 0)
    kept = step.tokens * (own + held + backward) + copies
    yield Moment("last layer backward", earlier or done, kept, gathered=backwards)
    if held:
        done = trained - first_mixer
        yield Moment("first layer backward", earlier or done, step.tokens * (held + backward), gathered=backwards)
    yield Moment("update", trained, 0.0)
    kept = step.tokens * (held + activations.teacher_forward(models.shape.teacher))
    yield Moment("teacher", earlier, kept, gathered=gathered + models.teacher.embedding)


def _graph(config: RadladsConfig, layer: int, step: Step) -> float:
    """Bytes per token of an aligned layer's graph. The loss keeps target and output, and the output, freed first, makes
    room for the teacher's residual stream."""
    return activations.mixer_kept(config, layer, wide=step.wide) + 4 * config.hidden_size


def _logit_moments(models: Models, step: Step) -> Iterator[Moment]:
    """Teacher, losses, the way back of the last, the first and some layers between, update."""
    student, teacher = models.student, models.teacher
    earlier = student.total if step.accumulates else 0
    layers = len(student.mixers)
    if step.stage == "distill":
        kept_by_teacher = step.tokens * activations.teacher_forward(models.shape.teacher)
        yield Moment("teacher", earlier, kept_by_teacher, gathered=2 * teacher.largest_block + teacher.embedding)
    kept = [_kept(models, step, layer, step.checkpointing) for layer in range(layers)]
    yield _losses(models, step, earlier, sum(kept))
    gathered = 2 * student.largest_block + student.embedding
    for layer, name in _turning_layers(models.shape.student):
        below = sum(kept[:layer])
        above = student.head + sum(student.mixers[layer + 1 :]) + sum(student.channel_mixers[layer + 1 :])
        done = earlier or above
        kept_here = below + _at_channel_mixer(models, step, layer)
        yield Moment(f"{name}'s channel mixer backward", done, kept_here, gathered=gathered)
        done = earlier or above + student.channel_mixers[layer]
        yield Moment(f"{name}'s mixer backward", done, below + _at_mixer(models, step, layer), gathered=gathered)
    yield Moment("update", student.total, 0.0)


def _turning_layers(config: RadladsConfig) -> Iterator[tuple[int, str]]:
    """The layers whose way back may be the fullest, and their names: between two of them everything is linear."""
    last, mixers = config.num_hidden_layers - 1, config.time_mixers
    yield last, "last layer"
    for layer in range(last - 1, 0, -1):
        if mixers[layer - 1] != mixers[layer] or mixers[layer] != mixers[layer + 1]:
            yield layer, f"layer {layer}"
    yield 0, "first layer"


def _losses(models: Models, step: Step, earlier: float, kept: float) -> Moment:
    """The head's products by blocks of tokens: a block's logits are made while those of the last one are there."""
    config = models.shape.student
    vocab, block = config.vocab_size, min(step.tokens, BLOCK_TOKENS)
    teachers = 1 if step.stage == "distill" else 0
    blocks = 1 + teachers + (1 if step.tokens > BLOCK_TOKENS else 0)
    # The final norm's input in fp32 and its output, that one's gradient, and what the teacher's head reads
    hidden = (4 + 2 + 2 + 2 * teachers) * config.hidden_size
    rounded = 2 * 2 * models.student.head if step.wide else 0  # the head, and a block's share of its gradient
    head = 2 * block * blocks * vocab + rounded
    gathered = models.student.head + teachers * models.teacher.head + models.student.largest_block
    return Moment("losses", earlier + models.student.head, kept + step.tokens * hidden, head, gathered)


def _kept(models: Models, step: Step, layer: int, checkpointing: Checkpointing) -> float:
    """Bytes a block keeps from its forward to its backward pass."""
    config, student = models.shape.student, models.student
    stream = activations.residual(config, wide=step.wide)
    if checkpointing == "full":
        return step.tokens * float(stream)
    kept: float = 2 * stream + activations.channel_mixer_kept(config)
    copies = student.channel_mixers[layer]
    if checkpointing == "none":
        kept += activations.mixer_kept(config, layer, wide=step.wide)
        copies += student.mixers[layer]
    return step.tokens * kept + _rounded_weights(copies, step)


def _rounded_weights(count: int, step: Step) -> float:
    """fp32 weights rounded for their products are kept, rounded, for the backward pass."""
    return 2.0 * count if step.wide else 0.0


def _at_channel_mixer(models: Models, step: Step, layer: int) -> float:
    config = models.shape.student
    present = _kept(models, step, layer, "none" if step.checkpointing == "full" else step.checkpointing)
    added = activations.channel_mixer_backward(config) + activations.residual(config, wide=step.wide)
    return present + step.tokens * (added + _first_values(config, step))


def _at_mixer(models: Models, step: Step, layer: int) -> float:
    config = models.shape.student
    # The block's input, its gradient, and the normed input's
    stream = 2 * activations.residual(config, wide=step.wide) + 2 * config.hidden_size
    kept = activations.mixer_kept(config, layer, wide=step.wide) + activations.mixer_backward(config, layer)
    present = step.tokens * (stream + kept + _first_values(config, step))
    return present + _rounded_weights(models.student.mixers[layer], step)


def _first_values(config: RadladsConfig, step: Step) -> int:
    """The first layer's values, which recomputation hands to every layer, and their gradient."""
    if config.first_value_layer is None:
        return 0
    return 2 * config.num_attention_heads * config.head_dim * (1 if step.checkpointing == "none" else 2)
