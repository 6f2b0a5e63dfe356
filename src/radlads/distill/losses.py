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
    """KL(teacher || student) in nats, summed over tokens; 0 for equal logits."""
    teacher = F.log_softmax(teacher_logits_BTV.float(), dim=-1)
    student = F.log_softmax(student_logits_BTV.float(), dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Next-token loss in nats, summed over tokens; labels of -100 count nothing."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="sum")
