"""What the Triton kernels of both recurrences share on the device, and Triton itself where it is installed.

Shape letters: B batch, T tokens, H heads, N head size (keys and values), G chunks, L tokens per chunk.
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
