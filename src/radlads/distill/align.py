"""Stage 1: every student mixer learns, on the teacher's own residual stream, what the teacher's attention puts out."""

import functools
from collections.abc import Iterator
from typing import Literal

import torch
from torch.distributed.fsdp import FSDPModule

from radlads.distill.documents import Cut, Sequences, whole_rows
from radlads.distill.losses import alignment
from radlads.distill.stage import LossPart, Trainable
from radlads.model.block import Block
from radlads.model.contracts import SharedInputs
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.packed_rows import mix_rows
from radlads.model.whole_parameters import call_whole


class Align:
    """Stage 1 (paper section 3.2). One part per recurrent layer, whose graph is freed before the next is built.

    The layers share one thing, the first RAD-RWKV7 layer's values. Later layers get them detached; the gradient they
    leave there enters the first layer's objective, which is therefore yielded last. `cut` makes sequences of rows.
    """

    name = "align"
    needs_teacher = True

    def __init__(self, *, kind: Literal["l2", "mse"] = "l2", trainable: Trainable = "mixer", cut: Cut = whole_rows):
        self.kind, self.trainable, self._cut = kind, trainable, cut

    def part_names(self, student: RadladsForCausalLM) -> list[str]:
        """See Stage.part_names."""
        return [f"layer_{layer}" for layer in student.config.recurrent_layers]

    def share(self, student: RadladsForCausalLM) -> float:
        """See Stage.share: a softmax layer that is kept counts too, with a loss of 0, as in the released code."""
        return len(student.config.recurrent_layers) / student.config.num_hidden_layers

    def parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, tokens: torch.Tensor
    ) -> Iterator[LossPart]:
        """See Stage.parts. The student's mixers alone run; embedding, channel mixers and head do not."""
        assert teacher is not None
        for sequences in self._cut(tokens):
            yield from self._parts(student, teacher, sequences)

    def _parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM, sequences: Sequences
    ) -> Iterator[LossPart]:
        count, counted = sequences.count, sequences.counted
        # Once, not for every layer: the configuration asks each layer's mixer
        recurrent, first_value_layer = student.config.recurrent_layers, student.config.first_value_layer
        values: torch.Tensor | None = None
        collected: torch.Tensor | None = None
        held = None
        for layer, x, target, shared in _frozen(teacher.model.attention_taps(sequences.inputs, sequences.numbers)):
            if layer > max(recurrent, default=-1):
                break
            if layer not in recurrent:
                continue
            block = student.model.layers[layer]
            assert isinstance(block, Block)
            mixer_loss = block.compiled(_mixer_loss, x.shape[1], shared.texts)
            run = functools.partial(call_whole, backward_follows=layer != first_value_layer)
            how = self.kind, counted, block.reads_texts
            loss, v_first = run(block.self_attn, mixer_loss, x, target, values, shared, *how)
            if values is None and v_first is not None:
                values = v_first.detach().requires_grad_(torch.is_grad_enabled())
                held = (layer, loss, v_first)
                continue
            is_last = held is None and layer == max(recurrent)
            yield LossPart(f"layer_{layer}", loss, loss.detach(), count, is_last)
            if values is not None and values.grad is not None:
                # Layer by layer into fp32, because the gradients of all layers add up here
                collected = values.grad.float() if collected is None else collected.add_(values.grad)
                values.grad = None
        if held is not None:
            layer, loss, v_first = held
            objective = loss if collected is None else loss + (v_first * collected).sum()
            yield LossPart(f"layer_{layer}", objective, loss.detach(), count)


def _mixer_loss(mixer: torch.nn.Module, x, target, values, shared: SharedInputs, kind, counted, reads_texts: bool):
    """How far a mixer's output on x [B, T, C] is from target, over `counted` tokens; and v_first for the next."""
    run = mixer.forward if isinstance(mixer, FSDPModule) else mixer  # call_whole stands in for the hooks of a call
    output, _, v_first = mix_rows(run, x, None, values, shared, reads_texts=reads_texts)
    return alignment(target, output, kind, counted), v_first


def _frozen(taps):
    """Iterate without recording gradients, though the consumer records them."""
    taps = iter(taps)
    while True:
        with torch.no_grad():
            tap = next(taps, None)
        if tap is None:
            return
        yield tap
