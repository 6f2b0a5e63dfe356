"""Sample positions: the published primes and starts, without floating point and without a sample seen twice."""

import math

import pytest

from radlads.data.sampling import (
    EPOCH_SAMPLES,
    check_magic_prime,
    is_prime,
    magic_prime,
    sample_number,
    sample_start,
)

DCLM_PRIMES = {256: 5859677, 512: 2929793, 1024: 1464917, 2048: 732461, 4096: 366227, 8192: 183089, 16384: 91541}
# The seven published primes hold for every length in [1500082176, 1500088319], and for no other.
DCLM_TOKENS = 1500082176, 1500088319


def primes_below(n):
    sieve = bytearray([1]) * n
    sieve[:2] = b"\0\0"
    for i in range(2, math.isqrt(n) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, n, i)))
    return {i for i in range(n) if sieve[i]}


def float_golden(prime):
    return int(prime * ((math.sqrt(5) - 1) / 2))


def exact_golden(prime):
    return sample_start(1, prime, 1)


def test_is_prime_agrees_with_a_sieve():
    assert {n for n in range(-2, 20_000) if is_prime(n)} == primes_below(20_000)


@pytest.mark.parametrize("prime", [2**31 - 1, 2**61 - 1, 2**64 - 59])
def test_large_primes(prime):
    assert is_prime(prime)


# Carmichael numbers, strong pseudoprimes to the first 4, 9 and 11 primes, and a product of two large primes.
@pytest.mark.parametrize(
    "n", [561, 41041, 825265, 3215031751, 3825123056546413051, (2**31 - 1) * (2**31 - 19), 2**64 - 1]
)
def test_large_composites(n):
    assert not is_prime(n)


def test_magic_prime_of_the_published_example():
    assert magic_prime(1498226207, 512) == 2926181


@pytest.mark.parametrize("num_tokens", DCLM_TOKENS)
def test_magic_primes_of_the_published_corpus(num_tokens):
    assert {context: magic_prime(num_tokens, context) for context in DCLM_PRIMES} == DCLM_PRIMES


@pytest.mark.parametrize("num_tokens", [DCLM_TOKENS[0] - 1, DCLM_TOKENS[1] + 1])
def test_published_primes_fit_no_other_length(num_tokens):
    assert {context: magic_prime(num_tokens, context) for context in DCLM_PRIMES} != DCLM_PRIMES


# The released make_data_hf.py tries the bound itself: 6 contexts of 10 put it at 5.
@pytest.mark.parametrize(("num_tokens", "prime"), [(30, 2), (59, 2), (60, 5), (119, 5), (120, 11)])
def test_magic_prime_of_tiny_corpora(num_tokens, prime):
    assert magic_prime(num_tokens, 10) == prime


@pytest.mark.parametrize("num_tokens", [0, 1, 10, 29])
def test_corpus_too_short_for_any_prime(num_tokens):
    with pytest.raises(ValueError, match=f"a corpus of {num_tokens} tokens is too short.* use at least 30 tokens"):
        magic_prime(num_tokens, 10)


@pytest.mark.parametrize(("prime", "num_tokens"), [(5, 61), (5, 51), (2, 61)])
def test_fitting_primes_pass(prime, num_tokens):
    check_magic_prime(prime, num_tokens, 10)


@pytest.mark.parametrize(
    ("prime", "num_tokens", "message"),
    [
        (8, 200, "magic_prime 8 is not a prime: use 17"),
        (-1, 200, "magic_prime -1 is not a prime: use 17"),
        (7, 200, "magic_prime 7 is not 2 modulo 3.* use 17"),
        (11, 110, "magic_prime 11 needs 111 tokens at 10 a sample: use 5 "),
    ],
)
def test_unfit_primes_are_refused(prime, num_tokens, message):
    with pytest.raises(ValueError, match=message):
        check_magic_prime(prime, num_tokens, 10)


@pytest.mark.parametrize("prime", sorted(p for p in primes_below(200) if p % 3 == 2))
def test_every_position_once_in_as_many_samples_as_the_prime(prime):
    starts = [sample_start(number, prime, 10) for number in range(1, prime + 1)]
    assert sorted(starts) == list(range(0, prime * 10, 10))


def test_other_primes_miss_positions():
    assert len({sample_start(number, 7, 10) for number in range(1, 8)}) < 7


def test_last_sample_of_the_shortest_corpus_fits():
    last_start = max(sample_start(number, 5, 10) for number in range(1, 6))
    check_magic_prime(5, last_start + 11, 10)
    with pytest.raises(ValueError, match="needs"):
        check_magic_prime(5, last_start + 10, 10)


@pytest.mark.parametrize("number", [1, 2, 40320, 40321, 6_000_000])
def test_starts_are_those_of_the_published_formula(number):
    published = ((float_golden(2926181) * number * number * number) % 2926181) * 512
    assert sample_start(number, 2926181, 512) == published


def test_published_float_formula_agrees_for_every_magic_prime_up_to_1e9():
    # float64 is off by less than 2e-7 there, so it differs only where p golden is that close to an integer. Then p is a
    # sum of non-adjacent Fibonacci numbers from 514229 up: with a smaller one it is at least golden^29 = 8.7e-7 away.
    fibonacci = [514229, 832040]
    while fibonacci[-1] + fibonacci[-2] <= 10**9:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    sums, of_all_but_the_last = {0}, {0}
    for number in fibonacci:
        sums, of_all_but_the_last = sums | {s + number for s in of_all_but_the_last}, sums
    differing = [p for p in sums if 0 < p <= 10**9 and float_golden(p) != exact_golden(p)]
    assert len(differing) == 51
    assert not [p for p in differing if p % 3 == 2 and is_prime(p)]


def test_golden_fraction_is_exact_where_float64_is_not():
    fibonacci_39, fibonacci_40 = 63245986, 102334155
    assert (exact_golden(fibonacci_40), float_golden(fibonacci_40)) == (fibonacci_39 - 1, fibonacci_39)


def test_sample_numbers_count_from_one():
    assert EPOCH_SAMPLES == 40320
    assert sample_number(0, 0, 0, 1) == 1
    assert sample_number(2, 5, 3, 8) == 1 + 2 * 40320 + 5 * 8 + 3


@pytest.mark.parametrize("world", [1, 2, 7, 8])
def test_ranks_and_epochs_share_the_numbers_out(world):
    numbers = [
        sample_number(epoch, index, rank, world)
        for epoch in range(2)
        for index in range(EPOCH_SAMPLES // world)
        for rank in range(world)
    ]
    assert numbers == list(range(1, 2 * EPOCH_SAMPLES + 1))
