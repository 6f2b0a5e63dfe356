"""The losses. Each returns a sum over tokens, fp32; dividing by the count is left to whoever has all of the count.

`kl_divergence` and `cross_entropy` take logits; `head_loss` takes hidden states and is how a stage computes both: in it
the logits of all tokens (3 GB in bf16 for 10 000 tokens of a vocabulary of 152 064, per model and copy) never exist.
Shape letters: B batch, T tokens, N tokens of all rows, C hidden size, V vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from radlads.model.modeling import has_triton

# Tokens whose logits exist at a time: enough for matrix products at full speed, 0.6 GB per model in bf16 at V 152 064
BLOCK_TOKENS = 2048
# Tokens that are in fp32 at a time where no kernel does it row by row
SOFTMAX_TOKENS = 256


def alignment(
    target_BTC: torch.Tensor,
    output_BTC: torch.Tensor,
    kind: Literal["l2", "mse"],
    counted_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Distance of a mixer's output from the teacher's attention output, summed over tokens.

    l2: norm over channels times C^-1/2 (the released code's). mse: mean square over channels. counted_BT: False where
    a token does not count; None = all do.
    """
    difference = output_BTC.float() - target_BTC.float()
    scale = 1.0 if kind == "mse" else difference.shape[-1] ** -0.5
    distance_BT = difference.square().mean(-1) if kind == "mse" else torch.linalg.vector_norm(difference, dim=-1)
    if counted_BT is not None:
        distance_BT = distance_BT.masked_fill(~counted_BT, 0.0)
    return distance_BT.sum() * scale


def kl_divergence(teacher_logits_BTV: torch.Tensor, student_logits_BTV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) in nats, summed over tokens; 0 for equal logits."""
    teacher = F.log_softmax(teacher_logits_BTV.float(), dim=-1)
    student = F.log_softmax(student_logits_BTV.float(), dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Next-token loss in nats, summed over tokens; labels of -100 count nothing."""
    return F.cross_entropy(logits_BTV.float().flatten(0, -2), labels_BT.flatten(), reduction="sum")


def head_loss(
    hidden_BTC: torch.Tensor,
    head_VC: torch.Tensor,
    labels_BT: torch.Tensor,
    *,
    teacher_hidden_BTC: torch.Tensor | None = None,
    teacher_head_VC: torch.Tensor | None = None,
    kl_weight: float = 0.0,
    ce_weight: float = 0.0,
    reverse_kl_weight: float = 0.0,
) -> torch.Tensor:
    """kl_weight * KL(teacher || student) + reverse_kl_weight * KL(student || teacher) + ce_weight * cross-entropy of
    the logits hidden @ head^T, summed over tokens.

    Value and gradients in one pass over blocks of tokens; differentiable once, in the student's hidden states and head.
    Products are in the hidden states' dtype, softmaxes in fp32, and the head's gradient adds up in the head's dtype: in
    bf16 that rounds it once per block, which is what adding up micro-batches does too.
    """
    assert (kl_weight == reverse_kl_weight == 0) == (teacher_hidden_BTC is None)
    teacher = None if teacher_hidden_BTC is None else teacher_hidden_BTC.flatten(0, -2)
    labels = labels_BT.flatten() if ce_weight else None
    weights = kl_weight, ce_weight, reverse_kl_weight
    return _HeadLoss.apply(hidden_BTC.flatten(0, -2), head_VC, teacher, teacher_head_VC, labels, *weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, labels, kl_weight, ce_weight, reverse_kl_weight):
        with torch.autocast(hidden.device.type, enabled=False):
            total, *gradients = _by_blocks(
                *(hidden, head, teacher_hidden, teacher_head, labels),
                kl_weight=kl_weight,
                ce_weight=ce_weight,
                reverse_kl_weight=reverse_kl_weight,
                wanted=ctx.needs_input_grad[:2],
            )
        ctx.gradients = gradients
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_total):
        # In place, since the head's gradient is as large as the head; a second backward has nothing left to scale
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(d_total) for gradient in gradients), *[None] * 6


def _by_blocks(hidden, head, teacher_hidden, teacher_head, labels, *, kl_weight, ce_weight, reverse_kl_weight, wanted):
    """The loss, and the gradients of hidden [N, C] and head [V, C] where `wanted`."""
    matrix = head.to(hidden.dtype)
    teacher_matrix = teacher_head if teacher_hidden is None else teacher_head.to(teacher_hidden.dtype)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_head = torch.zeros_like(head) if wanted[1] else None
    weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "reverse_kl_weight": reverse_kl_weight}
    for start in range(0, len(hidden), BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        logits = hidden[block] @ matrix.mT
        teacher_logits = None if teacher_hidden is None else teacher_hidden[block] @ teacher_matrix.mT
        block_labels = None if labels is None else labels[block]
        total += logit_loss_(logits, teacher_logits, block_labels, **weights).sum()
        if d_hidden is not None:
            torch.mm(logits, matrix, out=d_hidden[block])
        if d_head is not None and d_head.dtype == logits.dtype:
            d_head.addmm_(logits.mT, hidden[block])
        elif d_head is not None:
            d_head += logits.mT @ hidden[block]
    return total, d_hidden, d_head


def logit_loss_(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    *,
    kl_weight: float,
    ce_weight: float,
    reverse_kl_weight: float = 0.0,
) -> torch.Tensor:
    """Loss of each token [N], fp32, from logits [N, V]; the student's logits are overwritten by its gradient.

    The loss is kl_weight * KL(teacher || student) + reverse_kl_weight * R + ce_weight * cross-entropy on labels [N],
    -100 counting nothing. R is KL(student || teacher), infinite where the teacher alone excludes a token. The gradient
    is kl_weight * (p - q) + reverse_kl_weight * p (log p - log q - R) + ce_weight * (p - the label's one-hot), p being
    the student's and q the teacher's probabilities.
    """
    if student.is_cuda and has_triton(student.device):
        from radlads.distill import loss_kernels

        weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "reverse_kl_weight": reverse_kl_weight}
        return loss_kernels.logit_loss_(student, teacher, labels, **weights)
    losses = []
    for start in range(0, len(student), SOFTMAX_TOKENS):
        block = slice(start, start + SOFTMAX_TOKENS)
        pair = (None if teacher is None else teacher[block], None if labels is None else labels[block])
        losses.append(_logit_loss_in_torch_(student[block], *pair, kl_weight, ce_weight, reverse_kl_weight))
    return torch.cat(losses) if losses else student.new_zeros(0, dtype=torch.float32)


def _logit_loss_in_torch_(student, teacher, labels, kl_weight, ce_weight, reverse_kl_weight):
    log_p = F.log_softmax(student.float(), dim=-1)
    p = log_p.exp()
    loss, gradient = torch.zeros_like(log_p[:, 0]), torch.zeros_like(p)
    if teacher is not None:
        log_q = F.log_softmax(teacher.float(), dim=-1)
        q = log_q.exp()
        # A token the teacher excludes (q = 0) adds nothing, though its log is -inf
        loss += kl_weight * (q * (log_q - log_p)).masked_fill_(q == 0, 0.0).sum(-1)
        gradient.add_(p - q, alpha=kl_weight)
        if reverse_kl_weight:
            # One that the student excludes adds nothing either
            gap = (log_p - log_q).masked_fill_(p == 0, 0.0)
            reverse = (p * gap).sum(-1)
            loss += reverse_kl_weight * reverse
            gradient.addcmul_(p, gap - reverse.unsqueeze(-1), value=reverse_kl_weight)
    if labels is not None:
        weight = ce_weight * (labels >= 0).float()
        label = labels.clamp(min=0).unsqueeze(-1)
        loss -= weight * log_p.gather(-1, label).squeeze(-1)
        gradient.addcmul_(p, weight.unsqueeze(-1))
        gradient.scatter_add_(-1, label, -weight.unsqueeze(-1))
    student.copy_(gradient)
    return loss
