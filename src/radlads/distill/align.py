"""Stage 1: every student mixer learns, on the teacher's own residual stream, what the teacher's attention puts out."""

from collections.abc import Iterator
from typing import Literal

import torch

from radlads.distill.losses import alignment
from radlads.distill.stage import LossPart, Trainable
from radlads.model.modeling import RadladsForCausalLM


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
        values: torch.Tensor | None = None
        held = None
        for layer, x, target, shared in _frozen(teacher.model.attention_taps(tokens[:, :-1])):
            if layer not in student.config.recurrent_layers:
                continue
            output, _, v_first = student.model.layers[layer].self_attn(x, None, values, shared)
            loss = alignment(target, output, self.kind)
            if values is None and v_first is not None:
                # fp32, because the gradients of all layers add up in it
                values = v_first.detach().float().requires_grad_(torch.is_grad_enabled())
                held = (layer, loss, v_first)
            else:
                yield LossPart(f"layer_{layer}", loss, loss.detach(), count)
        if held is not None:
            layer, loss, v_first = held
            collected = None if values is None else values.grad
            objective = loss if collected is None else loss + (v_first * collected).sum()
            yield LossPart(f"layer_{layer}", objective, loss.detach(), count)


def _frozen(taps):
    """Iterate without recording gradients, though the consumer records them."""
    taps = iter(taps)
    while True:
        with torch.no_grad():
            tap = next(taps, None)
        if tap is None:
            return
        yield tap
