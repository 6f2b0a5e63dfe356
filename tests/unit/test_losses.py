"""Loss laws."""

import pytest
import torch

from radlads.distill.losses import alignment, cross_entropy, kl_divergence


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
