"""RAD-RWKV7's Triton kernels in the interpreter, in fp32, against the oracle. Run by test_triton_recurrence.py."""

import functools

import pytest
import torch
from interpreter import runtime_loops  # noqa: F401
from tolerances import DECAY_GRADIENT, RECURRENCE, relative_error
from torch.utils.checkpoint import checkpoint

from radlads.model import recurrence, rwkv7_triton
from radlads.model.recurrence_reference import rwkv7_reference

NAMES = ("r", "log_w", "k", "v", "kappa", "a", "state")


pytestmark = pytest.mark.usefixtures("runtime_loops")


def inputs(T, N, *, decay=None):
    """[B, T, H, N] inputs in their ranges and a first state; a constant log decay where one is given."""
    torch.manual_seed(0)
    r, k, v, kappa = (torch.randn(2, T, 2, N) for _ in range(4))
    log_w = -0.6065 * torch.sigmoid(torch.randn(2, T, 2, N)) if decay is None else torch.full_like(r, decay)
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    tensors = [r, log_w, k, v, kappa, torch.sigmoid(torch.randn(2, T, 2, N)), torch.randn(2, 2, N, N)]
    return [tensor.requires_grad_() for tensor in tensors]


def results(recurrence, tensors):
    """Output, last state and the gradients of a fixed function of both."""
    out, state = recurrence(*tensors)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out), torch.linspace(1, -1, state.numel()).view_as(state)
    gradients = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), tensors)
    return {"out": out, "last": state, **dict(zip(NAMES, gradients, strict=True))}


@pytest.mark.parametrize("decay", [None, -0.6065, -1e-4], ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 64), (33, 64), (70, 64), (40, 128)])
def test_kernels_are_the_oracle(T, N, decay):
    expected = results(rwkv7_reference, inputs(T, N, decay=decay))
    for name, found in results(rwkv7_triton.rwkv7, inputs(T, N, decay=decay)).items():
        bound = DECAY_GRADIENT if name == "log_w" else RECURRENCE
        assert relative_error(found, expected[name]) < bound, name


def test_activation_checkpointing_changes_nothing():
    again = functools.partial(checkpoint, rwkv7_triton.rwkv7, use_reentrant=False)
    expected = results(rwkv7_triton.rwkv7, inputs(40, 64))
    for name, found in results(again, inputs(40, 64)).items():
        assert torch.equal(found, expected[name]), name


def test_keys_that_repeat_are_removed_exactly():
    """Removals of one and the same key with full strength: the chunk's triangular system at its worst."""
    tensors = [tensor.detach() for tensor in inputs(64, 64, decay=-1e-4)]
    tensors[4], tensors[5] = tensors[4][:, :1].expand_as(tensors[4]).contiguous(), torch.full_like(tensors[5], 0.999)
    out, _ = rwkv7_triton.rwkv7(*tensors)
    assert relative_error(out, rwkv7_reference(*tensors)[0]) < RECURRENCE


def test_without_gradients_nothing_is_kept():
    tensors = [tensor.detach() for tensor in inputs(40, 64)]
    expected, state = rwkv7_reference(*tensors)
    out, last = rwkv7_triton.rwkv7(*tensors)
    assert relative_error(out, expected) < RECURRENCE and relative_error(last, state) < RECURRENCE
    assert out.grad_fn is None


def test_half_precision_does_not_overflow(monkeypatch):
    """fp16 ends at 65504, which keys of this size, their decay over half a chunk undone, exceed."""
    monkeypatch.setattr(recurrence, "missing", lambda backend, v: None)
    *tensors, state = (tensor.detach() for tensor in inputs(40, 64, decay=-0.6065))
    tensors[2] = 20 * tensors[2]
    half = [tensor if index == 1 else tensor.half() for index, tensor in enumerate(tensors)]
    out, _ = recurrence.rwkv7(*half, state, backend="triton")
    expected, _ = rwkv7_reference(*(tensor.float() for tensor in half), state)
    assert out.dtype == torch.float16 and relative_error(out, expected) < 1e-3
