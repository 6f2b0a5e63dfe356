"""RAD-RWKV7's recurrence as Triton kernels for CUDA GPUs, forward and backward.

Owns the kernels and their launch sizes; recurrence.py decides when they run. The chunk algebra is that of Chunked in
recurrence_chunked.py, whose letters are used here: c the running sum of log w inside a chunk, e its value at the end, m
= e / 2 what is taken off c; X what reads the state and Y what is written to it, for outputs (r, k) and for removals
(kappa, b = kappa a); v and u the values written, dq the gradient of what the removals find. A forward pass is two
kernels: `_prepare`, which works on every chunk by itself, and `_scan`, which carries the state through them. A backward
pass carries the state's gradient back by the same `_scan` and then collects (`_gradients`); what both need of the
forward pass is kept, which only activation checkpointing avoids.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk.
Scratch tensors are [B H, G, L, N]; where they have rows for removals and for outputs, [B H, G, 2 L, N or L]. States are
[V, K] = [N, N] in memory and [K, V] in registers.
"""

from __future__ import annotations

from .chunked_kernels import (
    chunk_start,
    decays,
    in_text,
    inverse,
    jit_for_all_sizes,
    last_row,
    load_fp32,
    place_in_sequence,
    place_of_chunk,
    place_of_sequence,
    place_of_state,
    sums_of_rows,
    texts_of_chunk,
    tl,
    where_seen,
)
from .chunked_operators import operator
from .chunked_passes import VALUES, Chunks, Kernels, Launch, Launches


@jit_for_all_sizes
def _prepare(
    r_ptr, log_w_ptr, k_ptr, kappa_ptr, a_ptr, numbers_ptr, chunks_ptr, end_ptr,
    reads_ptr, mixes_ptr, writes_ptr, back_reads_ptr, back_mixes_ptr, back_writes_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything about a chunk that does not depend on the state: the matrices of `_scan`, forward and backward.

    [u; out] = reads S + mixes v      S <- S exp(e) + writes^T [u; v]
    [dq; dv] = back_reads dS + back_mixes d_out      dS <- dS exp(e) + back_writes^T [dq; d_out]
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n, i, j = tl.arange(0, N), tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token, first, last = place_of_chunk(chunks_ptr, bh, g, T, H, N, L)
    tokens = i * (H * N) + n[None, :]
    real = first + i < last
    dtype = r_ptr.dtype.element_ty
    log_w = tl.load(log_w_ptr + first_token + tokens, mask=real, other=0.0)
    c = tl.cumsum(log_w, axis=0)
    end = last_row(c, L)
    c -= 0.5 * end
    # Each fp32 tile is rounded as soon as it is there: many of them do not fit into the registers
    kappa = load_fp32(kappa_ptr + first_token + tokens, real)
    x_k = (kappa * tl.exp(c - log_w)).to(dtype)
    a = load_fp32(a_ptr + first_token + tokens, real)
    y_b = (kappa * a * tl.exp(-c)).to(dtype)
    y_k = (load_fp32(k_ptr + first_token + tokens, real) * tl.exp(-c)).to(dtype)
    x_r = (load_fp32(r_ptr + first_token + tokens, real) * tl.exp(c)).to(dtype)
    chunk, half = bh * G + g, tl.exp(0.5 * end)
    row, column, met, left = texts_of_chunk(numbers_ptr, bh, g, T, H, L)
    reads_by, writes_by = in_text(half, numbers_ptr, row, met, 0.0), in_text(half, numbers_ptr, row, left, 0.0)
    top, square = chunk * 2 * L * N, chunk * 2 * L * L
    bottom, square_bottom = top + L * N, square + L * L
    rows, cell, mirrored = i * N + n[None, :], i * L + j, j * L + i
    tl.store(end_ptr + chunk * N + n, tl.reshape(in_text(end, numbers_ptr, met, left, float("-inf")), (N,)))
    tl.store(writes_ptr + top + rows, (y_b.to(tl.float32) * writes_by).to(dtype))
    tl.store(writes_ptr + bottom + rows, (y_k.to(tl.float32) * writes_by).to(dtype))
    a_kb = where_seen(i > j, tl.dot(x_k, tl.trans(y_b), input_precision=PRECISION), numbers_ptr, row, column)
    solved = inverse(a_kb, L, dtype, PRECISION).to(dtype)
    a_kk = where_seen(i > j, tl.dot(x_k, tl.trans(y_k), input_precision=PRECISION), numbers_ptr, row, column).to(dtype)
    a_rb = where_seen(i >= j, tl.dot(x_r, tl.trans(y_b), input_precision=PRECISION), numbers_ptr, row, column).to(dtype)
    a_rk = where_seen(i >= j, tl.dot(x_r, tl.trans(y_k), input_precision=PRECISION), numbers_ptr, row, column)
    found = (-tl.dot(solved, a_kk, input_precision=PRECISION)).to(dtype)
    seen = (-tl.dot(a_rb, solved, input_precision=PRECISION)).to(dtype)
    values = a_rk + tl.dot(seen, a_kk, input_precision=PRECISION)
    w = tl.dot(solved, x_k, input_precision=PRECISION)
    tl.store(reads_ptr + top + rows, (-w * reads_by).to(dtype))
    tl.store(mixes_ptr + square + cell, found)
    tl.store(mixes_ptr + square_bottom + cell, values.to(dtype))
    w = x_r.to(tl.float32) + tl.dot(seen, x_k, input_precision=PRECISION)
    tl.store(reads_ptr + bottom + rows, (w * reads_by).to(dtype))
    if BACKWARD:
        tl.store(back_mixes_ptr + square + mirrored, seen)
        tl.store(back_mixes_ptr + square_bottom + mirrored, values.to(dtype))
        tl.store(back_writes_ptr + top + rows, (x_k.to(tl.float32) * reads_by).to(dtype))
        tl.store(back_writes_ptr + bottom + rows, (x_r.to(tl.float32) * reads_by).to(dtype))
        w = tl.dot(tl.trans(solved), y_b, input_precision=PRECISION)
        tl.store(back_reads_ptr + top + rows, (-w * writes_by).to(dtype))
        w = y_k.to(tl.float32) + tl.dot(tl.trans(found), y_b, input_precision=PRECISION)
        tl.store(back_reads_ptr + bottom + rows, (w * writes_by).to(dtype))


@jit_for_all_sizes
def _scan(
    reads_ptr, mixes_ptr, writes_ptr, end_ptr, in_ptr, first_ptr, out_ptr, last_ptr, top_ptr, states_ptr,
    ranges_ptr, first_slots_ptr, last_slots_ptr, slot_stride,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry BV value channels of one head's state (or of its gradient, REVERSE) through all chunks, as `_prepare` says.

    Writes the lower rows (out, dv) and the last state; KEEP: the upper rows (u, dq) and the state met at each chunk.
    """
    bh = tl.program_id(1).to(tl.int64)
    sequence, begin, T, first_chunk, G = place_of_sequence(ranges_ptr, bh, T, G, H)
    n, values = tl.arange(0, N), tl.program_id(0) * BV + tl.arange(0, BV)
    i, j = tl.arange(0, 2 * L)[:, None], tl.arange(0, L)[None, :]
    upper = i < L
    rows, columns = i * N + n[None, :], tl.arange(0, 2 * L)[None, :] * N + n[:, None]
    tokens = tl.arange(0, L)[:, None] * (H * N) + values[None, :]
    lower_tokens = (i - L) * (H * N) + values[None, :]
    in_state = values[None, :] * N + n[:, None]
    dtype = in_ptr.dtype.element_ty
    state = tl.zeros((N, BV), tl.float32)
    if first_ptr is not None:
        first_ptr, is_there = place_of_state(first_ptr, first_slots_ptr, slot_stride, bh, sequence, H, N)
        if is_there:
            state = tl.load(first_ptr + in_state)
    for step in range(0, G):
        g = G - 1 - step if REVERSE else step
        chunk, first_token = place_in_sequence(ranges_ptr, bh, begin, first_chunk, g, T, G, H, N, L)
        lower = (i >= L) & (g * L + i - L < T)
        held = state.to(dtype)
        x = tl.load(in_ptr + first_token + tokens, mask=g * L + tl.arange(0, L)[:, None] < T, other=0.0)
        reads = tl.load(reads_ptr + chunk * 2 * L * N + rows)
        mixes = tl.load(mixes_ptr + chunk * 2 * L * L + i * L + j)
        y = tl.dot(reads, held, input_precision=PRECISION)
        y = tl.dot(mixes, x, acc=y, input_precision=PRECISION).to(dtype)
        tl.store(out_ptr + first_token + lower_tokens, y, mask=lower)
        y = tl.where(upper, y, tl.load(in_ptr + first_token + lower_tokens, mask=lower, other=0.0))
        if KEEP:
            tl.store(states_ptr + chunk * N * N + in_state, held)
            tl.store(top_ptr + chunk * L * N + i * N + values[None, :], y, mask=upper)
        state *= tl.exp(tl.load(end_ptr + chunk * N + n))[:, None]
        writes = tl.load(writes_ptr + chunk * 2 * L * N + columns)
        state = tl.dot(writes, y, acc=state, input_precision=PRECISION)
    last_ptr, is_there = place_of_state(last_ptr, last_slots_ptr, slot_stride, bh, sequence, H, N)
    if is_there:
        tl.store(last_ptr + in_state, state)


@jit_for_all_sizes
def _gradients(
    r_ptr, log_w_ptr, k_ptr, v_ptr, kappa_ptr, a_ptr, numbers_ptr, d_out_ptr, u_ptr, dq_ptr, states_ptr, d_states_ptr,
    end_ptr, dr_ptr, d_log_w_ptr, dk_ptr, d_kappa_ptr, da_ptr,
    T, G, H, N: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of everything but v, for one chunk and BK key channels.

    All products with values and states are sums over value channels: one loop takes BV of them at a time, so that a
    multiprocessor's registers are enough for two programs. The gradient of log w is a difference of products that
    nearly cancel: both take X and Y as rounded for the matrix products, and the state at the end as the one at the
    start and what was written, not as rounded apart from them.
    """
    g, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = bh * G + g
    keys, values = tl.program_id(2) * BK + tl.arange(0, BK), tl.arange(0, BV)
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    first_token = chunk_start(bh, g, T, H, N, L)
    tokens, here = i * (H * N) + values[None, :], i * (H * N) + keys[None, :]
    rows, in_state = i * N + values[None, :], values[:, None] * N + keys[None, :]
    real = g * L + i < T
    dtype = r_ptr.dtype.element_ty
    d_rk, d_rb = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    d_kk, d_kb = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    dx_r, dx_k = tl.zeros((L, BK), tl.float32), tl.zeros((L, BK), tl.float32)
    dy_k, dy_b = tl.zeros((L, BK), tl.float32), tl.zeros((L, BK), tl.float32)
    kept = tl.zeros((BV, BK), tl.float32)
    for first in tl.range(0, N, BV, num_stages=2):
        d_out = tl.load(d_out_ptr + first_token + first + tokens, mask=real, other=0.0)
        v = tl.load(v_ptr + first_token + first + tokens, mask=real, other=0.0)
        u = tl.load(u_ptr + chunk * L * N + first + rows)
        dq = tl.load(dq_ptr + chunk * L * N + first + rows)
        start = tl.load(states_ptr + chunk * N * N + first * N + in_state)
        d_end = tl.load(d_states_ptr + chunk * N * N + first * N + in_state)
        d_rk = tl.dot(d_out, tl.trans(v), acc=d_rk, input_precision=PRECISION)
        d_rb = tl.dot(d_out, tl.trans(u), acc=d_rb, input_precision=PRECISION)
        d_kk = tl.dot(dq, tl.trans(v), acc=d_kk, input_precision=PRECISION)
        d_kb = tl.dot(dq, tl.trans(u), acc=d_kb, input_precision=PRECISION)
        dx_r = tl.dot(d_out, start, acc=dx_r, input_precision=PRECISION)
        dx_k = tl.dot(dq, start, acc=dx_k, input_precision=PRECISION)
        dy_k = tl.dot(v, d_end, acc=dy_k, input_precision=PRECISION)
        dy_b = tl.dot(u, d_end, acc=dy_b, input_precision=PRECISION)
        kept += start.to(tl.float32) * d_end.to(tl.float32)

    end = tl.load(end_ptr + chunk * N + keys)[None, :]
    log_w = tl.load(log_w_ptr + first_token + here, mask=real, other=0.0)
    end, half, shrink, grow = decays(log_w, end, numbers_ptr, L, dtype, PRECISION)
    row, column, met, left = texts_of_chunk(numbers_ptr, bh, g, T, H, L)
    reads_by, writes_by = in_text(half, numbers_ptr, row, met, 0.0), in_text(half, numbers_ptr, row, left, 0.0)
    before = tl.exp(sums_of_rows(tl.where(i > j, 0.5, -0.5), log_w, dtype, PRECISION))
    kappa = load_fp32(kappa_ptr + first_token + here, real)
    a = load_fp32(a_ptr + first_token + here, real)
    y_b = (kappa * a * grow).to(dtype)
    y_k = (load_fp32(k_ptr + first_token + here, real) * grow).to(dtype)
    x_r = (load_fp32(r_ptr + first_token + here, real) * shrink).to(dtype)
    x_k = (kappa * before).to(dtype)
    m_rk = where_seen(i >= j, d_rk, numbers_ptr, row, column).to(dtype)
    m_rb = where_seen(i >= j, d_rb, numbers_ptr, row, column).to(dtype)
    m_kk = where_seen(i > j, d_kk, numbers_ptr, row, column).to(dtype)
    m_kb = where_seen(i > j, d_kb, numbers_ptr, row, column).to(dtype)

    dx = tl.dot(m_rk, y_k, acc=dx_r * reads_by, input_precision=PRECISION)
    dx = tl.dot(m_rb, y_b, acc=dx, input_precision=PRECISION)
    tl.store(dr_ptr + first_token + here, (dx * shrink).to(dtype), mask=real)
    dc = dx * x_r.to(tl.float32)
    dx = tl.dot(m_kk, y_k, acc=dx_k * reads_by, input_precision=PRECISION)
    dx = tl.dot(m_kb, y_b, acc=dx, input_precision=PRECISION)
    by_removals = dx * x_k.to(tl.float32)
    d_kappa = dx * before
    dy = dy_k * writes_by
    at_end = dy * y_k.to(tl.float32)
    dy = tl.dot(tl.trans(m_rk), x_r, acc=dy, input_precision=PRECISION)
    dy = tl.dot(tl.trans(m_kk), x_k, acc=dy, input_precision=PRECISION)
    tl.store(dk_ptr + first_token + here, (dy * grow).to(dtype), mask=real)
    dc -= dy * y_k.to(tl.float32)
    dy = dy_b * writes_by
    at_end += dy * y_b.to(tl.float32)
    dy = tl.dot(tl.trans(m_rb), x_r, acc=dy, input_precision=PRECISION)
    dy = tl.dot(tl.trans(m_kb), x_k, acc=dy, input_precision=PRECISION)
    dc -= dy * y_b.to(tl.float32)
    dy *= grow
    tl.store(da_ptr + first_token + here, (dy * kappa).to(dtype), mask=real)
    tl.store(d_kappa_ptr + first_token + here, (d_kappa + dy * a).to(dtype), mask=real)
    at_the_end = tl.sum(at_end, axis=0)[None, :]
    at_the_end += tl.sum(kept, axis=0)[None, :] * in_text(tl.exp(end), numbers_ptr, met, left, 0.0)
    dc += by_removals + tl.where(i == L - 1, at_the_end, 0.0)
    tl.store(d_log_w_ptr + first_token + here, tl.cumsum(dc, axis=0, reverse=True) - by_removals, mask=real)


# By benchmarks/recurrence_sweep.py on an H100, 28 heads of 128. fp32's products are exact rather than fast: it is there
# to be compared with. 64 keys in bf16: 32 were several times slower, and wrong with Triton 3.6 in an earlier form of
# `_gradients`.
BFLOAT16 = Launch(
    chunk=32, precision="tf32", prepare_warps=(2, 4), values=64, scan_warps=4, scan_stages=2, few=(32, 3),
    keys=64, gradient_step=64, gradient_warps=8, gradient_registers=128,
)  # fmt: skip
FLOAT32 = Launch(
    chunk=32, precision="ieee", prepare_warps=(8, 8), values=32, scan_warps=4, scan_stages=1, few=(32, 1),
    keys=32, gradient_step=32, gradient_warps=8, gradient_registers=None,
)  # fmt: skip


class Rwkv7Chunks(Chunks):
    """A call's memory and launches. What is kept: [9 N + 2 L] numbers per token and head."""

    inputs = ("r", "log_w", "k", "v", "kappa", "a")
    met = ("u", "states")
    rows = 2
    kernels = Kernels(_prepare, _scan, _gradients)
    launches = Launches(bfloat16=BFLOAT16, float32=FLOAT32)

    def prepare(self, inputs, *, backward: bool):
        end, ahead = self.ends(), self.matrices()
        back = self.matrices() if backward else (None, None, None)
        self.kernels.prepare[(self.G, self.B * self.H)](
            *inputs[:VALUES], *inputs[VALUES + 1 :], self.numbers, self.chunks, end, *ahead, *back,
            self.T, self.G, self.H,
            N=self.N, L=self.L, BACKWARD=backward, PRECISION=self.launch.precision,
            num_warps=self.launch.prepare_warps[backward],
        )  # fmt: skip
        return end, ahead, back

    def memory_met(self):
        return self.scratch(self.L, self.N), *super().memory_met()


_run, _forward_keeping = operator(__name__, Rwkv7Chunks)


def rwkv7(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, kappa_BTHN, a_BTHN, state_BHVK=None, numbers_BT=None):
    """RAD-RWKV7 time mixing on a CUDA GPU; out [B, T, H, N] in v's dtype and the fp32 state [B, H, N, N].

    All inputs of one dtype, bfloat16 or float32, log_w float32; ranges as in rwkv7_reference. N is 64 or 128.
    bfloat16: products of bf16 numbers summed in fp32, the state in fp32. Any T, but made for T of a chunk or more.
    numbers: int32, of each token's text, growing where another text begins, which sees nothing before it.
    """
    return _run(r_BTHN, log_w_BTHN, k_BTHN, v_BTHN, kappa_BTHN, a_BTHN, numbers_BT, state_BHVK)
