"""The logit losses of a block of tokens on a GPU: one Triton kernel, two reads of every row. Imports triton."""

import torch
import triton
import triton.language as tl

# 8 elements a thread: one 16-byte load of bf16 each
BLOCK_VOCAB, NUM_WARPS = 2048, 8


def logit_loss_(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    *,
    kl_weight: float,
    ce_weight: float,
    reverse_kl_weight: float = 0.0,
) -> torch.Tensor:
    """As losses.logit_loss_, which says what is computed."""
    num_tokens, vocab_size = student.shape
    loss = torch.empty(num_tokens, dtype=torch.float32, device=student.device)
    if not num_tokens:  # a kernel of no programs cannot be launched
        return loss
    _logit_loss[(num_tokens,)](
        student,
        teacher,
        labels,
        loss,
        vocab_size,
        student.stride(0),
        0 if teacher is None else teacher.stride(0),
        kl_weight,
        ce_weight,
        reverse_kl_weight,
        HAS_TEACHER=teacher is not None,
        HAS_LABELS=labels is not None,
        HAS_REVERSE=reverse_kl_weight != 0,
        BLOCK=BLOCK_VOCAB,
        num_warps=NUM_WARPS,
    )
    return loss


@triton.jit
def _grow(largest, total, x):
    """One step of a running log-sum-exp, each lane on its own."""
    grown = tl.maximum(largest, x)
    return grown, total * tl.exp(largest - grown) + tl.exp(x - grown)


@triton.jit
def _log_sum_exp(largest, total):
    overall = tl.max(largest, axis=0)
    return overall + tl.log(tl.sum(total * tl.exp(largest - overall), axis=0))


@triton.jit
def _grow_gap(gap, before, largest, s, t):
    """One step of the sum of exp(s - largest) (s - t), `before` being the largest until then."""
    share = tl.exp(s - largest)
    return gap * tl.exp(before - largest) + tl.where(share > 0, share * (s - t), 0.0)


@triton.jit
def _mean_gap(gap, total, largest):
    """The mean of s - t under the probabilities of s."""
    scale = tl.exp(largest - tl.max(largest, axis=0))
    return tl.sum(gap * scale, axis=0) / tl.sum(total * scale, axis=0)


@triton.jit
def _norms(
    student_ptr, teacher_ptr, vocab_size, HAS_TEACHER: tl.constexpr, HAS_REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """The log-sum-exp of a row of the student and of the teacher, and KL(student || teacher)."""
    lanes = tl.arange(0, BLOCK)
    # The lowest finite number: -inf - -inf would be NaN in a lane that has seen nothing
    s_largest = tl.full([BLOCK], -3.4e38, tl.float32)
    s_total = tl.zeros([BLOCK], tl.float32)
    t_largest = tl.full([BLOCK], -3.4e38, tl.float32)
    t_total = tl.zeros([BLOCK], tl.float32)
    s_gap = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + lanes < vocab_size
        s = tl.load(student_ptr + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        before = s_largest
        s_largest, s_total = _grow(s_largest, s_total, s)
        if HAS_TEACHER:
            t = tl.load(teacher_ptr + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            t_largest, t_total = _grow(t_largest, t_total, t)
            if HAS_REVERSE:
                s_gap = _grow_gap(s_gap, before, s_largest, s, t)
    s_norm = _log_sum_exp(s_largest, s_total)
    t_norm = _log_sum_exp(t_largest, t_total)
    reverse = 0.0
    if HAS_REVERSE:
        reverse = _mean_gap(s_gap, s_total, s_largest) - s_norm + t_norm
    return s_norm, t_norm, reverse


@triton.jit
def _divergences(log_p, log_q, inside, reverse, kl_weight, reverse_kl_weight, HAS_REVERSE: tl.constexpr):
    """A block's part of kl_weight KL(q || p), and the gradient of it and of reverse_kl_weight KL(p || q), `reverse`."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    # A token the teacher excludes (q = 0) adds nothing, though its log is -inf
    loss = kl_weight * tl.where(inside & (q > 0), q * (log_q - log_p), 0.0)
    gradient = kl_weight * (p - q)
    if HAS_REVERSE:
        gradient += reverse_kl_weight * tl.where(p > 0, p * (log_p - log_q - reverse), 0.0)
    return loss, gradient


@triton.jit
def _logit_loss(
    student_ptr,
    teacher_ptr,
    labels_ptr,
    loss_ptr,
    vocab_size,
    student_stride,
    teacher_stride,
    kl_weight,
    ce_weight,
    reverse_kl_weight,
    HAS_TEACHER: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    if HAS_TEACHER:
        teacher_ptr += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    s_norm, t_norm, reverse = _norms(student_ptr, teacher_ptr, vocab_size, HAS_TEACHER, HAS_REVERSE, BLOCK)
    label = -1
    label_weight = 0.0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        label_weight = tl.where(label >= 0, ce_weight, 0.0)
    losses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + lanes < vocab_size
        log_p = tl.load(student_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32) - s_norm
        gradient = tl.exp(log_p) * label_weight
        if HAS_TEACHER:
            log_q = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32) - t_norm
            loss, change = _divergences(log_p, log_q, inside, reverse, kl_weight, reverse_kl_weight, HAS_REVERSE)
            losses += loss
            gradient += change
        if HAS_LABELS:
            is_label = start + lanes == label
            losses -= tl.where(is_label, label_weight * log_p, 0.0)
            gradient -= tl.where(is_label, label_weight, 0.0)
        tl.store(student_ptr + start + lanes, gradient.to(student_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, tl.sum(losses, axis=0) + reverse_kl_weight * reverse)
