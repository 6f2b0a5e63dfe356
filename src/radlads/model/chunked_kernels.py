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
    """Where a program's chunk begins in [B, T, H, N], the number of its first token, and that at which they end.

    chunks: of packed sequences, each chunk's first token and number of tokens; None: rectangular.
    """
    if chunks_ptr is None:
        place, first, last = chunk_start(bh, g, T, H, N, L), g * L, T
    else:
        place = (tl.load(chunks_ptr + 2 * g).to(tl.int64) * H + bh) * N
        first, last = 0, tl.load(chunks_ptr + 2 * g + 1)
    return place, first, last


@jit
def place_of_sequence(ranges_ptr, bh, T, G, H):
    """Of a program's packed sequence and head: the sequence's number, where it begins in [1, T, H, 1], its number of
    tokens, its first chunk among all of all heads, and its number of chunks. ranges: see sequences.Sequences; None:
    rectangular, and the numbers mean nothing but T and G."""
    sequence, begin, first_chunk = 0, 0, 0
    if ranges_ptr is not None:
        ranges_ptr += bh // H * 5
        sequence = tl.load(ranges_ptr)
        begin = tl.load(ranges_ptr + 1).to(tl.int64) * H + bh % H
        T = tl.load(ranges_ptr + 2)
        first_chunk = bh % H * G + tl.load(ranges_ptr + 3)
        G = tl.load(ranges_ptr + 4)
    return sequence, begin, T, first_chunk, G


@jit
def place_in_sequence(ranges_ptr, bh, begin, first_chunk, g, T, G, H, N: tl.constexpr, L: tl.constexpr):
    """The number of a sequence's chunk g among all of all heads, and where it begins in [B, T, H, N]."""
    if ranges_ptr is None:
        chunk = bh * G + g
        first_token = chunk_start(bh, g, T, H, N, L)
    else:
        chunk = first_chunk + g
        first_token = (begin + g * L * H) * N
    return chunk, first_token


@jit
def place_of_state(states_ptr, slots_ptr, slot_stride, bh, sequence, H, N: tl.constexpr):
    """Where a sequence's state of a head lies, and whether there is one.

    slots: of each sequence, which of states [slots, H, N, N] is its own; negative: none. None: states are [B, H, N, N].
    """
    if slots_ptr is None:
        place, is_there = states_ptr + bh * N * N, True
    else:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        place, is_there = states_ptr + slot * slot_stride + bh % H * N * N, slot >= 0
    return place, is_there


@jit
def texts_of_chunk(numbers_ptr, bh, g, T, H, L: tl.constexpr):
    """The numbers of the texts that a chunk's rows [L, 1] and columns [1, L] are of, and those of the states that it
    meets and leaves, for `in_text`. Tokens beyond the end are of the last text."""
    row, column, met, left = 0, 0, 0, 0
    if numbers_ptr is not None:
        numbers_ptr += bh // H * T
        at = g * L + tl.arange(0, L)
        row = tl.load(numbers_ptr + tl.minimum(at[:, None], T - 1))
        column = tl.load(numbers_ptr + tl.minimum(at[None, :], T - 1))
        met = tl.load(numbers_ptr + tl.maximum(g * L - 1, 0))
        left = tl.load(numbers_ptr + tl.minimum(g * L + L - 1, T - 1))
    return row, column, met, left


@jit
def in_text(x, numbers_ptr, one, other, otherwise: tl.constexpr):
    """x where two numbers of texts are equal; everywhere if rows hold one text each."""
    if numbers_ptr is not None:
        x = tl.where(one == other, x, otherwise)
    return x


@jit
def where_seen(mask, x, numbers_ptr, row, column):
    """x [L, L] where its mask is true and row and column are of one text, else 0."""
    if numbers_ptr is not None:
        mask = mask & (row == column)
    return tl.where(mask, x, 0.0)


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
def decays(log_w, end, numbers_ptr, L: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk's decays for `_gradients`: e [1, keys], exp(e / 2), exp(c) and exp(-c) [L, keys], e / 2 taken off c.

    log_w: [L, keys]. end: e as `_prepare` stored it, [1, keys]; -inf where a text ends, if there are numbers of texts.
    """
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    c = sums_of_rows(tl.where(i >= j, 0.5, -0.5), log_w, dtype, PRECISION)
    if dtype == tl.float32:  # in which it shows that sums in another order end elsewhere
        end = 2 * last_row(c, L)
    elif numbers_ptr is not None:
        end = tl.where(end == float("-inf"), 2 * last_row(c, L), end)
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
