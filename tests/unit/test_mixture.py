"""Several corpora as one: exact shares, every sample of each once and in order, by number alone."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny

from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.data.loader import MixedSamples, TokenSamples
from radlads.data.mixture import locate, parse_mixture
from radlads.train.corpora.samples import heldout_batches, training_samples

SHARES = [Fraction(7, 10), Fraction(1, 5), Fraction(1, 10)]


def corpus_of(stem, token_id, num_tokens=1000):
    """Tokens that all say which corpus they are from."""
    with BinIdxWriter(stem, 260) as writer:
        writer.add_document(np.full(num_tokens, token_id))
    return BinIdxReader(stem)


@pytest.mark.parametrize(
    ("text", "corpora"),
    [
        ("data/a.v1", [("data/a.v1", 1)]),
        ("a:2", [("a", 1)]),
        ("a:0.9,b:0.1", [("a", Fraction(9, 10)), ("b", Fraction(1, 10))]),
        ("a:3, c:d/b:1", [("a", Fraction(3, 4)), ("c:d/b", Fraction(1, 4))]),
    ],
)
def test_notation(text, corpora):
    assert parse_mixture(text) == [(Path(path), share) for path, share in corpora]


@pytest.mark.parametrize("text", ["a:0.5,b", "a,b", "a:0,b:1", "a:-1,b:1", "a:1,", "a:x,b:1"])
def test_entry_without_a_weight_is_refused(text):
    with pytest.raises(ValueError, match="is not PATH:WEIGHT with a weight above 0"):
        parse_mixture(text)


def test_corpus_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a corpus twice"):
        parse_mixture("a:1,a:2")


def test_every_corpus_gives_its_samples_in_order():
    located = [locate(n, SHARES) for n in range(1000)]
    for corpus, share in enumerate(SHARES):
        assert [m for i, m in located if i == corpus] == list(range(int(1000 * share)))


def test_shares_hold_all_along():
    given = Counter()
    for n in range(500):
        given[locate(n, SHARES)[0]] += 1
        assert all(abs(given[i] - (n + 1) * share) <= 2 for i, share in enumerate(SHARES))


def test_items_are_the_corpora_s_own(tmp_path):
    first, second = tiny_reader(tmp_path / "a", 1), tiny_reader(tmp_path / "b", 2)
    mixed = MixedSamples([(first, Fraction(1, 2)), (second, Fraction(1, 2))], 16, num_samples=6)
    alone = [TokenSamples(reader, 16, num_samples=3) for reader in (first, second)]
    assert [item.tolist() for item in mixed] == [alone[1 - i % 2][i // 2].tolist() for i in range(6)]


def tiny_reader(stem, seed):
    return BinIdxReader(tiny.corpus(stem, num_tokens=1000, seed=seed))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_take_every_sample_once(tmp_path, world):
    corpora = [(tiny_reader(tmp_path / "a", 1), Fraction(9, 10)), (tiny_reader(tmp_path / "b", 2), Fraction(1, 10))]
    alone = [item.tolist() for item in MixedSamples(corpora, 16, num_samples=12)]
    ranks = [MixedSamples(corpora, 16, num_samples=12 // world, rank=r, world=world) for r in range(world)]
    assert [ranks[n % world][n // world].tolist() for n in range(12)] == alone


def configured(tmp_path, **train):
    return tiny.stage_config(tmp_path, "align", **{f"train.{key}": value for key, value in train.items()})


def test_training_reads_a_mixture(tmp_path):
    corpus_of(tmp_path / "a", 1), corpus_of(tmp_path / "b", 2)
    config = configured(tmp_path, data_file=f"{tmp_path}/a:0.75,{tmp_path}/b:0.25", magic_prime="auto")
    samples, _ = training_samples(config, 260)
    assert Counter(int(samples[i][0]) for i in range(16)) == {1: 12, 2: 4}


@pytest.mark.parametrize(
    ("budget", "rows", "context", "steps"),
    [
        (250_000_000, 96, 512, 5087),  # 5086.3: the released code stops at the first step past the budget
        (100_000_000, 32, 512, 6104),
        (96 * 512 * 7, 96, 512, 7),
        (1, 96, 512, 1),
    ],
)
def test_steps_go_on_until_the_budget_is_spent(tmp_path, budget, rows, context, steps):
    corpus_of(tmp_path / "a", 1, num_tokens=2000)
    keys = {"model.ctx_len": context, "train.my_exit_tokens": budget, "train.micro_bsz": rows}
    config = tiny.stage_config(tmp_path, "align", **keys, **{"train.data_file": f"{tmp_path}/a"})
    assert training_samples(config, 260)[1] == steps


def test_a_prime_for_several_corpora_is_refused(tmp_path):
    corpus_of(tmp_path / "a", 1), corpus_of(tmp_path / "b", 2)
    config = configured(tmp_path, data_file=f"{tmp_path}/a:1,{tmp_path}/b:1", magic_prime=5)
    with pytest.raises(ValueError, match="magic_prime belongs to one corpus: set it to auto"):
        training_samples(config, 260)


def test_token_beyond_the_vocabulary_of_either_corpus_is_named(tmp_path):
    corpus_of(tmp_path / "a", 1), corpus_of(tmp_path / "b", 200)
    config = configured(tmp_path, data_file=f"{tmp_path}/a:1,{tmp_path}/b:1")
    with pytest.raises(ValueError, match=r"b\.bin: token 0 is 200, outside the model's vocabulary of 100"):
        training_samples(config, 100)


def test_tail_is_held_out(tmp_path):
    with BinIdxWriter(tmp_path / "count", 2000) as writer:
        writer.add_document(np.arange(2000))
    config = configured(tmp_path, data_file=str(tmp_path / "count"), validation_data_file="", heldout_tail_tokens=500)
    samples, _ = training_samples(config, 2000)
    trained_on = {token for i in range(len(samples)) for token in samples[i].tolist()}
    assert max(trained_on) < 1500
    context = config.model.ctx_len
    assert next(iter(heldout_batches(config, 2000)))[0].tolist() == list(range(1500, 1501 + context))


def test_tail_of_all_tokens_is_refused(tmp_path):
    corpus_of(tmp_path / "a", 1)
    config = configured(tmp_path, data_file=str(tmp_path / "a"), validation_data_file="", heldout_tail_tokens=1000)
    with pytest.raises(ValueError, match="takes all 1000 tokens"):
        training_samples(config, 260)


def test_tail_beside_a_validation_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="both name held-out text: set one of them"):
        configured(tmp_path, validation_data_file="x", heldout_tail_tokens=10)
