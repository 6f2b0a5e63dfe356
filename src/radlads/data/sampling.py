"""Where in a corpus each training sample starts: the published order, a pure function of the sample's number.

Owns the arithmetic, in Python integers. Sample number n starts at token ((floor(p (sqrt(5) - 1) / 2) n^3) mod p) ctx,
where the magic prime p is 2 modulo 3, so that n -> n^3 meets every residue once. Leaves reading to `loader.py`.
"""

import math

EPOCH_SAMPLES = 40320

# With the first twelve primes as bases, Miller-Rabin is exact below 3.3e24 (Sorenson and Webster, 2015).
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n: int) -> bool:
    """Tell whether `n` is a prime; exact for every 64-bit integer."""
    if n < 2:
        return False
    if any(n % base == 0 for base in _BASES):
        return n in _BASES
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    return all(_passes_miller_rabin(n, base, twos) for base in _BASES)


def magic_prime(num_tokens: int, context_tokens: int) -> int:
    """Return the largest prime p = 2 (mod 3) with p <= num_tokens / context_tokens - 1, as make_data_hf.py prints it.

    Raises ValueError if there is none: the corpus must hold 3 contexts.
    """
    largest = num_tokens // context_tokens - 1
    for candidate in range(largest, 1, -1):
        if candidate % 3 == 2 and is_prime(candidate):
            return candidate
    raise ValueError(
        f"a corpus of {num_tokens} tokens is too short for samples of {context_tokens}: "
        f"use at least {3 * context_tokens} tokens, or a shorter context"
    )


def check_magic_prime(prime: int, num_tokens: int, context_tokens: int) -> None:
    """Refuse, with ValueError, a `prime` that is not a prime = 2 (mod 3) or whose samples overrun the corpus."""
    if not is_prime(prime):
        fault = "is not a prime"
    elif prime % 3 != 2:
        fault = "is not 2 modulo 3, so some samples would never be seen"
    elif prime * context_tokens + 1 > num_tokens:
        fault = f"needs {prime * context_tokens + 1} tokens at {context_tokens} a sample"
    else:
        return
    remedy = magic_prime(num_tokens, context_tokens)
    raise ValueError(f"magic_prime {prime} {fault}: use {remedy} for this corpus of {num_tokens} tokens")


def sample_number(epoch: int, index: int, rank: int, world: int) -> int:
    """Return the number, from 1, of the `index`-th sample that `rank` of `world` takes in `epoch` (all from 0)."""
    return 1 + epoch * EPOCH_SAMPLES + index * world + rank


def sample_start(number: int, prime: int, context_tokens: int) -> int:
    """Return the token at which sample `number` starts, in [0, (prime - 1) context_tokens].

    The published code takes the golden fraction of p in float64. That is off by one for 51 integers up to 1e9, none of
    which is a prime = 2 (mod 3), so its positions are these.
    """
    golden = (math.isqrt(5 * prime * prime) - prime) // 2
    return golden * number**3 % prime * context_tokens


def _passes_miller_rabin(n: int, base: int, twos: int) -> bool:
    x = pow(base, (n - 1) >> twos, n)
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False
