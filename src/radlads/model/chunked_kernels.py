"""What the Triton kernels of both recurrences share on the device, and Triton itself where it is installed.

Tokens lie in one of two ways. Rectangular: [B, T, H, N], whose chunks are counted row by row; the numbers of texts
[B, T], if there are any, grow along a row where another text begins, which sees nothing of the one before. Packed:
[1, T, H, N] holds sequences of any lengths one after another, each with chunks of its own (sequences.py).

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk, S sequences.
"""

from __future__ import annotations

# The kernels take `tl` from here: transformers refuses a hub model if a package is missing that its code imports
# outside of a try
try:
    import triton
    import triton.language as tl
except ImportError:  # machines without a GPU need neither
    triton = tl = None

HEAD_SIZES = (64, 128)


def jit(kernel):
    """triton.jit where triton is there."""
    return kernel if triton is None else triton.jit(kernel)


def jit_for_all_sizes(kernel):
    """As jit, compiled once for all T, G and H: that N divides the offsets is all that their alignment needs."""
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=["T", "G", "H"])


@jit
def chunk_start(bh, g, T, H, N: tl.constexpr, L: tl.constexpr):
    """Where chunk g of sequence and head bh begins in a [B, T, H, N] tensor; 64 bits wide, as bh is.

    Large offsets are scalars, those of tiles 32 bits wide: tiles of 64-bit addresses would fill the registers.
    """
    return ((bh // H * T + g * L) * H + bh % H) * N


@jit
def place_of_chunk(chunks_ptr, bh, g, T, H, N: tl.constexpr, L: tl.constexpr):
    """Where a program's chunk begins in [B, T, H, N], and how many of its L tokens are real, or more.

    chunks: of packed sequences, first token and number of tokens of each chunk; None: rectangular.
    """
    if chunks_ptr is None:
        return chunk_start(bh, g, T, H, N, L), T - g * L
    return (tl.load(chunks_ptr + 2 * g).to(tl.int64) * H + bh) * N, tl.load(chunks_ptr + 2 * g + 1)


@jit
def place_of_sequence(ranges_ptr, bh, T, G, H, N: tl.constexpr, L: tl.constexpr):
    """A sequence and head: its number times H plus the head, where it begins, its tokens, first chunk and chunks.

    ranges: of packed sequences, longest first, number, first token, number of tokens and first chunk; None: rectangular.
    """
    if ranges_ptr is None:
        return bh, (bh // H * T * H + bh % H) * N, T, bh * G, G
    ranges_ptr += bh // H * 4
    number, first, num_tokens = tl.load(ranges_ptr), tl.load(ranges_ptr + 1), tl.load(ranges_ptr + 2)
    head = bh % H
    place = (first.to(tl.int64) * H + head) * N
    return number * H + head, place, num_tokens, head * G + tl.load(ranges_ptr + 3), tl.cdiv(num_tokens, L)


@jit
def place_of_state(states_ptr, slots_ptr, slot_stride, sequence, H, N: tl.constexpr):
    """A sequence's state of a head, and whether there is one. slots: the number of each sequence's in states [slots, H,
    N, N], negative: none; None: the sequences' own numbers."""
    if slots_ptr is None:
        return states_ptr + sequence * N * N, True
    slot = tl.load(slots_ptr + sequence // H).to(tl.int64)
    return states_ptr + slot * slot_stride + sequence % H * N * N, slot >= 0


@jit
def texts_of_chunk(numbers_ptr, bh, g, T, H, L: tl.constexpr):
    """The numbers of the texts that a chunk's rows are of [L, 1], its columns [1, L], the state that it meets, and the
    state that it leaves. Tokens beyond the end are of the last text."""
    numbers_ptr += bh // H * T
    at = tl.load(numbers_ptr + tl.minimum(g * L + tl.arange(0, L), T - 1))
    met = tl.load(numbers_ptr + tl.maximum(g * L - 1, 0))
    left = tl.load(numbers_ptr + tl.minimum(g * L + L - 1, T - 1))
    return at[:, None], at[None, :], met, left


@jit
def end_of_text(end, met, left):
    """A chunk's sum of log w, which is 0 or less, as a scan is to read it: positive if it leaves another text's state
    than it met, and nothing is kept."""
    return tl.where(met == left, end, tl.maximum(-end, 1e-30))


@jit
def kept_share(end, numbers_ptr):
    """What a chunk keeps of the state that it meets, from the sum of log w as `end_of_text` stored it."""
    if numbers_ptr is None:
        return tl.exp(end)
    return tl.where(end > 0, 0.0, tl.exp(end))


@jit
def load_fp32(pointers, real):
    """Values in fp32, 0 where a token is not real."""
    return tl.load(pointers, mask=real, other=0.0).to(tl.float32)


@jit
def sums_of_rows(weights, x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """weights x in fp32, weights being multiples of 1/2: running sums of x's rows in the layout that products have.

    Where products are of bf16 numbers, x counts with 16 significant bits, as the sum of two of them.
    """
    high = x.to(dtype)
    total = tl.dot(weights.to(dtype), high, input_precision=PRECISION)
    if dtype != tl.float32:
        low = (x - high.to(tl.float32)).to(dtype)
        total = tl.dot(weights.to(dtype), low, acc=total, input_precision=PRECISION)
    return total


@jit
def last_row(x, L: tl.constexpr):
    """The last of L rows, exactly, as [1, columns]."""
    return tl.sum(tl.where(tl.arange(0, L)[:, None] == L - 1, x, 0.0), axis=0)[None, :]


@jit
def decays(log_w, end, L: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk's decays for `_gradients`: e [1, keys], exp(e / 2), exp(c) and exp(-c) [L, keys], e / 2 taken off c.

    log_w: [L, keys]. end: e as `_prepare` stored it, [1, keys].
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    c = sums_of_rows(tl.where(i >= j, 0.5, -0.5), log_w, dtype, PRECISION)
    if dtype == tl.float32:  # in which it shows that sums in another order end elsewhere
        end = 2 * last_row(c, L)
    return end, tl.exp(0.5 * end), tl.exp(c), tl.exp(-c)


@jit
def product(x, y, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x y, rounded to dtype before, fp32 after."""
    return tl.dot(x.to(dtype), y.to(dtype), input_precision=PRECISION)


@jit
def inverse(A, L: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [L, L], fp32, L at most 64.

    By blocks of 4, 16 and 64: each level's remainder E is nilpotent of index 4, so (I + E)^-1 = (I - E)(I + E^2).
    Powers of the whole of A would grow like binomials when keys repeat; those of a level's E stay of order 1.
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    identity = tl.where(i == j, 1.0, 0.0)
    E = tl.where(i // 4 == j // 4, A, 0.0)
    found = product(identity - E, identity + product(E, E, dtype, PRECISION), dtype, PRECISION)
    for size in tl.static_range(4, 17, 12):
        between = tl.where((i // (4 * size) == j // (4 * size)) & (i // size != j // size), A, 0.0)
        E = product(found, between, dtype, PRECISION)
        level = identity - E
        if 2 * size < L:  # else two blocks are left, and E^2 = 0
            level = product(level, identity + product(E, E, dtype, PRECISION), dtype, PRECISION)
        found = product(level, found, dtype, PRECISION)
    return found
