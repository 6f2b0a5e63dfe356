"""The recurrences: fast paths against the oracle, the oracle against the equations, at and inside the decay limits.

Shape letters: B batch, T tokens, H heads, N head size.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import DECAY_GRADIENT, ORACLE, RECURRENCE, relative_error

from radlads.model import recurrence
from radlads.model.recurrence_reference import gla_reference, rwkv7_reference

REFERENCES = {"rwkv7": rwkv7_reference, "gla": gla_reference}
CHUNKED = {"rwkv7": recurrence.rwkv7_chunked, "gla": recurrence.gla_chunked}
DISPATCH = {"rwkv7": recurrence.rwkv7, "gla": recurrence.gla}
MIN_LOG_DECAY = {"rwkv7": -math.exp(-0.5), "gla": -5.0}
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)

kinds = pytest.mark.parametrize("kind", REFERENCES)
decays = pytest.mark.parametrize("at_limit", [False, True], ids=["random_decay", "decay_limit"])
states = pytest.mark.parametrize("with_state", [False, True], ids=["no_state", "state"])


def random_inputs(kind, T, N, at_limit=False, with_state=True, dtype=torch.float32):
    """Inputs of unit scale for two sequences of two heads, the state last."""
    generator = torch.Generator().manual_seed(1000 * T + N)
    normal, uniform = (
        (lambda: torch.randn(2, T, 2, N, generator=generator)),
        torch.rand(2, T, 2, N, generator=generator),
    )
    log_w = MIN_LOG_DECAY[kind] * (torch.ones_like(uniform) if at_limit else uniform)
    inputs = [normal(), log_w, normal(), normal()]
    if kind == "rwkv7":
        inputs += [F.normalize(normal(), dim=-1), torch.rand(2, T, 2, N, generator=generator)]
    inputs.append(torch.randn(2, 2, N, N, generator=generator) if with_state else None)
    return [None if x is None else x.to(dtype) for x in inputs]


def with_gradients(function, inputs):
    """Output, final state, and the gradient of a random combination of both for every input: r, log_w, ..."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    out, state = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    weigh = lambda x: (x * torch.randn(x.shape, generator=generator)).sum()  # noqa: E731
    (weigh(out) + weigh(state)).backward()
    return [out.detach(), state.detach(), *(x.grad for x in leaves if x is not None)]


def assert_same_results(actual, expected):
    """Of with_gradients. The scale is at least 1, because some gradients are 0 (of log_w for T = 1 without state)."""
    for index, (x, y) in enumerate(zip(actual, expected, strict=True)):
        tolerance = DECAY_GRADIENT if index == 3 else RECURRENCE
        assert relative_error(x, y, floor=1.0) < tolerance, f"result {index}"


def equations(kind, r, log_w, k, v, *rest):
    """The paper's equations for one head of one sequence, as row vectors and matrices."""
    *removal, state = rest
    outs = []
    for t in range(len(r)):
        diagonal = torch.diag(log_w[t].exp())
        if kind == "rwkv7":
            kappa, a = (x[t] for x in removal)
            state = state @ (diagonal - kappa[:, None] @ (a * kappa)[None]) + v[t][:, None] @ k[t][None]
            outs.append(state @ r[t])
        else:
            state = diagonal @ state + k[t][:, None] @ v[t][None]
            outs.append(r[t] @ state)
    return torch.stack(outs), state


@kinds
@decays
def test_oracle_is_the_equations(kind, at_limit):
    inputs = random_inputs(kind, 65, 16, at_limit, dtype=torch.float64)
    out, state = REFERENCES[kind](*inputs)
    for b in range(2):
        for h in range(2):
            head = [x[b, :, h] for x in inputs[:-1]] + [inputs[-1][b, h]]
            expected_out, expected_state = equations(kind, *head)
            assert relative_error(out[b, :, h], expected_out) < ORACLE
            assert relative_error(state[b, h], expected_state) < ORACLE


@kinds
@decays
@states
@pytest.mark.parametrize("N", [16, 64])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_is_the_oracle(kind, T, N, at_limit, with_state):
    inputs = random_inputs(kind, T, N, at_limit, with_state)
    assert_same_results(with_gradients(CHUNKED[kind], inputs), with_gradients(REFERENCES[kind], inputs))


@kinds
def test_chunked_is_exact_enough_for_large_keys_at_the_limit(kind):
    """Factors of exp(40) times keys of order 100 must not overflow, nor spoil the gradients."""
    inputs = random_inputs(kind, 65, 16, at_limit=True)
    inputs[0], inputs[2] = 100 * inputs[0], 100 * inputs[2]
    assert_same_results(with_gradients(CHUNKED[kind], inputs), with_gradients(REFERENCES[kind], inputs))


@kinds
@decays
@pytest.mark.parametrize("boundaries", [(1,), (64,), (16, 17), (1, 2, 3, 90), (50, 99)])
def test_splits_with_carried_state(kind, at_limit, boundaries):
    *tokens, state = random_inputs(kind, 100, 16, at_limit)
    expected_out, expected_state = DISPATCH[kind](*tokens, state)
    outs = []
    for start, stop in zip((0, *boundaries), (*boundaries, 100), strict=True):
        out, state = DISPATCH[kind](*(x[:, start:stop] for x in tokens), state)
        outs.append(out)
    assert relative_error(torch.cat(outs, dim=1), expected_out) < RECURRENCE
    assert relative_error(state, expected_state) < RECURRENCE


@kinds
@pytest.mark.parametrize("paths", [CHUNKED, REFERENCES], ids=["chunked", "reference"])
@pytest.mark.parametrize("T", [1, 16, 65])
def test_padding_leaves_the_state_bit_equal(kind, paths, T):
    inputs = random_inputs(kind, T, 16)
    padded = [1, 3] if kind == "gla" else [1, 3, 5]  # log_w, v and, in rwkv7, a
    for index in padded:
        inputs[index] = torch.zeros_like(inputs[index])
    assert torch.equal(paths[kind](*inputs)[1], inputs[-1])


@kinds
def test_single_step_is_the_oracle_and_more_is_chunked(kind, monkeypatch):
    called = []
    for path in ("reference", "chunked"):
        name = f"{kind}_{path}"
        original = getattr(recurrence, name)
        monkeypatch.setattr(
            recurrence, name, lambda *x, path=path, original=original: called.append(path) or original(*x)
        )
    for T in (1, 2):
        DISPATCH[kind](*random_inputs(kind, T, 16))
    assert called == ["reference", "chunked"]


@kinds
def test_output_has_the_values_dtype_and_the_state_is_fp32(kind):
    for T in (1, 5):
        out, state = DISPATCH[kind](*random_inputs(kind, T, 16, with_state=False, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16 and state.dtype == torch.float32


@kinds
def test_fla_on_cpu_is_a_clear_error(kind):
    with pytest.raises(ValueError, match=r"fla backend needs a CUDA GPU.*'auto'"):
        DISPATCH[kind](*random_inputs(kind, 4, 16), backend="fla")
