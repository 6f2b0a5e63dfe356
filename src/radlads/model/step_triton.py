"""One token of either recurrence on a CUDA GPU, on states that lie in the slots of a table and are changed in place.

Safe in a CUDA graph: nothing is read on the host, and a replay reads the slots anew. Equations stand in
recurrence_reference.py.

Shape letters: B rows, H heads, N head size (keys and values).
"""

from __future__ import annotations

import torch

from .chunked_kernels import jit_for_all_sizes, load_fp32, place_of_state, tl
from .chunked_passes import contiguous

# Value channels and warps of a program, whose part of the state stays in registers. Not tuned
VALUES = 32
WARPS = 4


@jit_for_all_sizes
def _rwkv7(
    r_ptr, log_w_ptr, k_ptr, v_ptr, kappa_ptr, a_ptr, out_ptr, states_ptr, slots_ptr, slot_stride,
    H, N: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV value channels of a row's head: its state [V, K] after one token, and their outputs; 0 without a state."""
    bh = tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, N), tl.program_id(0) * BV + tl.arange(0, BV)
    here, there = bh * N + keys, bh * N + values
    states_ptr, real = place_of_state(states_ptr, slots_ptr, slot_stride, bh, bh // H, H, N)
    in_state = values[:, None] * N + keys[None, :]
    state = tl.load(states_ptr + in_state, mask=real, other=0.0)
    kappa = load_fp32(kappa_ptr + here, real)
    written = kappa * load_fp32(a_ptr + here, real)
    found = tl.sum(state * kappa[None, :], axis=1)
    state *= tl.exp(load_fp32(log_w_ptr + here, real))[None, :]
    state += load_fp32(v_ptr + there, real)[:, None] * load_fp32(k_ptr + here, real)[None, :]
    state -= found[:, None] * written[None, :]
    tl.store(states_ptr + in_state, state, mask=real)
    out = tl.sum(state * load_fp32(r_ptr + here, real)[None, :], axis=1)
    tl.store(out_ptr + there, out.to(out_ptr.dtype.element_ty))


@jit_for_all_sizes
def _gla(
    r_ptr, log_w_ptr, k_ptr, v_ptr, out_ptr, states_ptr, slots_ptr, slot_stride, H, N: tl.constexpr, BV: tl.constexpr
):
    """As `_rwkv7`, for states [K, V] from which nothing is removed."""
    bh = tl.program_id(1).to(tl.int64)
    keys, values = tl.arange(0, N), tl.program_id(0) * BV + tl.arange(0, BV)
    here, there = bh * N + keys, bh * N + values
    states_ptr, real = place_of_state(states_ptr, slots_ptr, slot_stride, bh, bh // H, H, N)
    in_state = keys[:, None] * N + values[None, :]
    state = tl.load(states_ptr + in_state, mask=real, other=0.0)
    state *= tl.exp(load_fp32(log_w_ptr + here, real))[:, None]
    state += load_fp32(k_ptr + here, real)[:, None] * load_fp32(v_ptr + there, real)[None, :]
    tl.store(states_ptr + in_state, state, mask=real)
    out = tl.sum(load_fp32(r_ptr + here, real)[:, None] * state, axis=0)
    tl.store(out_ptr + there, out.to(out_ptr.dtype.element_ty))


KERNELS = {"rwkv7": _rwkv7, "gla": _gla}


def step(kind: str, tensors, states: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """The outputs [B, H, N] of one token of each row, in v's dtype, from tensors [B, H, N] as the recurrence of this
    kind takes them, bfloat16 or float32, log w float32.

    slots: integers [B], where in states [slots, H, N, N] a row's is, which then holds the one after the token. A row of
    a negative slot has none, and outputs of 0. None: states are [B, H, N, N].
    """
    tensors = contiguous(*tensors)
    v = tensors[3]
    B, H, N = v.shape
    out = torch.empty_like(v)
    stride = None if slots is None else states.stride(0)
    KERNELS[kind][(N // VALUES, B * H)](*tensors, out, states, slots, stride, H, N=N, BV=VALUES, num_warps=WARPS)
    return out
