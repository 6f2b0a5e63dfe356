"""Every backend of the recurrences against the fp32 oracle: outputs, states and all gradients.

Shape letters: B batch, T tokens, H heads, N head size.
"""

import functools
import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from gpu_comparison import (
    BACKENDS,
    DEVICE,
    DISPATCH,
    DRY_RUN,
    NEVER_ROUNDED,
    Comparison,
    assert_within_bounds,
    precision_of,
    require,
    rounded,
)
from tolerances import relative_error

from radlads.model.recurrence_reference import gla_reference, rwkv7_reference

pytestmark = pytest.mark.gpu

REFERENCES = {"rwkv7": rwkv7_reference, "gla": gla_reference}
MIN_LOG_DECAY = {"rwkv7": -math.exp(-0.5), "gla": -5.0}
DECAYS = ("hardly any decay", "random decays", "decay limit")  # of the rows of the batch
NUM_HEADS = 2
LENGTHS = (1, 63, 64, 65) if DRY_RUN else (1, 63, 64, 65, 512, 2048)
BOUNDS = {"d kappa": "KERNEL_REMOVAL", "d a": "KERNEL_REMOVAL"}
BOUNDS |= {"d log_w": "KERNEL_DECAY", "d log_w summed": "KERNEL_DECAY_SUM"}
PRECISIONS = ("exact", "tf32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# fla compiles about 15 kernels for every head size and dtype, so it gets fewer
FLA = [(64, 128, "bf16"), (65, 128, "bf16"), (2048, 128, "bf16"), (512, 64, "bf16"), (65, 128, "fp32")]

paths = pytest.mark.parametrize(
    ("kind", "backend"), [(kind, backend) for kind, backends in BACKENDS.items() for backend in backends]
)
states = pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])


def cases():
    """Kind, backend, T, N and dtype; those of one oracle together."""
    for kind, T, N, dtype in product(BACKENDS, LENGTHS, (64, 128), DTYPES):
        for backend in BACKENDS[kind]:
            if backend != "fla" or (T, N, dtype) in FLA:
                yield kind, backend, T, N, dtype


@functools.lru_cache(maxsize=2)
def recurrence_inputs(kind: str, T: int, N: int) -> dict[str, torch.Tensor]:
    """fp32 inputs by name, the rows of the batch as in DECAYS."""
    generator = torch.Generator().manual_seed(1000 * T + N)
    normal = lambda: torch.randn(len(DECAYS), T, NUM_HEADS, N, generator=generator)  # noqa: E731
    uniform = lambda: torch.rand(len(DECAYS), T, NUM_HEADS, N, generator=generator)  # noqa: E731
    decay = uniform()
    decay[0] = (5 * decay[0] - 7).exp()
    decay[2] = 1.0
    inputs = {"r": normal(), "log_w": MIN_LOG_DECAY[kind] * decay, "k": normal(), "v": normal()}
    if kind == "rwkv7":
        inputs |= {"kappa": F.normalize(normal(), dim=-1), "a": uniform()}
    inputs["state"] = torch.randn(len(DECAYS), NUM_HEADS, N, N, generator=generator)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def output_gradients(T: int, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 gradients of the outputs and of the last state."""
    generator = torch.Generator().manual_seed(T + N)
    d_out = torch.randn(len(DECAYS), T, NUM_HEADS, N, generator=generator)
    return d_out.to(DEVICE), torch.randn(len(DECAYS), NUM_HEADS, N, N, generator=generator).to(DEVICE)


@functools.lru_cache(maxsize=2)
def oracle_results(kind: str, T: int, N: int) -> dict[tuple[str, bool], dict[str, torch.Tensor]]:
    """As `results`, of the oracle, by precision of what goes in and out, and by whether there is a first state.

    One batch holds them all, because 2048 steps take a GPU as long for few rows as for many.
    """
    choices = list(product(PRECISIONS, (True, False)))
    d_out, d_state = output_gradients(T, N)
    leaves = {
        name: torch.cat([_seen_as(name, x, *choice) for choice in choices]).requires_grad_()
        for name, x in recurrence_inputs(kind, T, N).items()
    }
    out, state = REFERENCES[kind](*leaves.values())
    d_outs = torch.cat([rounded(d_out, precision) for precision, _ in choices])
    torch.autograd.backward([out, state], [d_outs, torch.cat([d_state] * len(choices))])
    found = {"out": out.detach(), "last state": state.detach()} | {f"d {name}": x.grad for name, x in leaves.items()}
    parts = {name: x.split(len(DECAYS)) for name, x in found.items()}
    return {
        (precision, with_state): {
            name: rows[index] if name in ("last state", "d log_w", "d state") else rounded(rows[index], precision)
            for name, rows in parts.items()
            if with_state or name != "d state"
        }
        for index, (precision, with_state) in enumerate(choices)
    }


def _seen_as(name: str, x: torch.Tensor, precision: str, with_state: bool) -> torch.Tensor:
    if name == "state":
        return x if with_state else torch.zeros_like(x)
    return x if name in NEVER_ROUNDED else rounded(x, precision)


def cast_inputs(kind: str, T: int, N: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a kernel is given: decays and state fp32, all else in `dtype`."""
    inputs = recurrence_inputs(kind, T, N)
    return {name: x.clone() if name in NEVER_ROUNDED else x.clone().to(dtype) for name, x in inputs.items()}


def results(kind: str, backend: str, T: int, N: int, dtype: torch.dtype, with_state: bool) -> dict[str, torch.Tensor]:
    """A backend's outputs ("out", "last state") and the gradient of every input ("d r", ...)."""
    leaves = {name: x.requires_grad_() for name, x in cast_inputs(kind, T, N, dtype).items()}
    if not with_state:
        del leaves["state"]
    out, state = DISPATCH[kind](*leaves.values(), backend=backend)
    d_out, d_state = output_gradients(T, N)
    torch.autograd.backward([out, state], [d_out.to(dtype), d_state])
    assert out.dtype == dtype and state.dtype == torch.float32
    assert all(x.grad.dtype == x.dtype for x in leaves.values())
    return {"out": out.detach(), "last state": state.detach()} | {f"d {name}": x.grad for name, x in leaves.items()}


def comparisons(kind, backend, T, N, precision, with_state, found):
    """Of `results` with the oracle, row by row; rounding is the worst that it does to any of them.

    The scale is at least 1, because some gradients are 0; that of log w is a difference of terms like k * d k.
    """
    oracle = oracle_results(kind, T, N)
    found, exact, by_rounding = map(_with_sums, (found, oracle["exact", with_state], oracle[precision, with_state]))
    terms = recurrence_inputs(kind, T, N)["k"] * exact["d k"]
    scale = lambda name, row: max(1.0, terms[row].abs().max().item()) if "d log_w" in name else 1.0  # noqa: E731
    errors = {
        (name, row): [relative_error(x[name][row], exact[name][row], scale(name, row)) for x in (found, by_rounding)]
        for name, row in product(found, range(len(DECAYS)))
    }
    rounding = max(by_rounding for _, by_rounding in errors.values())
    for (name, row), (error, _) in errors.items():
        where = f"{name}, T {T}, N {N}, {DECAYS[row]}, {'a' if with_state else 'no'} state"
        yield Comparison(
            BOUNDS.get(name, "KERNEL"), f"{kind} {backend}, {precision}", where, precision, error, rounding
        )


def _with_sums(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Also the sum of d log_w over tokens, which decay parameters get: small errors of one sign would add up in it."""
    return found | ({"d log_w summed": found["d log_w"].sum(1, keepdim=True)} if "d log_w" in found else {})


@pytest.mark.parametrize(("kind", "backend", "T", "N", "dtype"), list(cases()))
@states
def test_kernels_are_the_oracle(kind, backend, T, N, dtype, with_state):
    require(backend)
    found = results(kind, backend, T, N, DTYPES[dtype], with_state)
    precision = precision_of(backend, DTYPES[dtype])
    assert_within_bounds(list(comparisons(kind, backend, T, N, precision, with_state, found)))


@paths
@pytest.mark.parametrize("boundaries", [(1,), (64,), (16, 17, 63)], ids=str)
def test_pieces_with_carried_state_are_the_oracle(kind, backend, boundaries):
    require(backend)
    T, N = 65, 128
    *tokens, state = cast_inputs(kind, T, N, torch.bfloat16).values()
    outs = []
    for start, stop in pairwise((0, *boundaries, T)):
        out, state = DISPATCH[kind](*(x[:, start:stop] for x in tokens), state, backend=backend)
        outs.append(out)
    found = {"out": torch.cat(outs, dim=1), "last state": state}
    assert_within_bounds(list(comparisons(kind, backend, T, N, "bf16", True, found)))


@paths
def test_padding_leaves_the_state_bit_equal(kind, backend):
    require(backend)
    inputs = cast_inputs(kind, 65, 128, torch.bfloat16)
    for name in {"log_w", "v", "a"} & set(inputs):
        inputs[name].zero_()
    assert torch.equal(DISPATCH[kind](*inputs.values(), backend=backend)[1], inputs["state"])


@paths
def test_rows_and_heads_are_independent(kind, backend):
    """A kernel that reads a neighbour's memory shows here: other numbers there, not one bit changes here."""
    require(backend)
    inputs = cast_inputs(kind, 65, 128, torch.bfloat16)
    out, state = DISPATCH[kind](*inputs.values(), backend=backend)
    for name, x in inputs.items():
        head = x[1, 1] if name == "state" else x[1, :, 1]
        head.copy_(head.flip(0))
    other, other_state = DISPATCH[kind](*inputs.values(), backend=backend)
    assert not torch.equal(other[1, :, 1], out[1, :, 1])
    other[1, :, 1], other_state[1, 1] = out[1, :, 1], state[1, 1]
    assert torch.equal(other, out) and torch.equal(other_state, state)
