"""The Triton kernels of a recurrent mixer's softmax window, forward and backward; window_triton.py launches them.

A program has one block of queries, or of keys, of one head. It reads keys where they are: new ones in k, held ones in
their slots. Tokens are counted from the first new one, so j < 0 is held, and token j is number seen + j of the text. A
query i sees the tokens near it, i - W < j <= i, and the sinks that are far, j <= i - W, so no token counts twice.

Scores are in base 2, and so is the logarithm that is kept of each query's sum. What far sinks get from each block of
queries is stored by itself and added up before `gradients_of_keys`, so that results do not depend on the order in which
programs run.

Shape letters: B batch, T tokens, H query heads, K key/value heads, G = H / K, N head size, W window, S sinks, M blocks
of queries.
"""

from __future__ import annotations

from .chunked_kernels import jit, jit_for_all_sizes, tl

SINK_TILE = 16
"""Sinks that are read at a time: the least that a product takes."""


@jit
def _seen(seen_ptr, b, HELD: tl.constexpr):
    """Tokens of the text before the first new one."""
    return tl.load(seen_ptr + b).to(tl.int32) if HELD else 0


@jit
def _slot(position, W: tl.constexpr, S: tl.constexpr):
    """The slot of a token, counted from the text's start (HeldWindow)."""
    return tl.where(position < S, position, S + (position - S) % W)


@jit
def _new(b, first, head, T, HEADS, N: tl.constexpr, ROWS: tl.constexpr):
    """Where a head's tokens from `first` on are in [B, T, HEADS, N]: [ROWS, N]. b, and so the start, has 64 bits."""
    rows = tl.arange(0, ROWS)[:, None] * (HEADS * N) + tl.arange(0, N)[None, :]
    return ((b * T + first) * HEADS + head) * N + rows


@jit
def _held(b, head, slots, K, W: tl.constexpr, S: tl.constexpr, N: tl.constexpr):
    """Where slots [ROWS, 1] of one head are in [B, K, S + W, N]: [ROWS, N]."""
    return (b * K + head) * ((S + W) * N) + slots * N + tl.arange(0, N)[None, :]


@jit
def _load_tokens(
    new_ptr, held_ptr, b, first, head, seen, T, K,
    W: tl.constexpr, S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head from token `first` on, [ROWS, N]; 0 where there are none."""
    j = first + tl.arange(0, ROWS)[:, None]
    x = tl.load(new_ptr + _new(b, first, head, T, K, N, ROWS), mask=(j >= 0) & (j < T), other=0.0)
    if HELD:
        slots = _slot(seen + j, W, S)
        x += tl.load(held_ptr + _held(b, head, slots, K, W, S, N), mask=(j < 0) & (seen + j >= 0), other=0.0)
    return x


@jit
def _store_gradient(
    x, new_ptr, held_ptr, of_sinks_ptr, b, first, head, seen, T, K,
    W: tl.constexpr, S: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Store a gradient as `_load_tokens` reads, that of far sinks [B, K, S, N] added."""
    j = first + tl.arange(0, ROWS)[:, None]
    position = seen + j
    if S > 0:
        of_sinks = (b * K + head) * (S * N) + position * N + tl.arange(0, N)[None, :]
        x += tl.load(of_sinks_ptr + of_sinks, mask=(position >= 0) & (position < S), other=0.0)
    new = new_ptr + _new(b, first, head, T, K, N, ROWS)
    tl.store(new, x.to(new_ptr.dtype.element_ty), mask=(j >= 0) & (j < T))
    if HELD:
        is_held = (j < 0) & (position >= 0) & ((j > -W) | (position < S))
        held = held_ptr + _held(b, head, _slot(position, W, S), K, W, S, N)
        tl.store(held, x.to(held_ptr.dtype.element_ty), mask=is_held)


@jit
def _first_tile(first_query, seen, W: tl.constexpr, BLOCK: tl.constexpr):
    """The first of the tiles of keys before a block of queries that has a token in it; the last is the block's own."""
    return tl.maximum((W + BLOCK - 2) // BLOCK - (first_query + seen + BLOCK - 1) // BLOCK, 0)


@jit
def _attend_tile(q, k, v, sees, out, largest, total, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One step of a running softmax over tiles of keys: out, each query's largest score, and its sum. sees: of queries
    and keys."""
    scores = tl.where(sees, tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE, float("-inf"))
    grown = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp2(largest - grown)
    weights = tl.exp2(scores - grown[:, None])
    out = tl.dot(weights.to(v.dtype), v, acc=out * shrink[:, None], input_precision=PRECISION)
    return out, grown, total * shrink + tl.sum(weights, axis=1)


@jit_for_all_sizes
def attend(
    q_ptr, k_ptr, v_ptr, held_keys_ptr, held_values_ptr, seen_ptr, out_ptr, log_sums_ptr, T, G, H,
    W: tl.constexpr, S: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output, and the base-2 logarithm of the sum of each query's exponentials, [B, H, T]."""
    first_query, bh = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    b, h, K = bh // H, bh % H, H // G
    head, seen = h // G, _seen(seen_ptr, b, HELD)
    steps = tl.arange(0, BLOCK)
    i = first_query + steps[:, None]
    here = _new(b, first_query, h, T, H, N, BLOCK)
    q = tl.load(q_ptr + here, mask=i < T, other=0.0)
    # Finite, or a tile of which a query sees nothing would give NaN
    largest, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, N), tl.float32)
    if S > 0:
        for sink in range(0, S, TILE):
            j = sink - seen + tl.arange(0, TILE)[None, :]
            k = _load_tokens(k_ptr, held_keys_ptr, b, sink - seen, head, seen, T, K, W, S, N, TILE, HELD)
            v = _load_tokens(v_ptr, held_values_ptr, b, sink - seen, head, seen, T, K, W, S, N, TILE, HELD)
            sees = (j <= i - W) & (seen + j < S)
            out, largest, total = _attend_tile(q, k, v, sees, out, largest, total, SCALE, PRECISION)
    before: tl.constexpr = (W + BLOCK - 2) // BLOCK
    for tile in range(_first_tile(first_query, seen, W, BLOCK), before + 1):
        first = first_query + (tile - before) * BLOCK
        j = first + steps[None, :]
        k = _load_tokens(k_ptr, held_keys_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
        v = _load_tokens(v_ptr, held_values_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
        sees = (j <= i) & (j > i - W) & (seen + j >= 0)
        out, largest, total = _attend_tile(q, k, v, sees, out, largest, total, SCALE, PRECISION)
    tl.store(out_ptr + here, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=i < T)
    tokens = first_query + steps
    tl.store(log_sums_ptr + bh * T + tokens, largest + tl.log2(total), mask=tokens < T)


@jit
def _differentiate_tile(
    rows, columns, d_rows, d_columns, log_sums, delta, sees, SCALE: tl.constexpr, PRECISION: tl.constexpr
):
    """The softmax's weights and the gradients of the scores, for queries and keys or, the other way round, keys and
    queries. d_rows, d_columns: what is multiplied for the weights' gradients, d_out or values."""
    scores = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * SCALE
    weights = tl.where(sees, tl.exp2(scores - log_sums), 0.0)
    d_weights = tl.dot(d_rows, tl.trans(d_columns), input_precision=PRECISION)
    return weights, (weights * (d_weights - delta)).to(rows.dtype)


@jit_for_all_sizes
def gradients_of_queries(
    d_out_ptr, q_ptr, k_ptr, v_ptr, held_keys_ptr, held_values_ptr, seen_ptr, out_ptr, log_sums_ptr,
    dq_ptr, delta_ptr, sink_keys_ptr, sink_values_ptr, T, G, H,
    W: tl.constexpr, S: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of q; delta, what `gradients_of_keys` needs besides, [B, H, T]; and what the far sinks' keys and
    values get from this block, fp32 [B, K, G M, S, N]."""
    block, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_query, b, h, K = block * BLOCK, bh // H, bh % H, H // G
    head, seen = h // G, _seen(seen_ptr, b, HELD)
    steps = tl.arange(0, BLOCK)
    i, tokens = first_query + steps[:, None], first_query + steps
    here = _new(b, first_query, h, T, H, N, BLOCK)
    q = tl.load(q_ptr + here, mask=i < T, other=0.0)
    d_out = tl.load(d_out_ptr + here, mask=i < T, other=0.0)
    out = tl.load(out_ptr + here, mask=i < T, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + bh * T + tokens, delta, mask=tokens < T)
    log_sums = tl.load(log_sums_ptr + bh * T + tokens, mask=tokens < T, other=0.0)[:, None]
    delta, dq = delta[:, None], tl.zeros((BLOCK, N), tl.float32)
    FACTOR: tl.constexpr = SCALE * 0.6931471805599453  # ln 2
    if S > 0:
        for sink in range(0, S, TILE):
            s = sink + tl.arange(0, TILE)[None, :]
            k = _load_tokens(k_ptr, held_keys_ptr, b, sink - seen, head, seen, T, K, W, S, N, TILE, HELD)
            v = _load_tokens(v_ptr, held_values_ptr, b, sink - seen, head, seen, T, K, W, S, N, TILE, HELD)
            sees = (s - seen <= i - W) & (s < S) & (i < T)
            weights, d_scores = _differentiate_tile(q, k, d_out, v, log_sums, delta, sees, SCALE, PRECISION)
            dq = tl.dot(d_scores, k, acc=dq, input_precision=PRECISION)
            dk = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION) * FACTOR
            dv = tl.dot(tl.trans(weights.to(q.dtype)), d_out, input_precision=PRECISION)
            rows = sink + tl.arange(0, TILE)[:, None]
            part = (
                (((b * K + head) * G + h % G) * tl.num_programs(0) + block) * (S * N)
                + rows * N
                + tl.arange(0, N)[None, :]
            )
            tl.store(sink_keys_ptr + part, dk, mask=rows < S)
            tl.store(sink_values_ptr + part, dv, mask=rows < S)
    before: tl.constexpr = (W + BLOCK - 2) // BLOCK
    for tile in range(_first_tile(first_query, seen, W, BLOCK), before + 1):
        first = first_query + (tile - before) * BLOCK
        j = first + steps[None, :]
        k = _load_tokens(k_ptr, held_keys_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
        v = _load_tokens(v_ptr, held_values_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
        sees = (j <= i) & (j > i - W) & (seen + j >= 0)
        _, d_scores = _differentiate_tile(q, k, d_out, v, log_sums, delta, sees, SCALE, PRECISION)
        dq = tl.dot(d_scores, k, acc=dq, input_precision=PRECISION)
    tl.store(dq_ptr + here, (dq * FACTOR).to(dq_ptr.dtype.element_ty), mask=i < T)


@jit_for_all_sizes
def gradients_of_keys(
    d_out_ptr, q_ptr, k_ptr, v_ptr, held_keys_ptr, held_values_ptr, seen_ptr, log_sums_ptr, delta_ptr,
    sink_keys_ptr, sink_values_ptr, dk_ptr, dv_ptr, d_held_keys_ptr, d_held_values_ptr, T, G, H,
    W: tl.constexpr, S: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, and of those held that are near: all queries of the group that a block of keys is near
    to, and what `gradients_of_queries` found for the sinks, summed to [B, K, S, N]."""
    bk, K = tl.program_id(1).to(tl.int64), H // G
    b, head, seen = bk // K, bk % K, _seen(seen_ptr, bk // K, HELD)
    before: tl.constexpr = (W + BLOCK - 2) // BLOCK if HELD else 0
    first = (tl.program_id(0) - before) * BLOCK
    steps = tl.arange(0, BLOCK)
    j = first + steps[:, None]
    k = _load_tokens(k_ptr, held_keys_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
    v = _load_tokens(v_ptr, held_values_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
    dk, dv = tl.zeros((BLOCK, N), tl.float32), tl.zeros((BLOCK, N), tl.float32)
    first_query = tl.maximum(first, 0)
    num_queries = tl.maximum(tl.minimum(first + BLOCK + W - 1, T) - first_query, 0)
    blocks = (num_queries + BLOCK - 1) // BLOCK
    for step in range(0, G * blocks):
        h, start = head * G + step // blocks, first_query + step % blocks * BLOCK
        tokens = start + steps
        i, here = tokens[None, :], _new(b, start, h, T, H, N, BLOCK)
        q = tl.load(q_ptr + here, mask=tokens[:, None] < T, other=0.0)
        d_out = tl.load(d_out_ptr + here, mask=tokens[:, None] < T, other=0.0)
        rows = (b * H + h) * T + tokens
        log_sums = tl.load(log_sums_ptr + rows, mask=tokens < T, other=0.0)[None, :]
        delta = tl.load(delta_ptr + rows, mask=tokens < T, other=0.0)[None, :]
        sees = (j <= i) & (j > i - W) & (seen + j >= 0) & (i < T)
        weights, d_scores = _differentiate_tile(k, q, v, d_out, log_sums, delta, sees, SCALE, PRECISION)
        dv = tl.dot(weights.to(q.dtype), d_out, acc=dv, input_precision=PRECISION)
        dk = tl.dot(d_scores, q, acc=dk, input_precision=PRECISION)
    FACTOR: tl.constexpr = SCALE * 0.6931471805599453  # ln 2
    _store_gradient(
        dk * FACTOR, dk_ptr, d_held_keys_ptr, sink_keys_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD
    )
    _store_gradient(dv, dv_ptr, d_held_values_ptr, sink_values_ptr, b, first, head, seen, T, K, W, S, N, BLOCK, HELD)
