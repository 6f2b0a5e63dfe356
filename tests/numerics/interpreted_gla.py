"""RAD-RWKV6's Triton kernels in the interpreter, in fp32, against the oracle. Run by test_triton_recurrence.py."""

import functools

import pytest
import torch
from interpreter import runtime_loops  # noqa: F401
from tolerances import DECAY_GRADIENT, RECURRENCE, relative_error
from torch.utils.checkpoint import checkpoint

from radlads.model import gla_triton
from radlads.model.recurrence_reference import gla_reference

NAMES = ("r", "log_w", "k", "v", "state")

pytestmark = pytest.mark.usefixtures("runtime_loops")


def inputs(T, N, *, decay=None):
    """[B, T, H, N] inputs in their ranges and a first state; a constant log decay where one is given."""
    torch.manual_seed(0)
    r, k, v = (torch.randn(2, T, 2, N) for _ in range(3))
    log_w = -5 * torch.rand(2, T, 2, N) if decay is None else torch.full_like(r, decay)
    return [tensor.requires_grad_() for tensor in (r, log_w, k, v, torch.randn(2, 2, N, N))]


def results(recurrence, tensors):
    """Output, last state and the gradients of a fixed function of both."""
    out, state = recurrence(*tensors)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out), torch.linspace(1, -1, state.numel()).view_as(state)
    gradients = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), tensors)
    return {"out": out, "last": state, **dict(zip(NAMES, gradients, strict=True))}


@pytest.mark.parametrize("decay", [None, -5.0, -1e-4], ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 64), (33, 64), (70, 64), (40, 128)])
def test_kernels_are_the_oracle(T, N, decay):
    expected = results(gla_reference, inputs(T, N, decay=decay))
    for name, found in results(gla_triton.gla, inputs(T, N, decay=decay)).items():
        bound = DECAY_GRADIENT if name == "log_w" else RECURRENCE
        assert relative_error(found, expected[name]) < bound, name


def test_activation_checkpointing_changes_nothing():
    again = functools.partial(checkpoint, gla_triton.gla, use_reentrant=False)
    expected = results(gla_triton.gla, inputs(40, 64))
    for name, found in results(again, inputs(40, 64)).items():
        assert torch.equal(found, expected[name]), name


def test_without_gradients_and_state_nothing_is_kept():
    *tensors, _ = (tensor.detach() for tensor in inputs(40, 64))
    expected, state = gla_reference(*tensors)
    out, last = gla_triton.gla(*tensors)
    assert relative_error(out, expected) < RECURRENCE and relative_error(last, state) < RECURRENCE
    assert out.grad_fn is None
