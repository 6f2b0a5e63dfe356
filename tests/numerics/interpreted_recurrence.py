"""Our Triton kernels in the interpreter, in fp32, against the oracles. Run by test_triton_kernels.py."""

import functools
import math

import pytest
import torch
from interpreter import runtime_loops  # noqa: F401
from tolerances import DECAY_GRADIENT, RECURRENCE, relative_error
from torch.utils.checkpoint import checkpoint

from radlads.model import gla_triton, recurrence, rwkv7_triton
from radlads.model.recurrence_reference import gla_reference, rwkv7_reference

NAMES = {"rwkv7": ("r", "log_w", "k", "v", "kappa", "a", "state"), "gla": ("r", "log_w", "k", "v", "state")}
KERNELS = {"rwkv7": rwkv7_triton.rwkv7, "gla": gla_triton.gla}
ORACLES = {"rwkv7": rwkv7_reference, "gla": gla_reference}
MIN_LOG_DECAY = {"rwkv7": -math.exp(-0.5), "gla": -5.0}

pytestmark = pytest.mark.usefixtures("runtime_loops")
kinds = pytest.mark.parametrize("kind", KERNELS)


def inputs(kind, T, N, *, decay=1.0):
    """[B, T, H, N] inputs in their ranges and a first state. decay: a share of the strongest; None: random."""
    torch.manual_seed(0)
    normal = lambda: torch.randn(2, T, 2, N)  # noqa: E731
    share = torch.rand(2, T, 2, N) if decay is None else decay
    drawn = {"r": normal(), "log_w": MIN_LOG_DECAY[kind] * share * torch.ones(2, T, 2, N), "k": normal(), "v": normal()}
    if kind == "rwkv7":
        drawn |= {"kappa": torch.nn.functional.normalize(normal(), dim=-1), "a": torch.sigmoid(normal())}
    drawn["state"] = torch.randn(2, 2, N, N)
    return [tensor.requires_grad_() for tensor in drawn.values()]


def results(kind, run, tensors):
    """Output, last state and the gradients of a fixed function of both."""
    out, state = run(*tensors)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out), torch.linspace(1, -1, state.numel()).view_as(state)
    gradients = torch.autograd.grad((out * weights[0]).sum() + (state * weights[1]).sum(), tensors)
    return {"out": out, "last": state, **dict(zip(NAMES[kind], gradients, strict=True))}


@kinds
@pytest.mark.parametrize("decay", [None, 1.0, 1e-4], ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 64), (33, 64), (70, 64), (40, 128)])
def test_kernels_are_the_oracle(kind, T, N, decay):
    expected = results(kind, ORACLES[kind], inputs(kind, T, N, decay=decay))
    for name, found in results(kind, KERNELS[kind], inputs(kind, T, N, decay=decay)).items():
        bound = DECAY_GRADIENT if name == "log_w" else RECURRENCE
        assert relative_error(found, expected[name]) < bound, name


@kinds
def test_activation_checkpointing_changes_nothing(kind):
    again = functools.partial(checkpoint, KERNELS[kind], use_reentrant=False)
    expected = results(kind, KERNELS[kind], inputs(kind, 40, 64))
    for name, found in results(kind, again, inputs(kind, 40, 64)).items():
        assert torch.equal(found, expected[name]), name


@kinds
def test_without_gradients_and_state_nothing_is_kept(kind):
    *tensors, _ = (tensor.detach() for tensor in inputs(kind, 40, 64))
    expected, state = ORACLES[kind](*tensors)
    out, last = KERNELS[kind](*tensors)
    assert relative_error(out, expected) < RECURRENCE and relative_error(last, state) < RECURRENCE
    assert out.grad_fn is None


@kinds
def test_compiling_changes_nothing(kind):
    compiled = torch.compile(lambda *tensors: KERNELS[kind](*tensors), backend="aot_eager", fullgraph=True)
    expected = results(kind, KERNELS[kind], inputs(kind, 40, 64))
    for name, found in results(kind, compiled, inputs(kind, 40, 64)).items():
        assert torch.equal(found, expected[name]), name


def test_keys_that_repeat_are_removed_exactly():
    """Removals of one and the same key with full strength: the chunk's triangular system at its worst."""
    r, log_w, k, v, kappa, a, state = (tensor.detach() for tensor in inputs("rwkv7", 64, 64, decay=1e-4))
    kappa = kappa[:, :1].expand_as(kappa).contiguous()
    tensors = r, log_w, k, v, kappa, torch.full_like(a, 0.999), state
    out, _ = rwkv7_triton.rwkv7(*tensors)
    assert relative_error(out, rwkv7_reference(*tensors)[0]) < RECURRENCE


@kinds
def test_half_precision_does_not_overflow(kind, monkeypatch):
    """fp16 ends at 65504, which keys of this size, their decay over half a chunk undone, exceed."""
    monkeypatch.setattr(recurrence, "missing", lambda backend, v: None)
    *tensors, state = (tensor.detach() for tensor in inputs(kind, 40, 64))
    tensors[2] = 20 * tensors[2]
    half = [tensor if index == 1 else tensor.half() for index, tensor in enumerate(tensors)]
    out, _ = getattr(recurrence, kind)(*half, state, backend="triton")
    expected, _ = ORACLES[kind](*(tensor.float() for tensor in half), state)
    assert out.dtype == torch.float16 and relative_error(out, expected) < 1e-3
