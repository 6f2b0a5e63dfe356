"""A student run with the teacher's attention in some layers, from the first of these layers on.

Owns the residual stream that is kept, and how a swapped stack runs. Leaves what is measured to probes.py.
Shape letters: B rows, T tokens, C hidden size.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from radlads.convert.kept_layers import KeptMixers
from radlads.model.block import Block
from radlads.model.contracts import SharedInputs
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.time_mixer import TimeMixer

Layers = tuple[int, ...]
"""Layers that are kept as softmax, in rising order."""


class BlockInput(NamedTuple):
    """What a block reads: hidden [B, T, C], and the first values [B, T, H, N] or None."""

    hidden: torch.Tensor
    v_first: torch.Tensor | None


@dataclass(frozen=True)
class Trace:
    """A student that keeps `kept`, run on a batch: what each block read, and what the head reads, normed."""

    kept: Layers
    inputs: list[BlockInput]
    shared: SharedInputs
    hidden: torch.Tensor


class SwappedStudent:
    """A student and its teacher, in evaluation mode, on one device and of one type."""

    def __init__(self, student: RadladsForCausalLM, teacher: RadladsForCausalLM):
        self.student, self.teacher = student, teacher
        self._mixers = KeptMixers(student, teacher)
        self._blocks = [block for block in student.model.layers if isinstance(block, Block)]

    def trace(self, tokens: torch.Tensor, kept: Layers) -> Trace:
        """Run all layers on tokens [B, T], which start a text, and keep what each block reads."""
        model = self.student.model
        stream = BlockInput(model.embed_tokens(tokens), None)
        shared, inputs = model.share_whole_sequences(tokens.shape[1], tokens.device), []
        for block, mixer in zip(self._blocks, self._mixers.of(kept), strict=True):
            inputs.append(stream)
            stream = _run(block, mixer, stream, shared)
        return Trace(kept, inputs, shared, model.norm(stream.hidden))

    def hidden(self, trace: Trace, layers: Layers) -> torch.Tensor:
        """What the head reads, [B, T, C], where the student keeps `layers`, all those of the trace among them.

        Only the layers from the first new one on run. If that is the first of the layers that make first values, the
        next one that can makes them, as in a model that is built with these layers.
        """
        new = _new(layers, trace.kept)
        if not new:
            return trace.hidden
        first, stream = min(new), trace.inputs[min(new)]
        for block, mixer in list(zip(self._blocks, self._mixers.of(layers), strict=True))[first:]:
            stream = _run(block, mixer, stream, trace.shared)
        normed: torch.Tensor = self.student.model.norm(stream.hidden)
        return normed

    def num_runs(self, kept: Layers, sets: Collection[Layers]) -> int:
        """How many blocks a batch runs to trace `kept` and to measure these sets."""
        depth = len(self._blocks)
        return depth + sum(depth - min(_new(layers, kept), default=depth) for layers in sets)


def _new(layers: Layers, kept: Layers) -> set[int]:
    assert set(kept) <= set(layers)
    return set(layers) - set(kept)


def _run(block: Block, mixer: TimeMixer, stream: BlockInput, shared: SharedInputs) -> BlockInput:
    """A block with another mixer in the place of its own."""
    mixed, _, v_first = mixer(block.input_layernorm(stream.hidden), None, stream.v_first, shared)
    return BlockInput(block.feed(stream.hidden + mixed), v_first)
