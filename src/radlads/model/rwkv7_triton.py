"""RAD-RWKV7's recurrence as Triton kernels for CUDA GPUs, forward and backward.

Owns the kernels and their launches; recurrence.py decides when they run. The chunk algebra is that of
recurrence.Chunked, whose letters are used here: c the running sum of log w inside a chunk, m its value in the middle,
e at the end; X what reads the state and Y what is written to it, for outputs (r, k) and for removals (kappa,
b = kappa a); v and u the values written, dq the gradient of what the removals find. A forward pass is two kernels:
`_prepare`, which works on every chunk by itself, and `_scan`, which carries the state through them. A backward pass
carries the state's gradient back by the same `_scan` and then collects (`_gradients`); what both need of the forward
pass is kept, which only activation checkpointing avoids.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk.
Scratch tensors are [B H, G, L, N]; where they have rows for removals and for outputs, [B H, G, 2 L, N or L]. States are
[V, K] = [N, N] in memory and [K, V] in registers.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU need neither
    triton = tl = None

HEAD_SIZES = (64, 128)
# Remote code registers its own copy of the operators beside the installed package's
NAMESPACE = re.sub(r"\W", "_", __name__)


def jit(kernel):
    """triton.jit where triton is there."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def _product(x, y, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x y, rounded to dtype before, fp32 after."""
    return tl.dot(x.to(dtype), y.to(dtype), input_precision=PRECISION)


@jit
def _inverse(A, L: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [L, L], fp32, L at most 64.

    By blocks of 4, 16 and 64: each level's remainder E is nilpotent of index 4, so (I + E)^-1 = (I - E)(I + E^2).
    Powers of the whole of A would grow like binomials when keys repeat; those of a level's E stay of order 1.
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    identity = tl.where(i == j, 1.0, 0.0)
    E = tl.where(i // 4 == j // 4, A, 0.0)
    inverse = _product(identity - E, identity + _product(E, E, dtype, PRECISION), dtype, PRECISION)
    for size in tl.static_range(4, 17, 12):
        between = tl.where((i // (4 * size) == j // (4 * size)) & (i // size != j // size), A, 0.0)
        E = _product(inverse, between, dtype, PRECISION)
        level = _product(identity - E, identity + _product(E, E, dtype, PRECISION), dtype, PRECISION)
        inverse = _product(level, inverse, dtype, PRECISION)
    return inverse


@jit
def _prepare(
    r_ptr, log_w_ptr, k_ptr, kappa_ptr, a_ptr, end_ptr,
    reads_ptr, mixes_ptr, writes_ptr, back_reads_ptr, back_mixes_ptr, back_writes_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything about a chunk that does not depend on the state: the matrices of `_scan`, forward and backward.

    [u; out] = reads S + mixes v      S <- S exp(e) + writes^T [u; v]
    [dq; dv] = back_reads dS + back_mixes d_out      dS <- dS exp(e) + back_writes^T [dq; d_out]
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, i, j = tl.arange(0, N), tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    # Large offsets are scalars, those of tiles 32 bits wide: tiles of 64-bit addresses would fill the registers
    first_token = ((bh // H * T + g * L) * H + bh % H) * N
    tokens = i * (H * N) + n[None, :]
    real = g * L + i < T
    dtype = r_ptr.dtype.element_ty
    log_w = tl.load(log_w_ptr + first_token + tokens, mask=real, other=0.0)
    c = tl.cumsum(log_w, axis=0)
    middle = tl.sum(tl.where(i == L // 2, c, 0.0), axis=0)[None, :]
    end = tl.sum(tl.where(i == L - 1, c, 0.0), axis=0)[None, :]
    c -= middle
    # Each fp32 tile is rounded as soon as it is there: many of them do not fit into the registers
    kappa = tl.load(kappa_ptr + first_token + tokens, mask=real, other=0.0).to(tl.float32)
    x_k = (kappa * tl.exp(c - log_w)).to(dtype)
    a = tl.load(a_ptr + first_token + tokens, mask=real, other=0.0).to(tl.float32)
    y_b = (kappa * a * tl.exp(-c)).to(dtype)
    y_k = (tl.load(k_ptr + first_token + tokens, mask=real, other=0.0).to(tl.float32) * tl.exp(-c)).to(dtype)
    x_r = (tl.load(r_ptr + first_token + tokens, mask=real, other=0.0).to(tl.float32) * tl.exp(c)).to(dtype)

    chunk = bh * G + g
    at_middle, to_end = tl.exp(middle), tl.exp(end - middle)
    top, square = chunk * 2 * L * N, chunk * 2 * L * L
    bottom, square_bottom = top + L * N, square + L * L
    rows, cell, mirrored = i * N + n[None, :], i * L + j, j * L + i
    tl.store(end_ptr + chunk * N + n, tl.reshape(end, (N,)))
    tl.store(writes_ptr + top + rows, (y_b.to(tl.float32) * to_end).to(dtype))
    tl.store(writes_ptr + bottom + rows, (y_k.to(tl.float32) * to_end).to(dtype))
    a_kb = tl.where(i > j, tl.dot(x_k, tl.trans(y_b), input_precision=PRECISION), 0.0)
    inverse = _inverse(a_kb, L, dtype, PRECISION).to(dtype)
    a_kk = tl.where(i > j, tl.dot(x_k, tl.trans(y_k), input_precision=PRECISION), 0.0).to(dtype)
    a_rb = tl.where(i >= j, tl.dot(x_r, tl.trans(y_b), input_precision=PRECISION), 0.0).to(dtype)
    a_rk = tl.where(i >= j, tl.dot(x_r, tl.trans(y_k), input_precision=PRECISION), 0.0)
    found = (-tl.dot(inverse, a_kk, input_precision=PRECISION)).to(dtype)
    seen = (-tl.dot(a_rb, inverse, input_precision=PRECISION)).to(dtype)
    values = a_rk + tl.dot(seen, a_kk, input_precision=PRECISION)
    w = tl.dot(inverse, x_k, input_precision=PRECISION)
    tl.store(reads_ptr + top + rows, (-w * at_middle).to(dtype))
    tl.store(mixes_ptr + square + cell, found)
    tl.store(mixes_ptr + square_bottom + cell, values.to(dtype))
    w = x_r.to(tl.float32) + tl.dot(seen, x_k, input_precision=PRECISION)
    tl.store(reads_ptr + bottom + rows, (w * at_middle).to(dtype))
    if BACKWARD:
        tl.store(back_mixes_ptr + square + mirrored, seen)
        tl.store(back_mixes_ptr + square_bottom + mirrored, values.to(dtype))
        tl.store(back_writes_ptr + top + rows, (x_k.to(tl.float32) * at_middle).to(dtype))
        tl.store(back_writes_ptr + bottom + rows, (x_r.to(tl.float32) * at_middle).to(dtype))
        w = tl.dot(tl.trans(inverse), y_b, input_precision=PRECISION)
        tl.store(back_reads_ptr + top + rows, (-w * to_end).to(dtype))
        w = y_k.to(tl.float32) + tl.dot(tl.trans(found), y_b, input_precision=PRECISION)
        tl.store(back_reads_ptr + bottom + rows, (w * to_end).to(dtype))


@jit
def _scan(
    reads_ptr, mixes_ptr, writes_ptr, end_ptr, in_ptr, first_ptr, out_ptr, last_ptr, top_ptr, states_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_TOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry BV value channels of one head's state (or of its gradient, REVERSE) through all chunks, as `_prepare` says.

    Writes the lower rows (out, dv) and the last state; HAS_TOP: the upper rows (u, dq) and the state met at each chunk.
    """
    bh = tl.program_id(1).to(tl.int64)
    n, values = tl.arange(0, N), tl.program_id(0) * BV + tl.arange(0, BV)
    i, j = tl.arange(0, 2 * L)[:, None], tl.arange(0, L)[None, :]
    upper = i < L
    rows, columns = i * N + n[None, :], tl.arange(0, 2 * L)[None, :] * N + n[:, None]
    tokens = tl.arange(0, L)[:, None] * (H * N) + values[None, :]
    lower_tokens = (i - L) * (H * N) + values[None, :]
    in_state = values[None, :] * N + n[:, None]
    dtype = in_ptr.dtype.element_ty
    state = tl.zeros((N, BV), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + bh * N * N + in_state)
    for step in range(0, G):
        g = G - 1 - step if REVERSE else step
        chunk = bh * G + g
        first_token = ((bh // H * T + g * L) * H + bh % H) * N
        lower = (i >= L) & (g * L + i - L < T)
        held = state.to(dtype)
        x = tl.load(in_ptr + first_token + tokens, mask=g * L + tl.arange(0, L)[:, None] < T, other=0.0)
        reads = tl.load(reads_ptr + chunk * 2 * L * N + rows)
        mixes = tl.load(mixes_ptr + chunk * 2 * L * L + i * L + j)
        y = tl.dot(reads, held, input_precision=PRECISION)
        y = tl.dot(mixes, x, acc=y, input_precision=PRECISION).to(dtype)
        tl.store(out_ptr + first_token + lower_tokens, y, mask=lower)
        y = tl.where(upper, y, tl.load(in_ptr + first_token + lower_tokens, mask=lower, other=0.0))
        if HAS_TOP:
            tl.store(states_ptr + chunk * N * N + in_state, held)
            tl.store(top_ptr + chunk * L * N + i * N + values[None, :], y, mask=upper)
        state *= tl.exp(tl.load(end_ptr + chunk * N + n))[:, None]
        writes = tl.load(writes_ptr + chunk * 2 * L * N + columns)
        state = tl.dot(writes, y, acc=state, input_precision=PRECISION)
    tl.store(last_ptr + bh * N * N + in_state, state)


@jit
def _gradients(
    r_ptr, log_w_ptr, k_ptr, v_ptr, kappa_ptr, a_ptr, d_out_ptr, u_ptr, dq_ptr, states_ptr, d_states_ptr,
    dr_ptr, d_log_w_ptr, dk_ptr, d_kappa_ptr, da_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of everything but v, for one chunk and BK key channels.

    The gradient of log w is a difference of products that nearly cancel: both take X and Y as rounded for the matrix
    products, and the state at the end as the one at the start and what was written, not as rounded apart from them.
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = bh * G + g
    keys, n = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, N)
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token = ((bh // H * T + g * L) * H + bh % H) * N
    tokens, here = i * (H * N) + n[None, :], i * (H * N) + keys[None, :]
    rows, in_state = i * N + n[None, :], n[:, None] * N + keys[None, :]
    real = g * L + i < T
    dtype = r_ptr.dtype.element_ty
    v = tl.load(v_ptr + first_token + tokens, mask=real, other=0.0)
    d_out = tl.load(d_out_ptr + first_token + tokens, mask=real, other=0.0)
    u, dq = tl.load(u_ptr + chunk * L * N + rows), tl.load(dq_ptr + chunk * L * N + rows)
    d_rk = tl.where(i >= j, tl.dot(d_out, tl.trans(v), input_precision=PRECISION), 0.0).to(dtype)
    d_rb = tl.where(i >= j, tl.dot(d_out, tl.trans(u), input_precision=PRECISION), 0.0).to(dtype)
    d_kk = tl.where(i > j, tl.dot(dq, tl.trans(v), input_precision=PRECISION), 0.0).to(dtype)
    d_kb = tl.where(i > j, tl.dot(dq, tl.trans(u), input_precision=PRECISION), 0.0).to(dtype)
    log_w = tl.load(log_w_ptr + first_token + here, mask=real, other=0.0)
    c = tl.cumsum(log_w, axis=0)
    middle = tl.sum(tl.where(i == L // 2, c, 0.0), axis=0)[None, :]
    end = tl.sum(tl.where(i == L - 1, c, 0.0), axis=0)[None, :]
    c -= middle
    shrink = tl.exp(c)
    before = tl.exp(c - log_w)
    grow = tl.exp(-c)
    kappa = tl.load(kappa_ptr + first_token + here, mask=real, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + first_token + here, mask=real, other=0.0).to(tl.float32)
    x_k = (kappa * before).to(dtype)
    y_b = (kappa * a * grow).to(dtype)
    y_k = (tl.load(k_ptr + first_token + here, mask=real, other=0.0).to(tl.float32) * grow).to(dtype)
    x_r = (tl.load(r_ptr + first_token + here, mask=real, other=0.0).to(tl.float32) * shrink).to(dtype)
    start = tl.load(states_ptr + chunk * N * N + in_state)
    d_end = tl.load(d_states_ptr + chunk * N * N + in_state)
    at_middle, to_end = tl.exp(middle), tl.exp(end - middle)

    dx = tl.dot(d_out, start, input_precision=PRECISION) * at_middle
    dx = tl.dot(d_rk, y_k, acc=dx, input_precision=PRECISION)
    dx = tl.dot(d_rb, y_b, acc=dx, input_precision=PRECISION)
    tl.store(dr_ptr + first_token + here, (dx * shrink).to(dtype), mask=real)
    dc = dx * x_r.to(tl.float32)
    dx = tl.dot(dq, start, input_precision=PRECISION) * at_middle
    dx = tl.dot(d_kk, y_k, acc=dx, input_precision=PRECISION)
    dx = tl.dot(d_kb, y_b, acc=dx, input_precision=PRECISION)
    by_removals = dx * x_k.to(tl.float32)
    d_kappa = dx * before
    dy = tl.dot(v, d_end, input_precision=PRECISION) * to_end
    at_end = dy * y_k.to(tl.float32)
    dy = tl.dot(tl.trans(d_rk), x_r, acc=dy, input_precision=PRECISION)
    dy = tl.dot(tl.trans(d_kk), x_k, acc=dy, input_precision=PRECISION)
    tl.store(dk_ptr + first_token + here, (dy * grow).to(dtype), mask=real)
    dc -= dy * y_k.to(tl.float32)
    dy = tl.dot(u, d_end, input_precision=PRECISION) * to_end
    at_end += dy * y_b.to(tl.float32)
    dy = tl.dot(tl.trans(d_rb), x_r, acc=dy, input_precision=PRECISION)
    dy = tl.dot(tl.trans(d_kb), x_k, acc=dy, input_precision=PRECISION)
    dc -= dy * y_b.to(tl.float32)
    dy *= grow
    tl.store(da_ptr + first_token + here, (dy * kappa).to(dtype), mask=real)
    tl.store(d_kappa_ptr + first_token + here, (d_kappa + dy * a).to(dtype), mask=real)
    # In slices, because two whole states in fp32 do not fit into the registers
    slices = tl.arange(0, 32)[:, None] * N + keys[None, :]
    kept = tl.zeros((32, BK), tl.float32)
    for first in tl.static_range(0, N, 32):
        part = tl.load(states_ptr + chunk * N * N + first * N + slices).to(tl.float32)
        kept += part * tl.load(d_states_ptr + chunk * N * N + first * N + slices).to(tl.float32)
    at_the_end = tl.sum(at_end, axis=0)[None, :] + tl.sum(kept, axis=0)[None, :] * tl.exp(end)
    dc += by_removals + tl.where(i == L - 1, at_the_end, 0.0)
    tl.store(d_log_w_ptr + first_token + here, tl.cumsum(dc, axis=0, reverse=True) - by_removals, mask=real)


class Launch(NamedTuple):
    """How the kernels run for a dtype. chunk: tokens per chunk; values, keys: channels per program of `_scan` and of
    `_gradients`; prepare_warps: without and with what the backward pass needs; stages: software pipelining of `_scan`;
    few: values and stages where there are few sequences and heads."""

    chunk: int
    values: int
    keys: int
    precision: str
    prepare_warps: tuple[int, int]
    scan_warps: int
    scan_stages: int
    gradient_warps: int
    few: tuple[int, int]


# Measured on an H200 at 28 heads of 128. fp32's products are exact rather than fast: it is there to be compared with.
# 64 keys in bf16: 32 were several times slower, and wrong with Triton 3.6 in an earlier form of `_gradients`.
BFLOAT16 = Launch(32, 64, 64, "tf32", (2, 4), 4, 2, 4, (32, 3))
FLOAT32 = Launch(32, 32, 32, "ieee", (8, 8), 4, 1, 8, (32, 1))
# Programs of `_scan` below which a smaller share of the state for each is quicker
FEW_PROGRAMS = 132


def launch_of(dtype: torch.dtype) -> Launch:
    """The launch for inputs of that dtype."""
    return BFLOAT16 if dtype == torch.bfloat16 else FLOAT32


class _Chunks:
    """Shapes, scratch memory and launches for one call."""

    def __init__(self, v: torch.Tensor):
        self.like, self.launch = v, launch_of(v.dtype)
        self.B, self.T, self.H, self.N = v.shape
        self.L = self.launch.chunk
        self.G = -(-self.T // self.L)

    def scratch(self, *last: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory [B H, G, ...]."""
        shape = (self.B * self.H, self.G, *last)
        return self.like.new_empty(shape, dtype=dtype or self.like.dtype)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Memory for one direction's reads, mixes and writes."""
        return self.scratch(2 * self.L, self.N), self.scratch(2 * self.L, self.L), self.scratch(2 * self.L, self.N)

    def last_state(self) -> torch.Tensor:
        """Memory for the state after the sequence, [B, H, N, N] fp32."""
        return self.like.new_empty(self.B, self.H, self.N, self.N, dtype=torch.float32)

    def prepare(self, r, log_w, k, kappa, a, *, backward: bool):
        """The chunks' ends and the matrices of `_scan`, forward, and with `backward` its own ones too."""
        end, ahead = self.scratch(self.N, dtype=torch.float32), self.matrices()
        back = self.matrices() if backward else (None, None, None)
        _prepare[(self.G, self.B * self.H)](
            r, log_w, k, kappa, a, end, *ahead, *back, self.T, self.G, self.H,
            N=self.N, L=self.L, BACKWARD=backward, PRECISION=self.launch.precision,
            num_warps=self.launch.prepare_warps[backward],
        )  # fmt: skip
        return end, ahead, back

    def scan(self, matrices, end, x, first, *, reverse: bool, keep: bool):
        """Run `_scan` on x: the lower rows, the last state and, with `keep`, the upper rows and the states met."""
        out, last, top, states = torch.empty_like(x), self.last_state(), None, None
        if keep:
            top, states = self.scratch(self.L, self.N), self.scratch(self.N, self.N)
        launch, values, stages = self.launch, min(self.N, self.launch.values), self.launch.scan_stages
        if self.B * self.H * self.N // values < FEW_PROGRAMS:
            values, stages = launch.few
        _scan[(self.N // values, self.B * self.H)](
            *matrices, end, x, first, out, last, top, states, self.T, self.G, self.H,
            N=self.N, L=self.L, BV=values, REVERSE=reverse, HAS_FIRST=first is not None, HAS_TOP=keep,
            PRECISION=launch.precision, num_warps=launch.scan_warps, num_stages=stages,
        )  # fmt: skip
        return out, last, top, states


def forward(r, log_w, k, v, kappa, a, first):
    """The output [B, T, H, N] and the last state [B, H, N, N] (fp32); arguments as for `rwkv7` below."""
    r, log_w, k, v, kappa, a = (x.contiguous() for x in (r, log_w, k, v, kappa, a))
    chunks = _Chunks(v)
    end, ahead, _ = chunks.prepare(r, log_w, k, kappa, a, backward=False)
    out, last, _, _ = chunks.scan(ahead, end, v, _contiguous(first), reverse=False, keep=False)
    return out, last


def forward_keeping(r, log_w, k, v, kappa, a, first):
    """What `forward` returns, and what `backward` needs of it: [9 N + 2 L] numbers per token and head."""
    r, log_w, k, v, kappa, a = (x.contiguous() for x in (r, log_w, k, v, kappa, a))
    chunks = _Chunks(v)
    end, ahead, back = chunks.prepare(r, log_w, k, kappa, a, backward=True)
    return *chunks.scan(ahead, end, v, _contiguous(first), reverse=False, keep=True), end, *back


def backward(d_out, d_last, r, log_w, k, v, kappa, a, u, states, end, reads, mixes, writes):
    """Gradients of r, log_w, k, v, kappa, a, and of the first state (fp32)."""
    d_out, r, log_w, k, v, kappa, a = (x.contiguous() for x in (d_out, r, log_w, k, v, kappa, a))
    chunks = _Chunks(v)
    back = (reads, mixes, writes)
    dv, d_first, dq, d_states = chunks.scan(back, end, d_out, _contiguous(d_last), reverse=True, keep=True)
    dr, dk, d_kappa, da, d_log_w = (torch.empty_like(x) for x in (r, k, kappa, a, log_w))
    launch, keys = chunks.launch, min(chunks.N, chunks.launch.keys)
    _gradients[(chunks.G, chunks.B * chunks.H, chunks.N // keys)](
        r, log_w, k, v, kappa, a, d_out, u, dq, states, d_states, dr, d_log_w, dk, d_kappa, da,
        chunks.T, chunks.G, chunks.H, N=chunks.N, L=chunks.L, BK=keys,
        PRECISION=launch.precision, num_warps=launch.gradient_warps,
    )  # fmt: skip
    return dr, d_log_w, dk, dv, d_kappa, da, d_first


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


_INPUTS = "Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor kappa, Tensor a"
_KEPT = "Tensor u, Tensor states, Tensor end, Tensor reads, Tensor mixes, Tensor writes"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


_forward = torch.library.custom_op(
    f"{NAMESPACE}::forward", forward, mutates_args=(), schema=f"({_INPUTS}, Tensor? first) -> {_tensors(2)}"
)
_forward_keeping = torch.library.custom_op(
    f"{NAMESPACE}::forward_keeping",
    forward_keeping,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? first) -> {_tensors(8)}",
)
_backward = torch.library.custom_op(
    f"{NAMESPACE}::backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor? d_last, {_INPUTS}, {_KEPT}) -> {_tensors(7)}",
)


def _like(x: torch.Tensor) -> torch.Tensor:
    """What stands for a result shaped as x: contiguous, as the kernels' results are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_forward.register_fake
def _(r, log_w, k, v, kappa, a, first):
    return _like(v), _Chunks(v).last_state()


@_forward_keeping.register_fake
def _(r, log_w, k, v, kappa, a, first):
    chunks = _Chunks(v)
    top, states, end = chunks.scratch(chunks.L, chunks.N), chunks.scratch(chunks.N, chunks.N), chunks.scratch(chunks.N)
    return _like(v), chunks.last_state(), top, states, end.float(), *chunks.matrices()


@_backward.register_fake
def _(d_out, d_last, r, log_w, k, v, kappa, a, u, states, end, reads, mixes, writes):
    return *(_like(x) for x in (r, log_w, k, v, kappa, a)), _Chunks(v).last_state()


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1], *output[2:])
    ctx.has_first = inputs[-1] is not None


def _differentiate(ctx, d_out, d_last, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    v = saved[3]
    d_out = torch.zeros_like(v) if d_out is None else d_out
    *gradients, d_first = _backward(d_out, d_last, *saved)
    return *gradients, d_first if ctx.has_first else None


_forward_keeping.register_autograd(_differentiate, setup_context=_save)


def rwkv7(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, kappa_BTHN, a_BTHN, state_BHVK=None):
    """RAD-RWKV7 time mixing on a CUDA GPU; out [B, T, H, N] in v's dtype and the fp32 state [B, H, N, N].

    All inputs of one dtype, bfloat16 or float32, log_w float32; ranges as in rwkv7_reference. N is 64 or 128.
    bfloat16: products of bf16 numbers summed in fp32, the state in fp32. Any T, but made for T of a chunk or more.
    """
    inputs = (r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, kappa_BTHN, a_BTHN, state_BHVK)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, last, *_ = _forward_keeping(*inputs)
        return out, last
    return _forward(*inputs)
