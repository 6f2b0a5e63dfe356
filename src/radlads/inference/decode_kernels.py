"""Triton kernels of one decoding step of a RAD-RWKV7 stack. Import only where Triton is installed.

Each layer is six launches at one row (project, second low ranks, recurrence, project, project, project) and two more,
the norms, at several. Which kernel does what to which buffer stands in fused_step.py; the equations stand in
model/rad_rwkv7.py. All sums are fp32.

Shape letters: B rows, P rows padded for the tensor cores, N output rows, K input columns, D = heads * head size.
PDL: the kernel is started while those before it still run (programmatic dependent launch). Until gdc_wait() it reads
only weights, the states and slots of the step before, and the tokens counted: ordinary kernels lie between.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from radlads.inference.decode_window import attend_window, load_slots, slot_of

MIN_LOG_DECAY = tl.constexpr(-0.6065306597126334)  # -exp(-1/2)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def weight_rows(first, N: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr):
    """Which weight rows a program multiplies; gated: rows of gate (the first N) and up (the next N) take turns."""
    row = tl.arange(0, BLOCK_N)
    if GATED:
        return (row % 2) * N + first // 2 + row // 2, first // 2 + row // 2 < N
    return first + row, first + row < N


@triton.jit
def project_one_row(
    x_ptr,
    w_ptr,
    bias_ptr,
    norm_ptr,
    out_ptr,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[n] = sum_k w[n, k] rms_norm(x)[k] + bias[n], or silu(gate) * up of two such sums, or added to out.

    The norm's factor 1/rms is applied to the sums, so that x is read once. The next weights are loaded one block ahead.
    """
    rows, exists = weight_rows(tl.program_id(0) * BLOCK_N, N, BLOCK_N, GATED)
    columns = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    EVEN: tl.constexpr = K % BLOCK_K == 0 and N % BLOCK_N == 0
    w = load_block(w_ptrs, exists[:, None] & (columns < K)[None, :], EVEN)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        now = w
        if start + BLOCK_K < K:
            w_ptrs += BLOCK_K
            w = load_block(w_ptrs, exists[:, None] & (start + BLOCK_K + columns < K)[None, :], EVEN)
        x = tl.load(x_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        sums += now.to(tl.float32) * x[None, :]
    y = tl.sum(sums, axis=1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=exists, other=0.0).to(tl.float32)
    if GATED:
        gate, up = tl.split(tl.reshape(y, [BLOCK_N // 2, 2]))
        y = gate * sigmoid(gate) * up
        rows = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        exists = rows < N
    if ADD:
        y += tl.load(out_ptr + rows, mask=exists, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def load_block(ptrs, mask, EVEN: tl.constexpr):
    """Weights, each read once a step and therefore first to leave the L2."""
    if EVEN:
        return tl.load(ptrs, eviction_policy="evict_first")
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def project_rows(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    B,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[split, b, n] = sum over a split's share of k of x[b, k] w[n, k]; with one split + bias[n], or gated."""
    split = tl.program_id(1)
    rows, exists = weight_rows(tl.program_id(0) * BLOCK_N, N, BLOCK_N, GATED)
    batch = tl.arange(0, P)
    columns = tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = K % (BLOCK_K * SPLITS) == 0 and N % BLOCK_N == 0
    SHARE: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_ptrs = x_ptr + batch[:, None] * K + columns[None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[None, :] * K + columns[:, None]
    sums = tl.zeros([P, BLOCK_N], tl.float32)
    for start in tl.range(split * SHARE, split * SHARE + SHARE, BLOCK_K, num_stages=STAGES):
        inside = start + columns < K
        x = tl.load(x_ptrs + start, mask=(batch < B)[:, None] & inside[None, :], other=0.0)
        w = load_block(w_ptrs + start, exists[None, :] & inside[:, None], EVEN)
        sums = tl.dot(x, w, sums, input_precision="ieee")
    if GATED:
        gate, up = tl.split(tl.reshape(sums, [P, BLOCK_N // 2, 2]))
        y = gate * sigmoid(gate) * up
        rows = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        exists = rows < N
    else:
        y = sums
        if BIAS:
            y += tl.load(bias_ptr + rows, mask=exists, other=0.0).to(tl.float32)[None, :]
    outs = out_ptr + (split * B + batch[:, None]) * N + rows[None, :]
    tl.store(outs, y.to(out_ptr.dtype.element_ty), mask=(batch < B)[:, None] & exists[None, :])


@triton.jit
def add_and_norm(
    hidden_ptr,
    partial_ptr,
    norm_ptr,
    out_ptr,
    eps,
    B,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden[b] += sum over splits of partial[split, b]; out[b] = rms_norm(hidden[b]). SPLITS 0: only the norm."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < C
    hidden = tl.load(hidden_ptr + b * C + columns, mask=inside, other=0.0)
    if SPLITS > 0:
        total = tl.zeros([BLOCK_C], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(partial_ptr + (split * B + b) * C + columns, mask=inside, other=0.0)
        hidden = (hidden.to(tl.float32) + total).to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + b * C + columns, hidden, mask=inside)
    x = hidden.to(tl.float32)
    weight = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight
    tl.store(out_ptr + b * C + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def low_rank_sums(
    low_ptr,
    w_ptr,
    B,
    columns,
    D: tl.constexpr,
    RANK: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[P, BLOCK_D] sums over the rank of activation(low[b, rank]) w[rank, d]; ACTIVATION 0 none, 1 tanh, 2 sigmoid."""
    BLOCK_R: tl.constexpr = 32
    ranks = tl.arange(0, BLOCK_R)
    batch = tl.arange(0, P)
    sums = tl.zeros([BLOCK_R if P == 1 else P, BLOCK_D], tl.float32)
    for start in tl.static_range(0, RANK, BLOCK_R):
        exists = start + ranks < RANK
        w = tl.load(
            w_ptr + (start + ranks)[:, None] * D + columns[None, :],
            mask=exists[:, None] & (columns < D)[None, :],
            other=0.0,
        )
        low = tl.load(
            low_ptr + batch[:, None] * STRIDE + (start + ranks)[None, :],
            mask=(batch < B)[:, None] & exists[None, :],
            other=0.0,
        ).to(tl.float32)
        if ACTIVATION == 1:
            low = tanh(low)
        if ACTIVATION == 2:
            low = sigmoid(low)
        if P == 1:
            sums += tl.trans(low) * w.to(tl.float32)
        else:
            sums = tl.dot(low.to(w.dtype), w, sums, input_precision="ieee")
    if P == 1:
        sums = tl.sum(sums, axis=0)[None, :]
    return sums


@triton.jit
def second_low_ranks(
    low_ptr,
    w2_ptr,
    a2_ptr,
    v2_ptr,
    g2_ptr,
    w0_ptr,
    a0_ptr,
    v0_ptr,
    out_ptr,
    B,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    RANK_W: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_V: tl.constexpr,
    RANK_G: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[kind, b, d], fp32: decay w in (0.545, 1), in-context learning rate, value mix and gate, from low[b, ranks].

    A rank of 0 means that there is none of it (the first layer's value mix, a gate of another type).
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kind = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    y = tl.zeros([P, BLOCK_D], tl.float32)
    if kind == 0:
        y = low_rank_sums(low_ptr, w2_ptr, B, columns, D, RANK_W, STRIDE, 1, P, BLOCK_D)
        y += tl.load(w0_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        y = tl.exp(MIN_LOG_DECAY * sigmoid(y))
    elif kind == 1:
        y = low_rank_sums(low_ptr + RANK_W, a2_ptr, B, columns, D, RANK_A, STRIDE, 0, P, BLOCK_D)
        y = sigmoid(y + tl.load(a0_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :])
    elif kind == 2:
        if RANK_V > 0:
            y = low_rank_sums(low_ptr + RANK_W + RANK_A, v2_ptr, B, columns, D, RANK_V, STRIDE, 0, P, BLOCK_D)
            y = sigmoid(y + tl.load(v0_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :])
    else:
        if RANK_G > 0:
            y = low_rank_sums(low_ptr + RANK_W + RANK_A + RANK_V, g2_ptr, B, columns, D, RANK_G, STRIDE, 2, P, BLOCK_D)
    batch = tl.arange(0, P)
    outs = out_ptr + (kind * B + batch[:, None]) * D + columns[None, :]
    tl.store(outs, y, mask=(batch < B)[:, None] & inside[None, :])


@triton.jit
def rotated(x_ptr, cos_ptr, sin_ptr, N: tl.constexpr, ROPE: tl.constexpr):
    """One head's N channels in fp32, channel pairs (n, n + N/2) rotated by the position's angle."""
    channels = tl.arange(0, N)
    x = tl.load(x_ptr + channels).to(tl.float32)
    if ROPE:
        partner = tl.load(x_ptr + (channels + N // 2) % N).to(tl.float32)
        cos = tl.load(cos_ptr + channels % (N // 2))
        sin = tl.load(sin_ptr + channels % (N // 2))
        x = x * cos + tl.where(channels < N // 2, -partner, partner) * sin
    return x


@triton.jit
def recurrence(
    projected_ptr,
    first_ptr,
    low_ptr,
    k_k_ptr,
    k_a_ptr,
    ln_weight_ptr,
    ln_bias_ptr,
    cos_ptr,
    sin_ptr,
    state_ptr,
    raw_ptr,
    out_ptr,
    keys_ptr,
    values_ptr,
    seen_ptr,
    window_scale_ptr,
    recurrent_scale_ptr,
    B,
    norm_eps,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST_STRIDE: tl.constexpr,
    GATE_OFFSET: tl.constexpr,
    ROPE: tl.constexpr,
    MIX_VALUES: tl.constexpr,
    BALANCED: tl.constexpr,
    GROUP_NORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SLOT_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one row: advance its state [value, key] in place and write its gated output.

    projected[b]: receptance, keys, values (kv heads), ..., full-rank gate at GATE_OFFSET. first[b]: the first layer's.
    low[kind, b]: what second_low_ranks wrote. GATE: 0 none, 1 full rank, 2 low rank. raw[b]: scratch for
    the outputs of BLOCK_V values at a time, which the norm needs all of. WINDOW > 0: the head also attends to the slots
    of keys and values [b, kv heads, WINDOW + SINKS, N], BLOCK_S at a time, and one head of a group puts the token
    there. seen[b]: tokens of the text so far, this one included.
    """
    head, b = tl.program_id(0), tl.program_id(1)
    D: tl.constexpr = H * N
    KV: tl.constexpr = D // GROUPS
    channels = tl.arange(0, N)
    own = b * D + head * N + channels
    parameter = head * N + channels
    values = tl.arange(0, BLOCK_V)
    state_ptrs = state_ptr + (b * H + head).to(tl.int64) * N * N + values[:, None] * N + channels[None, :]
    if BLOCK_V == N:
        state = tl.load(state_ptrs)
    if WINDOW > 0:
        HELD: tl.constexpr = WINDOW + SINKS
        seen = tl.load(seen_ptr + b).to(tl.int32)
        written = slot_of(seen - 1, WINDOW, SINKS)
        slots = (b * (H // GROUPS) + head // GROUPS).to(tl.int64) * HELD * N
        keys_ptr += slots
        values_ptr += slots
        old_k, old_v, is_filled = load_slots(keys_ptr, values_ptr, 0, seen, written, HELD, N, BLOCK_S)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = projected_ptr + b * STRIDE
    kv = head // GROUPS * N
    half = b * (N // 2)
    r = rotated(row + head * N, cos_ptr + half, sin_ptr + half, N, ROPE)
    k = rotated(row + D + kv, cos_ptr + half, sin_ptr + half, N, ROPE)
    v_row = row + D + KV + kv
    if WINDOW > 0:
        # The teacher's queries and keys, which are rotated even where the recurrence's are not
        q = r if ROPE else rotated(row + head * N, cos_ptr + half, sin_ptr + half, N, True)
        new_k = k if ROPE else rotated(row + D + kv, cos_ptr + half, sin_ptr + half, N, True)
        new_k = new_k.to(keys_ptr.dtype.element_ty)
        new_v = tl.load(v_row + channels).to(values_ptr.dtype.element_ty)
        if head % GROUPS == 0:
            tl.store(keys_ptr + written * N + channels, new_k)
            tl.store(values_ptr + written * N + channels, new_v)
        new_k, new_v, q = new_k.to(tl.float32), new_v.to(tl.float32), q * N**-0.5
        soft = attend_window(
            q, new_k, new_v, old_k, old_v, is_filled, keys_ptr, values_ptr, seen, written, HELD, N, BLOCK_S, SLOT_STAGES
        )
    w = tl.load(low_ptr + own)
    a = tl.load(low_ptr + B * D + own)
    if BALANCED:
        removal = k
        k *= 1.0 - w + a
    else:
        removal = k * tl.load(k_k_ptr + parameter).to(tl.float32)
        k *= 1.0 + (a - 1.0) * tl.load(k_a_ptr + parameter).to(tl.float32)
    removal /= tl.maximum(tl.sqrt(tl.sum(removal * removal, axis=0)), 1e-12)
    first_row = first_ptr + b * FIRST_STRIDE + D + KV + kv
    mix_row = low_ptr + (2 * B + b) * D + head * N
    if BLOCK_V == N:
        v = mixed_values(v_row, first_row, mix_row, values, MIX_VALUES)
        state, out = advance(state, r, w, k, v, removal, a)
        tl.store(state_ptrs, state)
    else:
        for start in tl.range(0, N, BLOCK_V, num_stages=STAGES):
            state = tl.load(state_ptrs + start * N)
            v = mixed_values(v_row, first_row, mix_row, start + values, MIX_VALUES)
            state, some = advance(state, r, w, k, v, removal, a)
            tl.store(state_ptrs + start * N, state)
            tl.store(raw_ptr + b * D + head * N + start + values, some)
        tl.debug_barrier()  # other warps wrote what is read here
        out = tl.load(raw_ptr + own)
    if not GROUP_NORM:
        out *= N**-0.5
    else:
        out -= tl.sum(out, axis=0) / N
        out *= tl.rsqrt(tl.sum(out * out, axis=0) / N + norm_eps)
        weight = tl.load(ln_weight_ptr + parameter).to(tl.float32)
        out = out * weight + tl.load(ln_bias_ptr + parameter).to(tl.float32)
    if GATE == 1:
        out *= sigmoid(tl.load(row + GATE_OFFSET + parameter).to(tl.float32))
    if GATE == 2:
        out *= tl.load(low_ptr + 3 * B * D + own)
    if WINDOW > 0:
        out *= tl.load(recurrent_scale_ptr + parameter).to(tl.float32)
        out += tl.load(window_scale_ptr + parameter).to(tl.float32) * soft
    tl.store(out_ptr + own, out.to(out_ptr.dtype.element_ty))


@triton.jit
def mixed_values(v_ptr, first_ptr, mix_ptr, channels, MIX_VALUES: tl.constexpr):
    v = tl.load(v_ptr + channels).to(tl.float32)
    if MIX_VALUES:
        first = tl.load(first_ptr + channels).to(tl.float32)
        v += (first - v) * tl.load(mix_ptr + channels)
    return v


@triton.jit
def advance(state, r, w, k, v, removal, a):
    """The state's rows of some values [V, K] and their outputs [V] after one token."""
    found = tl.sum(state * removal[None, :], axis=1)
    state = state * w[None, :] - found[:, None] * (a * removal)[None, :] + v[:, None] * k[None, :]
    return state, tl.sum(state * r[None, :], axis=1)
