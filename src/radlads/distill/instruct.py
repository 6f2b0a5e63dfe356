"""Stage 4: the student learns how its teacher goes on where the assistant writes, in conversations of both."""

import functools
from collections.abc import Iterator
from typing import Literal

import torch

from radlads.data.chat_rows import flags
from radlads.distill.losses import head_loss
from radlads.distill.stage import LossPart, Trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import call_whole, whole

Divergence = Literal["forward", "reverse", "mixed"]

_WEIGHTS: dict[Divergence, tuple[float, float]] = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "mixed": (0.5, 0.5)}


class Instruct:
    """KL on the tokens that the assistant wrote, in rows of conversations (see data/chat_rows.py), each read by itself.

    KL(teacher || student) on the corpus's own; on those whose last reply the student wrote, if there are any, by
    `divergence`: forward is the same, reverse KL(student || teacher), mixed half of each. Every micro-batch is one pass
    of each model, whatever its conversations, so that all engines can share it out.
    """

    name = "instruct"
    needs_teacher = True

    def __init__(self, *, on_policy: bool, divergence: Divergence = "forward", trainable: Trainable = "all"):
        self._on_policy, self._weights, self.trainable = on_policy, _WEIGHTS[divergence], trainable

    def part_names(self, student: RadladsForCausalLM) -> list[str]:
        """See Stage.part_names."""
        return ["student_rows", "teacher_rows"] if self._on_policy else ["loss"]

    def share(self, student: RadladsForCausalLM) -> float:
        """See Stage.share."""
        return 1.0

    def parts(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, tokens: torch.Tensor
    ) -> Iterator[LossPart]:
        """See Stage.parts. tokens: rows of conversations."""
        assert teacher is not None
        ids, own, begins, by_student = flags(tokens)
        inputs, texts = ids[:, :-1], begins[:, :-1].cumsum(1)
        is_learnt = own[:, 1:] & ~begins[:, 1:]
        masks = is_learnt & ~by_student[:, 1:], is_learnt & by_student[:, 1:]
        # The teacher runs first, while the student's activations do not exist yet
        with torch.no_grad():
            taught = _hidden(teacher, inputs, texts, masks)
        hidden = _hidden(student, inputs, texts, masks)
        read_heads = functools.partial(call_whole, student.lm_head, self._losses, hidden, taught)
        with whole(teacher.lm_head):
            off_policy, on_policy = read_heads(teacher.lm_head.weight)
        counts = [len(each) for each in hidden]
        if not self._on_policy:
            yield LossPart("loss", off_policy, off_policy.detach(), counts[0])
            return
        yield LossPart("student_rows", None, on_policy.detach(), counts[1], is_last=False)
        yield LossPart("teacher_rows", off_policy + on_policy, off_policy.detach(), counts[0])

    def _losses(self, head: torch.nn.Module, hidden, taught, teacher_head) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over rows of the corpus, and over those of the student."""
        kinds = list(zip(hidden, taught, (_WEIGHTS["forward"], self._weights), strict=True))
        losses = [
            head_loss(
                own,
                head.weight,  # type: ignore[arg-type]
                own.new_zeros(len(own), dtype=torch.int64),
                teacher_hidden_BTC=others,
                teacher_head_VC=teacher_head,
                kl_weight=forward,
                reverse_kl_weight=reverse,
            )
            for own, others, (forward, reverse) in kinds[: 2 if self._on_policy else 1]
        ]
        return losses[0], losses[-1]


def _hidden(model: RadladsForCausalLM, inputs: torch.Tensor, texts: torch.Tensor, masks) -> list[torch.Tensor]:
    """What the head reads where each mask [B, T] is True, [N, C]. texts: a number for each token, of its text."""
    hidden = model.model(inputs, seq_idx=texts, use_cache=False).last_hidden_state
    return [hidden[mask] for mask in masks]
