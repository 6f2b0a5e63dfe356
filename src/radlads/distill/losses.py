"""The losses. Each returns a sum over tokens, fp32; dividing by the count is left to whoever has all of the count.

Shape letters: B batch, T tokens, C hidden size, V vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F


def alignment(target_BTC: torch.Tensor, output_BTC: torch.Tensor, kind: Literal["l2", "mse"]) -> torch.Tensor:
    """Distance of a mixer's output from the teacher's attention output, summed over tokens.

    l2: norm over channels times C^-1/2 (the released code's). mse: mean square over channels.
    """
    difference = output_BTC.float() - target_BTC.float()
    if kind == "mse":
        return difference.square().mean(-1).sum()
    return torch.linalg.vector_norm(difference, dim=-1).sum() * difference.shape[-1] ** -0.5


def kl_divergence(teacher_logits_BTV: torch.Tensor, student_logits_BTV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, summed over tokens; 0 for equal logits. Differentiable in the student's, once."""
    return _KLDivergence.apply(teacher_logits_BTV.flatten(0, -2), student_logits_BTV.flatten(0, -2))


class _KLDivergence(torch.autograd.Function):
    """Value and gradient in one pass over blocks of tokens, so that no fp32 copy of all logits exists.

    The gradient by the student's logits is softmax(student) - softmax(teacher).
    """

    BLOCK_TOKENS = 512

    @staticmethod
    def forward(ctx, teacher_logits, student_logits):
        total = torch.zeros((), dtype=torch.float32, device=student_logits.device)
        gradient = torch.empty_like(student_logits) if student_logits.requires_grad else None
        for start in range(0, len(student_logits), _KLDivergence.BLOCK_TOKENS):
            block = slice(start, start + _KLDivergence.BLOCK_TOKENS)
            teacher = F.log_softmax(teacher_logits[block].float(), dim=-1)
            student = F.log_softmax(student_logits[block].float(), dim=-1)
            weight = teacher.exp()
            total += (weight * teacher.sub_(student)).sum()
            if gradient is not None:
                gradient[block] = student.exp_().sub_(weight)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        (gradient,) = ctx.saved_tensors
        return None, gradient * d_total


def cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Next-token loss in nats, summed over tokens; labels of -100 count nothing."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="sum")
