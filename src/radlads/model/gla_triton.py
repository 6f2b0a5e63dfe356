"""RAD-RWKV6's recurrence as Triton kernels for CUDA GPUs, forward and backward.

rwkv7_triton.py without removals, by the same three kernels and in the same letters: c the running sum of log w inside a
chunk, its value in the middle taken off, X = r exp(c) what reads the state and Y = k exp(-c) what is written to it. A
chunk of 32 tokens at the largest decay has factors up to exp(80), which bf16 and fp32 hold; where the product of two of
them overflows, it belongs to the future and is masked.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk.
Scratch tensors are [B H, G, L, N], [B H, G, L, L] and [B H, G, N, N]; states are [K, V] = [N, N].
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from .rwkv7_triton import FEW_PROGRAMS, jit, triton

if triton is not None:
    import triton.language as tl

HEAD_SIZES = (64, 128)
# Remote code registers its own copy of the operators beside the installed package's
NAMESPACE = re.sub(r"\W", "_", __name__)


@jit
def _prepare(
    r_ptr, log_w_ptr, k_ptr, end_ptr, reads_ptr, mixes_ptr, writes_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything about a chunk that does not depend on the state: the matrices of `_scan`, in both directions.

    out = reads S + mixes v                 S <- S exp(e) + writes^T v
    dv = writes dS + mixes^T d_out          dS <- dS exp(e) + reads^T d_out
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, i, j = tl.arange(0, N), tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token = ((bh // H * T + g * L) * H + bh % H) * N
    tokens = i * (H * N) + n[None, :]
    real = g * L + i < T
    dtype = r_ptr.dtype.element_ty
    c = tl.cumsum(tl.load(log_w_ptr + first_token + tokens, mask=real, other=0.0), axis=0)
    middle = tl.sum(tl.where(i == L // 2, c, 0.0), axis=0)[None, :]
    end = tl.sum(tl.where(i == L - 1, c, 0.0), axis=0)[None, :]
    c -= middle
    x = (tl.load(r_ptr + first_token + tokens, mask=real, other=0.0).to(tl.float32) * tl.exp(c)).to(dtype)
    y = (tl.load(k_ptr + first_token + tokens, mask=real, other=0.0).to(tl.float32) * tl.exp(-c)).to(dtype)
    chunk, rows = bh * G + g, i * N + n[None, :]
    tl.store(end_ptr + chunk * N + n, tl.reshape(end, (N,)))
    tl.store(reads_ptr + chunk * L * N + rows, (x.to(tl.float32) * tl.exp(middle)).to(dtype))
    tl.store(writes_ptr + chunk * L * N + rows, (y.to(tl.float32) * tl.exp(end - middle)).to(dtype))
    mixes = tl.where(i >= j, tl.dot(x, tl.trans(y), input_precision=PRECISION), 0.0)
    tl.store(mixes_ptr + chunk * L * L + i * L + j, mixes.to(dtype))


@jit
def _scan(
    reads_ptr, mixes_ptr, writes_ptr, end_ptr, in_ptr, first_ptr, out_ptr, last_ptr, states_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry BV value channels of one head's state (or of its gradient, REVERSE) through all chunks, as `_prepare` says.

    KEEP: writes the state met at each chunk, too.
    """
    bh = tl.program_id(1).to(tl.int64)
    n, values = tl.arange(0, N), tl.program_id(0) * BV + tl.arange(0, BV)
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    rows, columns = i * N + n[None, :], j * N + n[:, None]
    square = j * L + i if REVERSE else i * L + j
    tokens = i * (H * N) + values[None, :]
    in_state = n[:, None] * N + values[None, :]
    dtype = in_ptr.dtype.element_ty
    state = tl.zeros((N, BV), tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + bh * N * N + in_state)
    for step in range(0, G):
        g = G - 1 - step if REVERSE else step
        chunk = bh * G + g
        first_token = ((bh // H * T + g * L) * H + bh % H) * N
        real = g * L + i < T
        held = state.to(dtype)
        x = tl.load(in_ptr + first_token + tokens, mask=real, other=0.0)
        y = tl.dot(tl.load(reads_ptr + chunk * L * N + rows), held, input_precision=PRECISION)
        y = tl.dot(tl.load(mixes_ptr + chunk * L * L + square), x, acc=y, input_precision=PRECISION)
        tl.store(out_ptr + first_token + tokens, y.to(dtype), mask=real)
        if KEEP:
            tl.store(states_ptr + chunk * N * N + in_state, held)
        state *= tl.exp(tl.load(end_ptr + chunk * N + n))[:, None]
        state = tl.dot(tl.load(writes_ptr + chunk * L * N + columns), x, acc=state, input_precision=PRECISION)
    tl.store(last_ptr + bh * N * N + in_state, state)


@jit
def _gradients(
    r_ptr, log_w_ptr, k_ptr, v_ptr, d_out_ptr, states_ptr, d_states_ptr, dr_ptr, d_log_w_ptr, dk_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of r, log w and k, for one chunk and BK key channels.

    The gradient of log w is a difference of products that nearly cancel: both take X and Y as rounded for the matrix
    products, and the state at the end as the one at the start and what was written, not as rounded apart from them.
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = bh * G + g
    keys, n = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, N)
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token = ((bh // H * T + g * L) * H + bh % H) * N
    tokens, here = i * (H * N) + n[None, :], i * (H * N) + keys[None, :]
    in_state = keys[None, :] * N + n[:, None]
    real = g * L + i < T
    dtype = r_ptr.dtype.element_ty
    v = tl.load(v_ptr + first_token + tokens, mask=real, other=0.0)
    d_out = tl.load(d_out_ptr + first_token + tokens, mask=real, other=0.0)
    d_mixes = tl.where(i >= j, tl.dot(d_out, tl.trans(v), input_precision=PRECISION), 0.0).to(dtype)
    c = tl.cumsum(tl.load(log_w_ptr + first_token + here, mask=real, other=0.0), axis=0)
    middle = tl.sum(tl.where(i == L // 2, c, 0.0), axis=0)[None, :]
    end = tl.sum(tl.where(i == L - 1, c, 0.0), axis=0)[None, :]
    c -= middle
    shrink, grow = tl.exp(c), tl.exp(-c)
    x = (tl.load(r_ptr + first_token + here, mask=real, other=0.0).to(tl.float32) * shrink).to(dtype)
    y = (tl.load(k_ptr + first_token + here, mask=real, other=0.0).to(tl.float32) * grow).to(dtype)
    start = tl.load(states_ptr + chunk * N * N + in_state)
    d_end = tl.load(d_states_ptr + chunk * N * N + in_state)
    dx = tl.dot(d_out, start, input_precision=PRECISION) * tl.exp(middle)
    dx = tl.dot(d_mixes, y, acc=dx, input_precision=PRECISION)
    tl.store(dr_ptr + first_token + here, (dx * shrink).to(dtype), mask=real)
    dy = tl.dot(v, d_end, input_precision=PRECISION) * tl.exp(end - middle)
    at_end = tl.sum(dy * y.to(tl.float32), axis=0) + tl.sum(
        start.to(tl.float32) * d_end.to(tl.float32), axis=0
    ) * tl.reshape(tl.exp(end), (BK,))
    dy = tl.dot(tl.trans(d_mixes), x, acc=dy, input_precision=PRECISION)
    tl.store(dk_ptr + first_token + here, (dy * grow).to(dtype), mask=real)
    dc = dx * x.to(tl.float32) - dy * y.to(tl.float32) + tl.where(i == L - 1, at_end[None, :], 0.0)
    tl.store(d_log_w_ptr + first_token + here, tl.cumsum(dc, axis=0, reverse=True), mask=real)


class Launch(NamedTuple):
    """How the kernels run for a dtype. chunk: tokens per chunk; values, keys: channels per program of `_scan` and of
    `_gradients`; scan_stages: software pipelining; few: values and stages where there are few sequences and heads."""

    chunk: int
    values: int
    keys: int
    precision: str
    warps: int
    scan_stages: int
    few: tuple[int, int]


# As RAD-RWKV7's, whose kernels these resemble; fp32's products are exact rather than fast
BFLOAT16 = Launch(32, 64, 64, "tf32", 4, 2, (32, 3))
FLOAT32 = Launch(32, 32, 32, "ieee", 4, 1, (32, 1))


class _Chunks:
    """Shapes, scratch memory and launches for one call."""

    def __init__(self, v: torch.Tensor):
        self.like, self.launch = v, BFLOAT16 if v.dtype == torch.bfloat16 else FLOAT32
        self.B, self.T, self.H, self.N = v.shape
        self.L = self.launch.chunk
        self.G = -(-self.T // self.L)

    def scratch(self, *last: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory [B H, G, ...]."""
        return self.like.new_empty((self.B * self.H, self.G, *last), dtype=dtype or self.like.dtype)

    def last_state(self) -> torch.Tensor:
        """Memory for the state after the sequence, [B, H, N, N] fp32."""
        return self.like.new_empty(self.B, self.H, self.N, self.N, dtype=torch.float32)

    def prepare(self, r, log_w, k) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The chunks' reads, mixes, writes and ends."""
        reads, mixes, writes = self.scratch(self.L, self.N), self.scratch(self.L, self.L), self.scratch(self.L, self.N)
        end = self.scratch(self.N, dtype=torch.float32)
        _prepare[(self.G, self.B * self.H)](
            r, log_w, k, end, reads, mixes, writes, self.T, self.G, self.H,
            N=self.N, L=self.L, PRECISION=self.launch.precision, num_warps=self.launch.warps,
        )  # fmt: skip
        return reads, mixes, writes, end

    def scan(self, reads, mixes, writes, end, x, first, *, reverse: bool, keep: bool):
        """Run `_scan` on x: what comes out, the last state and, with `keep`, the states met."""
        out, last, states = torch.empty_like(x), self.last_state(), self.scratch(self.N, self.N) if keep else None
        launch, values, stages = self.launch, min(self.N, self.launch.values), self.launch.scan_stages
        if self.B * self.H * self.N // values < FEW_PROGRAMS:
            values, stages = launch.few
        _scan[(self.N // values, self.B * self.H)](
            reads, mixes, writes, end, x, first, out, last, states, self.T, self.G, self.H,
            N=self.N, L=self.L, BV=values, REVERSE=reverse, HAS_FIRST=first is not None, KEEP=keep,
            PRECISION=launch.precision, num_warps=launch.warps, num_stages=stages,
        )  # fmt: skip
        return out, last, states


def forward(r, log_w, k, v, first):
    """The output [B, T, H, N] and the last state [B, H, N, N] (fp32); arguments as for `gla` below."""
    r, log_w, k, v = (x.contiguous() for x in (r, log_w, k, v))
    chunks = _Chunks(v)
    out, last, _ = chunks.scan(*chunks.prepare(r, log_w, k), v, _contiguous(first), reverse=False, keep=False)
    return out, last


def forward_keeping(r, log_w, k, v, first):
    """What `forward` returns, and what `backward` needs of it: [6 N + L] numbers per token and head."""
    r, log_w, k, v = (x.contiguous() for x in (r, log_w, k, v))
    chunks = _Chunks(v)
    matrices = chunks.prepare(r, log_w, k)
    return *chunks.scan(*matrices, v, _contiguous(first), reverse=False, keep=True), *matrices


def backward(d_out, d_last, r, log_w, k, v, states, reads, mixes, writes, end):
    """Gradients of r, log_w, k, v, and of the first state (fp32)."""
    d_out, r, log_w, k, v = (x.contiguous() for x in (d_out, r, log_w, k, v))
    chunks = _Chunks(v)
    dv, d_first, d_states = chunks.scan(writes, mixes, reads, end, d_out, _contiguous(d_last), reverse=True, keep=True)
    dr, d_log_w, dk = (torch.empty_like(x) for x in (r, log_w, k))
    launch, keys = chunks.launch, min(chunks.N, chunks.launch.keys)
    _gradients[(chunks.G, chunks.B * chunks.H, chunks.N // keys)](
        r, log_w, k, v, d_out, states, d_states, dr, d_log_w, dk, chunks.T, chunks.G, chunks.H,
        N=chunks.N, L=chunks.L, BK=keys, PRECISION=launch.precision, num_warps=launch.warps,
    )  # fmt: skip
    return dr, d_log_w, dk, dv, d_first


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


_INPUTS = "Tensor r, Tensor log_w, Tensor k, Tensor v"
_KEPT = "Tensor states, Tensor reads, Tensor mixes, Tensor writes, Tensor end"


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


_forward = torch.library.custom_op(
    f"{NAMESPACE}::forward", forward, mutates_args=(), schema=f"({_INPUTS}, Tensor? first) -> {_tensors(2)}"
)
_forward_keeping = torch.library.custom_op(
    f"{NAMESPACE}::forward_keeping",
    forward_keeping,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? first) -> {_tensors(7)}",
)
_backward = torch.library.custom_op(
    f"{NAMESPACE}::backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor d_out, Tensor? d_last, {_INPUTS}, {_KEPT}) -> {_tensors(5)}",
)


def _like(x: torch.Tensor) -> torch.Tensor:
    """What stands for a result shaped as x: contiguous, as the kernels' results are."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_forward.register_fake
def _(r, log_w, k, v, first):
    return _like(v), _Chunks(v).last_state()


@_forward_keeping.register_fake
def _(r, log_w, k, v, first):
    chunks = _Chunks(v)
    L, N = chunks.L, chunks.N
    matrices = chunks.scratch(L, N), chunks.scratch(L, L), chunks.scratch(L, N), chunks.scratch(N, dtype=torch.float32)
    return _like(v), chunks.last_state(), chunks.scratch(N, N), *matrices


@_backward.register_fake
def _(d_out, d_last, r, log_w, k, v, states, reads, mixes, writes, end):
    return *(_like(x) for x in (r, log_w, k, v)), _Chunks(v).last_state()


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


def gla(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, state_BHKV=None):
    """RAD-RWKV6 time mixing on a CUDA GPU; out [B, T, H, N] in v's dtype and the fp32 state [B, H, N, N].

    All inputs of one dtype, bfloat16 or float32, log_w float32; ranges as in gla_reference. N is 64 or 128. bfloat16:
    products of bf16 numbers summed in fp32, the state in fp32. Any T, but made for T of a chunk or more.
    """
    inputs = (r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, state_BHKV)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, last, *_ = _forward_keeping(*inputs)
        return out, last
    return _forward(*inputs)
