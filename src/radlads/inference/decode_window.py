"""The softmax window of one decoding step in Triton, as parts of decode_kernels.recurrence. Import only where Triton is
installed.

The equations and the slots' order stand in model/window.py. Shape letters: S slots of a tile, N head size.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def slot_of(token, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """The slot of a token, counted from the text's start."""
    return tl.where(token < SINKS, token, SINKS + (token - SINKS) % WINDOW)


@triton.jit
def load_slots(keys_ptr, values_ptr, start, seen, written, HELD: tl.constexpr, N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Keys and values [S, N] of the slots from `start` on, and which of them earlier tokens have filled [S].

    seen: tokens so far with the step's own, whose slot is `written`: it is left out, since another program may be
    writing it.
    """
    slots = start + tl.arange(0, BLOCK_S)
    is_filled = (slots < tl.minimum(seen, HELD)) & (slots != written)
    places = slots[:, None] * N + tl.arange(0, N)[None, :]
    keys = tl.load(keys_ptr + places, mask=is_filled[:, None], other=0.0)
    values = tl.load(values_ptr + places, mask=is_filled[:, None], other=0.0)
    return keys, values, is_filled


@triton.jit
def attend_slots(q, keys, values, is_filled, largest, total, sums):
    """Add a tile to the softmax of each of its S places: their largest score, sum of weights, sums [S, N] of values."""
    scores = tl.sum(keys.to(tl.float32) * q[None, :], axis=1)
    scores = tl.where(is_filled, scores, float("-inf"))
    before, largest = largest, tl.maximum(largest, scores)
    kept, weights = tl.exp(before - largest), tl.exp(scores - largest)
    sums = sums * kept[:, None] + values.to(tl.float32) * weights[:, None]
    return largest, total * kept + weights, sums


@triton.jit
def attend_window(
    q,
    k,
    v,
    keys,
    values,
    is_filled,
    keys_ptr,
    values_ptr,
    seen,
    written,
    HELD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Softmax attention of the scaled query q [N] to the slots and to its own token's k and v [N], all fp32: [N].

    keys, values, is_filled: load_slots' first tile, used if it is the only one; else tiles are loaded here, STAGES - 1
    of them ahead. Each place of a tile has a softmax of its own until the end, so that warps exchange nothing before;
    all begin at the own token's score, which is finite.
    """
    own = tl.sum(q * k, axis=0)
    largest = tl.zeros([BLOCK_S], tl.float32) + own
    total = tl.zeros([BLOCK_S], tl.float32)
    sums = tl.zeros([BLOCK_S, N], tl.float32)
    if BLOCK_S >= HELD:
        largest, total, sums = attend_slots(q, keys, values, is_filled, largest, total, sums)
    else:
        for start in tl.range(0, tl.minimum(seen, HELD), BLOCK_S, num_stages=STAGES):
            keys, values, is_filled = load_slots(keys_ptr, values_ptr, start, seen, written, HELD, N, BLOCK_S)
            largest, total, sums = attend_slots(q, keys, values, is_filled, largest, total, sums)
    overall = tl.max(largest, axis=0)
    weights, own = tl.exp(largest - overall), tl.exp(own - overall)
    out = tl.sum(sums * weights[:, None], axis=0) + own * v
    return out / (tl.sum(total * weights, axis=0) + own)
