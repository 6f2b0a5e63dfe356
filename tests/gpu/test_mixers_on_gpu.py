"""Recurrent mixers on every backend against the same mixer with the fp32 oracle: outputs, state, all gradients.

In bf16, rounding alone is the same mixer in bf16 with the oracle, behind rounded inputs, as its recurrence.
Shape letters: B batch, T tokens, C hidden size, H heads, N head size.
"""

import functools
import statistics
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from gpu_comparison import (
    BACKENDS,
    DEVICE,
    DRY_RUN,
    Comparison,
    assert_within_bounds,
    kernels,
    mixers_call,
    oracle,
    precision_of,
    require,
)
from tolerances import relative_error

from radlads.model.configuration import RadladsConfig
from radlads.model.contracts import RecurrentState, SharedInputs
from radlads.model.layers import rope_tables
from radlads.model.registry import build_time_mixer

pytestmark = pytest.mark.gpu

HIDDEN_SIZE, NUM_HEADS = 256, 2
BALANCED = {"balance_state": True, "groupnorm_att": False}
NORMED = {"balance_state": False, "groupnorm_att": True}
RWKV6 = {"use_tokenshift": True, "gate_rank_type": 1, "use_rope": False, **BALANCED}
MAIN = {
    "rwkv7-balanced": ("rad_rwkv7", BALANCED),
    "rwkv7-normed": ("rad_rwkv7", NORMED),
    "rwkv6": ("rad_rwkv6", RWKV6),
}
SWITCHED = {
    "rwkv7-balanced-nope-gate0": ("rad_rwkv7", {"use_rope": False, "gate_rank_type": 0, **BALANCED}),
    "rwkv7-normed-nope-gate1": ("rad_rwkv7", {"use_rope": False, "gate_rank_type": 1, **NORMED}),
    "rwkv6-noshift": ("rad_rwkv6", RWKV6 | {"use_tokenshift": False}),
    "rwkv6-gate0": ("rad_rwkv6", RWKV6 | {"gate_rank_type": 0}),
    "rwkv6-gate2": ("rad_rwkv6", RWKV6 | {"gate_rank_type": 2}),
    "rwkv6-rope": ("rad_rwkv6", RWKV6 | {"use_rope": True}),
    "rwkv6-unbalanced": ("rad_rwkv6", RWKV6 | {"balance_state": False}),
    "rwkv6-normed": ("rad_rwkv6", RWKV6 | {"groupnorm_att": True}),
}
VARIANTS = MAIN | SWITCHED
KINDS = {"rad_rwkv7": "rwkv7", "rad_rwkv6": "gla"}
# mixed: fp32 parameters under bf16 autocast; bf16: bf16 parameters. Either way the recurrence multiplies in bf16
MODES = ("fp32", "mixed", "bf16")


def cases():
    """Variant, T, N, with_state, mode and backend; those of one oracle together."""
    shapes = [(*case, mode) for case in product(MAIN, (1, 63, 64, 65), (64, 128), (False, True)) for mode in MODES]
    shapes += [(variant, 65, 64, True, mode) for variant in SWITCHED for mode in MODES]
    if not DRY_RUN:
        shapes += [(variant, 512, 128, True, mode) for variant in MAIN for mode in MODES]
        shapes += [(variant, 2048, 128, True, "mixed") for variant in MAIN]
    for variant, T, N, with_state, mode in shapes:
        for backend in BACKENDS[KINDS[VARIANTS[variant][0]]]:
            # fla compiles for every head size and dtype: test_kernels.py has its fp32
            if backend != "fla" or (mode != "fp32" and T >= 64 and with_state):
                yield variant, T, N, with_state, mode, backend


def build(variant: str, N: int, mode: str):
    """The mixer of the second of three layers with every parameter moved, so that no low-rank factor is zero."""
    name, switches = VARIANTS[variant]
    config = RadladsConfig(
        vocab_size=8,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=3,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=1,
        head_dim=N,
        time_mixers=[name] * 3,
        **switches,
    )
    torch.manual_seed(0)
    mixer = build_time_mixer(config, 1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return config, mixer.to(DEVICE, torch.bfloat16 if mode == "bf16" else torch.float32)


def run(variant: str, T: int, N: int, with_state: bool, mode: str, recurrence) -> dict[str, torch.Tensor]:
    """Output, last state, and the gradients of inputs, first state and parameters, with this recurrence inside."""
    config, mixer = build(variant, N, mode)
    dtype = next(mixer.parameters()).dtype
    generator = torch.Generator().manual_seed(T)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    x, v_first = normal(2, T, HIDDEN_SIZE).to(dtype), normal(2, T, NUM_HEADS, N).to(dtype)
    wkv, shift = normal(2, NUM_HEADS, N, N), normal(2, HIDDEN_SIZE).to(dtype)
    d_y, d_wkv = normal(2, T, HIDDEN_SIZE), normal(2, NUM_HEADS, N, N)
    leaves = {"x": x, "v_first": v_first, "state": wkv, "shift": shift}
    for leaf in leaves.values():
        leaf.requires_grad_()
    state = RecurrentState(wkv, shift) if with_state else None
    shared = SharedInputs(*rope_tables(config, torch.arange(T, device=DEVICE)[None]))
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if mode == "mixed" else nullcontext()
    with mixers_call({KINDS[VARIANTS[variant][0]]: recurrence}):
        with autocast:
            y, last, _ = mixer(x, state, v_first, shared)
        ((y.float() * d_y).sum() + (last.wkv * d_wkv).sum()).backward()
    leaves |= dict(mixer.named_parameters())
    found = {"y": y.detach(), "last state": last.wkv.detach()}
    return found | {f"d {name}": leaf.grad.float() for name, leaf in leaves.items() if leaf.grad is not None}


@functools.lru_cache(maxsize=4)
def run_with_oracle(variant, T, N, with_state, mode, precision):
    return run(variant, T, N, with_state, mode, oracle(KINDS[VARIANTS[variant][0]], precision))


@pytest.mark.parametrize(("variant", "T", "N", "with_state", "mode", "backend"), list(cases()))
def test_mixers_are_those_with_the_oracle(variant, T, N, with_state, mode, backend):
    require(backend)
    kind = KINDS[VARIANTS[variant][0]]
    precision = precision_of(backend, torch.float32 if mode == "fp32" else torch.bfloat16)
    exact = run_with_oracle(variant, T, N, with_state, "fp32", "exact")
    by_rounding = run_with_oracle(variant, T, N, with_state, mode, precision)
    found = run(variant, T, N, with_state, mode, kernels(kind, backend))
    assert found.keys() == exact.keys()
    # Gradients that vanish (of the receptance before a norm, T = 1) are held against a hundredth of the largest
    floor = 1e-2 * max(x.abs().max().item() for name, x in exact.items() if name.startswith("d "))
    errors = {
        name: [
            relative_error(x[name], exact[name], floor if name.startswith("d ") else 0.0) for x in (found, by_rounding)
        ]
        for name in exact
    }
    usual_rounding = statistics.mean(rounding for _, rounding in errors.values())
    comparisons = []
    for name, (error, rounding) in errors.items():
        bound = "MIXER_GRADIENT" if name.startswith("d ") else "MIXER"
        rounding = max(rounding, usual_rounding)  # by chance it can be next to nothing for one result
        where = f"{name}, {variant}, T {T}, N {N}, {'a' if with_state else 'no'} state"
        comparisons.append(Comparison(bound, f"{kind} {backend}, {mode}", where, precision, error, rounding))
    assert_within_bounds(comparisons)
