"""Loss laws."""

import os
import subprocess
import sys

import pytest
import torch
from tolerances import BFLOAT16, relative_error

from radlads.distill import losses
from radlads.distill.losses import alignment, cross_entropy, head_loss, kl_divergence


def logits(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_kl_of_a_distribution_with_itself_is_zero():
    p = logits(2, 5, 11)
    assert abs(kl_divergence(p, p).item()) < 1e-5


def test_kl_is_positive_between_different_distributions_and_not_symmetric():
    p, q = logits(2, 5, 11), 3 * logits(2, 5, 11).flip(-1)
    assert kl_divergence(p, q) > 0.1
    assert abs(kl_divergence(p, q) - kl_divergence(q, p)) > 0.01


def test_kl_by_its_definition():
    p, q = logits(1, 1, 4), 2 * logits(1, 1, 4).flip(-1)
    expected = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum()
    assert kl_divergence(p, q).item() == pytest.approx(expected.item(), abs=1e-5)


def test_shifting_all_logits_changes_nothing():
    p, q = logits(2, 3, 7), logits(2, 3, 7).flip(0)
    assert kl_divergence(p + 5, q - 3).item() == pytest.approx(kl_divergence(p, q).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["l2", "mse"])
def test_alignment_is_zero_only_at_equality_and_adds_up_over_tokens(kind):
    a, b = logits(2, 6, 8), logits(2, 6, 8).flip(-1)
    assert alignment(a, a, kind) == 0
    parts = alignment(a[:, :2], b[:, :2], kind) + alignment(a[:, 2:], b[:, 2:], kind)
    assert parts.item() == pytest.approx(alignment(a, b, kind).item(), rel=1e-5)


def test_alignment_by_its_definition():
    a, b = torch.zeros(1, 2, 16), torch.full((1, 2, 16), 3.0)
    assert alignment(a, b, "l2").item() == pytest.approx(2 * 3.0)
    assert alignment(a, b, "mse").item() == pytest.approx(2 * 9.0)


@pytest.mark.parametrize("split", [1, 3])
def test_logit_losses_add_up_over_splits(split):
    p, q = logits(2, 6, 11), logits(2, 6, 11).flip(-1)
    labels = torch.randint(11, (2, 6))
    whole, head, tail = slice(None), slice(0, split), slice(split, None)
    for loss in (lambda s: kl_divergence(p[:, s], q[:, s]), lambda s: cross_entropy(q[:, s], labels[:, s])):
        assert (loss(head) + loss(tail)).item() == pytest.approx(loss(whole).item(), rel=1e-5)


def test_ignored_labels_count_nothing():
    q, labels = logits(1, 4, 11), torch.tensor([[1, -100, 3, -100]])
    assert cross_entropy(q, labels).item() == pytest.approx(cross_entropy(q[:, ::2], labels[:, ::2]).item(), rel=1e-6)


def test_the_gradient_of_kl_is_student_minus_teacher():
    p, q = logits(1, 3, 5), logits(1, 3, 5).flip(-1).requires_grad_()
    kl_divergence(p, q).backward()
    torch.testing.assert_close(q.grad, q.softmax(-1) - p.softmax(-1), atol=1e-5, rtol=0)


def head_inputs(tokens=(2, 5), channels=8, vocab=11):
    generator = torch.Generator().manual_seed(5)
    shapes = ((*tokens, channels), (vocab, channels), (*tokens, channels), (vocab, channels))
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*shape, generator=generator) for shape in shapes)
    labels = torch.randint(vocab, tokens, generator=generator)
    labels[0, 1] = -100
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels


def plain_loss(hidden, head, teacher_hidden, teacher_head, labels, kl_weight, ce_weight, reverse_kl_weight=0.0):
    logits, taught = hidden @ head.T, teacher_hidden @ teacher_head.T
    both_ways = kl_weight * kl_divergence(taught, logits) + reverse_kl_weight * kl_divergence(logits, taught)
    return both_ways + ce_weight * cross_entropy(logits, labels)


def fused_loss(hidden, head, teacher_hidden, teacher_head, labels, kl_weight, ce_weight, reverse_kl_weight=0.0):
    teacher = {"teacher_hidden_BTC": teacher_hidden, "teacher_head_VC": teacher_head}
    teacher = teacher if kl_weight or reverse_kl_weight else {}
    weights = {"kl_weight": kl_weight, "ce_weight": ce_weight, "reverse_kl_weight": reverse_kl_weight}
    return head_loss(hidden, head, labels, **weights, **teacher)


@pytest.mark.parametrize("block_tokens", [2048, 3])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.25, 0.75), (0.0, 0.0, 1.0), (0.5, 0.25, 0.75)])
def test_the_loss_by_blocks_is_that_of_all_logits(monkeypatch, weights, block_tokens):
    monkeypatch.setattr(losses, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(losses, "SOFTMAX_TOKENS", 2)
    results = []
    for loss_of in (fused_loss, plain_loss):
        inputs = head_inputs()
        loss = loss_of(*inputs, *weights)
        (3 * loss).backward()
        results.append((loss.detach(), inputs[0].grad, inputs[1].grad))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_no_gradients_are_made_without_need():
    hidden, head, *rest = head_inputs()
    fused_loss(hidden, head.detach(), *rest, 1.0, 1.0).backward()
    assert hidden.grad.abs().max() > 0
    with torch.no_grad():
        assert not fused_loss(hidden, head, *rest, 1.0, 1.0).requires_grad


def test_a_students_own_hidden_states_have_no_kl_and_no_gradient():
    hidden, head, _, _, labels = head_inputs()
    loss = fused_loss(hidden, head, hidden.detach(), head.detach(), labels, 1.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert hidden.grad.abs().max() < 1e-6


def test_under_autocast_products_are_bf16_and_the_heads_gradient_fp32(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_TOKENS", 3)
    plain, mixed = head_inputs(), head_inputs()
    fused_loss(*plain, 0.5, 0.5).backward()
    with torch.autocast("cpu", torch.bfloat16):
        fused_loss(mixed[0].bfloat16(), *mixed[1:], 0.5, 0.5).backward()
    assert mixed[1].grad.dtype == torch.float32
    assert 0 < relative_error(mixed[1].grad, plain[1].grad) < BFLOAT16


KERNEL_IN_THE_INTERPRETER = """
import torch
import triton.runtime.interpreter
from interpreter import with_runtime_loops
triton.runtime.interpreter._patch_lang_tensor = with_runtime_loops(triton.runtime.interpreter._patch_lang_tensor)
from radlads.distill import loss_kernels, losses
loss_kernels.BLOCK_VOCAB = 16
torch.manual_seed(0)
for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    for vocab in (7, 16, 37):
        student, teacher = (5 * torch.randn(2, 5, vocab)).to(dtype)
        student[1, 2], teacher[0, 1] = -float("inf"), -float("inf")
        labels = torch.tensor([0, vocab - 1, -100, 3, 2])
        for pair in ((teacher, None), (None, labels), (teacher, labels)):
            if pair[0] is not None:
                student[1, 2] = 0.0
            found, expected = student.clone(), student.clone()
            weights = {"kl_weight": 0.25, "ce_weight": 0.75}
            if pair[0] is not None and vocab > 7:
                weights["reverse_kl_weight"] = 0.5
                teacher[0, 1] = -3.0
                student[1, 2] = found[1, 2] = expected[1, 2] = -float("inf")
            loss = loss_kernels.logit_loss_(found, *pair, **weights)
            torch.testing.assert_close(loss, losses.logit_loss_(expected, *pair, **weights), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found, expected, atol=close, rtol=close)
    same = teacher.clone()
    both = {"kl_weight": 1.0, "reverse_kl_weight": 1.0, "ce_weight": 0.0}
    assert loss_kernels.logit_loss_(same, teacher, None, **both).abs().max() == 0
    assert same.abs().max() == 0
print("equal")
"""


def test_the_kernel_computes_what_torch_does():
    pytest.importorskip("triton")
    interpreted = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", KERNEL_IN_THE_INTERPRETER], env=interpreted, capture_output=True, text=True
    )
    assert run.stdout == "equal\n", run.stderr
