"""RAD-RWKV6's recurrence as Triton kernels for CUDA GPUs, forward and backward.

rwkv7_triton.py without removals, by the same three kernels and in the same letters: c the running sum of log w inside a
chunk, e its value at the end, m = e / 2 what is taken off c, X = r exp(c) what reads the state and Y = k exp(-c) what
is written to it. A chunk of 32 tokens at the largest decay has factors up to exp(80), which bf16 and fp32 hold; where
the product of two of them overflows, it belongs to the future and is masked.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk.
Scratch tensors are [B H, G, L, N], [B H, G, L, L] and [B H, G, N, N]; states are [K, V] = [N, N].
"""

from __future__ import annotations

from .chunked_kernels import (
    chunk_start,
    decays,
    in_text,
    jit_for_all_sizes,
    last_row,
    load_fp32,
    place_in_sequence,
    place_of_chunk,
    place_of_sequence,
    place_of_state,
    texts_of_chunk,
    tl,
    where_seen,
)
from .chunked_operators import operator
from .chunked_passes import VALUES, Chunks, Kernels, Launch, Launches


@jit_for_all_sizes
def _prepare(
    r_ptr, log_w_ptr, k_ptr, numbers_ptr, chunks_ptr, end_ptr, reads_ptr, mixes_ptr, writes_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything about a chunk that does not depend on the state: the matrices of `_scan`, in both directions.

    out = reads S + mixes v                 S <- S exp(e) + writes^T v
    dv = writes dS + mixes^T d_out          dS <- dS exp(e) + reads^T d_out
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, i, j = tl.arange(0, N), tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token, first, last = place_of_chunk(chunks_ptr, bh, g, T, H, N, L)
    tokens = i * (H * N) + n[None, :]
    real = first + i < last
    dtype = r_ptr.dtype.element_ty
    c = tl.cumsum(tl.load(log_w_ptr + first_token + tokens, mask=real, other=0.0), axis=0)
    end = last_row(c, L)
    half = tl.exp(0.5 * end)
    c -= 0.5 * end
    x = (load_fp32(r_ptr + first_token + tokens, real) * tl.exp(c)).to(dtype)
    y = (load_fp32(k_ptr + first_token + tokens, real) * tl.exp(-c)).to(dtype)
    chunk, rows = bh * G + g, i * N + n[None, :]
    row, column, met, left = texts_of_chunk(numbers_ptr, bh, g, T, H, L)
    reads_by, writes_by = in_text(half, numbers_ptr, row, met, 0.0), in_text(half, numbers_ptr, row, left, 0.0)
    tl.store(end_ptr + chunk * N + n, tl.reshape(in_text(end, numbers_ptr, met, left, float("-inf")), (N,)))
    tl.store(reads_ptr + chunk * L * N + rows, (x.to(tl.float32) * reads_by).to(dtype))
    tl.store(writes_ptr + chunk * L * N + rows, (y.to(tl.float32) * writes_by).to(dtype))
    mixes = where_seen(i >= j, tl.dot(x, tl.trans(y), input_precision=PRECISION), numbers_ptr, row, column)
    tl.store(mixes_ptr + chunk * L * L + i * L + j, mixes.to(dtype))


@jit_for_all_sizes
def _scan(
    reads_ptr, mixes_ptr, writes_ptr, end_ptr, in_ptr, first_ptr, out_ptr, last_ptr, states_ptr,
    ranges_ptr, first_slots_ptr, last_slots_ptr, slot_stride,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry BV value channels of one head's state (or of its gradient, REVERSE) through all chunks, as `_prepare` says.

    KEEP: writes the state met at each chunk, too.
    """
    bh = tl.program_id(1).to(tl.int64)
    sequence, begin, T, first_chunk, G = place_of_sequence(ranges_ptr, bh, T, G, H)
    n, values = tl.arange(0, N), tl.program_id(0) * BV + tl.arange(0, BV)
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    rows, columns = i * N + n[None, :], j * N + n[:, None]
    square = j * L + i if REVERSE else i * L + j
    tokens = i * (H * N) + values[None, :]
    in_state = n[:, None] * N + values[None, :]
    dtype = in_ptr.dtype.element_ty
    state = tl.zeros((N, BV), tl.float32)
    if first_ptr is not None:
        first_ptr, is_there = place_of_state(first_ptr, first_slots_ptr, slot_stride, bh, sequence, H, N)
        if is_there:
            state = tl.load(first_ptr + in_state)
    for step in range(0, G):
        g = G - 1 - step if REVERSE else step
        chunk, first_token = place_in_sequence(ranges_ptr, bh, begin, first_chunk, g, T, G, H, N, L)
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
    last_ptr, is_there = place_of_state(last_ptr, last_slots_ptr, slot_stride, bh, sequence, H, N)
    if is_there:
        tl.store(last_ptr + in_state, state)


@jit_for_all_sizes
def _gradients(
    r_ptr, log_w_ptr, k_ptr, v_ptr, numbers_ptr, d_out_ptr, states_ptr, d_states_ptr, end_ptr,
    dr_ptr, d_log_w_ptr, dk_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of r, log w and k, for one chunk and BK key channels; BV value channels at a time.

    The gradient of log w is a difference of products that nearly cancel: both take X and Y as rounded for the matrix
    products, and the state at the end as the one at the start and what was written, not as rounded apart from them.
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = bh * G + g
    keys, values = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, BV)
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token = chunk_start(bh, g, T, H, N, L)
    tokens, here = i * (H * N) + values[None, :], i * (H * N) + keys[None, :]
    in_state = keys[None, :] * N + values[:, None]
    real = g * L + i < T
    dtype = r_ptr.dtype.element_ty
    d_mixes = tl.zeros((L, L), tl.float32)
    dx, dy = tl.zeros((L, BK), tl.float32), tl.zeros((L, BK), tl.float32)
    kept = tl.zeros((BV, BK), tl.float32)
    for first in tl.range(0, N, BV, num_stages=2):
        v = tl.load(v_ptr + first_token + first + tokens, mask=real, other=0.0)
        d_out = tl.load(d_out_ptr + first_token + first + tokens, mask=real, other=0.0)
        start = tl.load(states_ptr + chunk * N * N + first + in_state)
        d_end = tl.load(d_states_ptr + chunk * N * N + first + in_state)
        d_mixes = tl.dot(d_out, tl.trans(v), acc=d_mixes, input_precision=PRECISION)
        dx = tl.dot(d_out, start, acc=dx, input_precision=PRECISION)
        dy = tl.dot(v, d_end, acc=dy, input_precision=PRECISION)
        kept += start.to(tl.float32) * d_end.to(tl.float32)

    end = tl.load(end_ptr + chunk * N + keys)[None, :]
    log_w = tl.load(log_w_ptr + first_token + here, mask=real, other=0.0)
    end, half, shrink, grow = decays(log_w, end, numbers_ptr, L, dtype, PRECISION)
    row, column, met, left = texts_of_chunk(numbers_ptr, bh, g, T, H, L)
    reads_by, writes_by = in_text(half, numbers_ptr, row, met, 0.0), in_text(half, numbers_ptr, row, left, 0.0)
    x = (load_fp32(r_ptr + first_token + here, real) * shrink).to(dtype)
    y = (load_fp32(k_ptr + first_token + here, real) * grow).to(dtype)
    mixes = where_seen(i >= j, d_mixes, numbers_ptr, row, column).to(dtype)
    dx = tl.dot(mixes, y, acc=dx * reads_by, input_precision=PRECISION)
    tl.store(dr_ptr + first_token + here, (dx * shrink).to(dtype), mask=real)
    dy *= writes_by
    at_end = tl.sum(dy * y.to(tl.float32), axis=0)[None, :]
    at_end += tl.sum(kept, axis=0)[None, :] * in_text(tl.exp(end), numbers_ptr, met, left, 0.0)
    dy = tl.dot(tl.trans(mixes), x, acc=dy, input_precision=PRECISION)
    tl.store(dk_ptr + first_token + here, (dy * grow).to(dtype), mask=real)
    dc = dx * x.to(tl.float32) - dy * y.to(tl.float32) + tl.where(i == L - 1, at_end, 0.0)
    tl.store(d_log_w_ptr + first_token + here, tl.cumsum(dc, axis=0, reverse=True), mask=real)


# By benchmarks/recurrence_sweep.py on an H100, 28 heads of 128. fp32's products are exact rather than fast
BFLOAT16 = Launch(
    chunk=32, precision="tf32", prepare_warps=(4, 4), values=64, scan_warps=4, scan_stages=3, few=(32, 3),
    keys=64, gradient_step=32, gradient_warps=4, gradient_registers=128,
)  # fmt: skip
FLOAT32 = Launch(
    chunk=32, precision="ieee", prepare_warps=(4, 4), values=32, scan_warps=4, scan_stages=1, few=(32, 1),
    keys=32, gradient_step=32, gradient_warps=4, gradient_registers=None,
)  # fmt: skip


class GlaChunks(Chunks):
    """A call's memory and launches. What is kept: [6 N + L] numbers per token and head."""

    inputs = ("r", "log_w", "k", "v")
    met = ("states",)
    rows = 1
    kernels = Kernels(_prepare, _scan, _gradients)
    launches = Launches(bfloat16=BFLOAT16, float32=FLOAT32)

    def prepare(self, inputs, *, backward: bool):
        end, matrices = self.ends(), self.matrices()
        self.kernels.prepare[(self.G, self.B * self.H)](
            *inputs[:VALUES], self.numbers, self.chunks, end, *matrices, self.T, self.G, self.H,
            N=self.N, L=self.L, PRECISION=self.launch.precision, num_warps=self.launch.prepare_warps[backward],
        )  # fmt: skip
        return end, matrices, matrices

    def matrices_back(self, reads, mixes, writes):
        return writes, mixes, reads


_run, _ = operator(__name__, GlaChunks)


def gla(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, state_BHKV=None, numbers_BT=None):
    """RAD-RWKV6 time mixing on a CUDA GPU; out [B, T, H, N] in v's dtype and the fp32 state [B, H, N, N].

    All inputs of one dtype, bfloat16 or float32, log_w float32; ranges as in gla_reference. N is 64 or 128. bfloat16:
    products of bf16 numbers summed in fp32, the state in fp32. Any T, but made for T of a chunk or more.
    numbers: int32, of each token's text, growing where another text begins, which sees nothing before it.
    """
    return _run(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, numbers_BT, state_BHKV)
