"""Stage 1: every student mixer learns, on the teacher's own residual stream, what the teacher's attention puts out."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from radlads.distill.losses import alignment
from radlads.distill.stage import LossPart, Trainable
from radlads.model.contracts import SharedInputs
from radlads.model.modeling import Block, RadladsForCausalLM


class Align:
    """Stage 1 (paper section 3.2). One part per recurrent layer, whose graph is freed before the next is built.

    The layers share one thing, the first RAD-RWKV7 layer's values. Later layers get them detached; the gradient they
    leave there enters the first layer's objective, which is therefore yielded last.
    """

    name = "align"
    needs_teacher = True

    def __init__(self, *, kind: Literal["l2", "mse"] = "l2", trainable: Trainable = "mixer"):
        self.kind, self.trainable = kind, trainable

    def parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, tokens: torch.Tensor
    ) -> Iterator[LossPart]:
        """See Stage.parts. The student's mixers alone run; embedding, channel mixers and head do not."""
        assert teacher is not None
        count = tokens[:, 1:].numel()
        recurrent = student.config.recurrent_layers
        values: torch.Tensor | None = None
        collected: torch.Tensor | None = None
        held = None
        for layer, x, target, shared in _frozen(teacher.model.attention_taps(tokens[:, :-1])):
            if layer > max(recurrent, default=-1):
                break
            if layer not in recurrent:
                continue
            block = student.model.layers[layer]
            assert isinstance(block, Block)
            loss, v_first = block.compiled(_mixer_loss, x.shape[1])(
                block.self_attn, x, target, values, shared, self.kind
            )
            if values is None and v_first is not None:
                values = v_first.detach().requires_grad_(torch.is_grad_enabled())
                held = (layer, loss, v_first)
                continue
            yield LossPart(f"layer_{layer}", loss, loss.detach(), count)
            if values is not None and values.grad is not None:
                # Layer by layer into fp32, because the gradients of all layers add up here
                collected = values.grad.float() if collected is None else collected.add_(values.grad)
                values.grad = None
        if held is not None:
            layer, loss, v_first = held
            objective = loss if collected is None else loss + (v_first * collected).sum()
            yield LossPart(f"layer_{layer}", objective, loss.detach(), count)


def _mixer_loss(mixer: Callable, x, target, values, shared: SharedInputs, kind: Literal["l2", "mse"]):
    """How far a mixer's output on x [B, T, C] is from target, summed over tokens; and v_first for the next mixer."""
    output, _, v_first = mixer(x, None, values, shared)
    return alignment(target, output, kind), v_first


def _frozen(taps):
    """Iterate without recording gradients, though the consumer records them."""
    taps = iter(taps)
    while True:
        with torch.no_grad():
            tap = next(taps, None)
        if tap is None:
            return
        yield tap
