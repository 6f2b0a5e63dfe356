"""Corpora as datasets: which tokens an item holds, for any rank, epoch and worker."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from radlads.data import loader
from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.data.loader import HeldoutWindows, TokenSamples, check_vocabulary
from radlads.data.sampling import EPOCH_SAMPLES, sample_start


@pytest.fixture
def reader(tmp_path):
    return counting(tmp_path, 1000)


def counting(folder, num_tokens, vocab_size=1000):
    """A corpus whose token at position i is i."""
    with BinIdxWriter(folder / f"count{num_tokens}", vocab_size) as writer:
        writer.add_document(np.arange(num_tokens))
    return BinIdxReader(writer.path_stem)


def test_sample_is_the_window_at_the_published_position(reader):
    samples = TokenSamples(reader, 10, num_samples=3)
    assert samples.magic_prime == 89
    for i in range(3):
        start = sample_start(i + 1, 89, 10)
        assert samples[i].tolist() == list(range(start, start + 11))


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_sample_is_an_int64_tensor_of_its_own(tmp_path, vocab_size):
    samples = TokenSamples(counting(tmp_path, 1000, vocab_size), 10, num_samples=1)
    item = samples[0]
    assert item.dtype == torch.int64 and item.shape == (11,)
    item += 1
    assert torch.equal(samples[0] + 1, item)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_interleave_into_the_order_of_one(reader, world):
    alone = TokenSamples(reader, 10, num_samples=12)
    ranks = [TokenSamples(reader, 10, num_samples=12 // world, rank=rank, world=world) for rank in range(world)]
    together = [ranks[n % world][n // world] for n in range(12)]
    assert torch.equal(torch.stack(together), torch.stack(list(alone)))


def test_numbers_go_on_into_the_second_epoch(reader):
    samples = TokenSamples(reader, 10, num_samples=2 * EPOCH_SAMPLES, rank=1, world=2)
    assert samples[EPOCH_SAMPLES // 2][0] == sample_start(1 + EPOCH_SAMPLES + 1, 89, 10)


def test_one_prime_of_samples_covers_the_corpus_once(reader):
    starts = {int(item[0]) for item in TokenSamples(reader, 10, num_samples=89)}
    assert starts == set(range(0, 890, 10))


def test_given_magic_prime_is_used_and_checked(reader):
    assert TokenSamples(reader, 10, num_samples=1, magic_prime=83)[0][0] == sample_start(1, 83, 10)
    with pytest.raises(ValueError, match="magic_prime 101 needs 1011 tokens"):
        TokenSamples(reader, 10, num_samples=1, magic_prime=101)


def test_corpus_too_short_for_samples(reader):
    with pytest.raises(ValueError, match="a corpus of 1000 tokens is too short for samples of 334"):
        TokenSamples(reader, 334, num_samples=1)


def test_iteration_ends_after_num_samples(reader):
    samples = TokenSamples(reader, 10, num_samples=5)
    assert len(samples) == len(list(samples)) == 5


def test_spawned_worker_reads_the_same(reader):
    samples = TokenSamples(reader, 10, num_samples=4)
    batches = DataLoader(samples, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat(list(batches)), torch.stack(list(samples)))


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(11, 1), (20, 1), (21, 2), (29, 2)])
def test_heldout_windows_predict_every_token_once(tmp_path, num_tokens, num_windows):
    windows = HeldoutWindows(counting(tmp_path, num_tokens), 10)
    assert len(windows) == len(list(windows)) == num_windows
    assert torch.cat([window[1:] for window in windows]).tolist() == list(range(1, 10 * num_windows + 1))
    assert [window[0].item() for window in windows] == list(range(0, 10 * num_windows, 10))


@pytest.mark.parametrize(("max_tokens", "num_windows"), [(10, 1), (39, 3), (40, 4), (10_000, 99), (None, 99)])
def test_heldout_limit(reader, max_tokens, num_windows):
    assert len(HeldoutWindows(reader, 10, max_tokens)) == num_windows


def test_heldout_items_are_int64(reader):
    assert HeldoutWindows(reader, 10, 20)[1].dtype == torch.int64


def test_less_than_one_heldout_window(tmp_path):
    with pytest.raises(ValueError, match=r"count10\.bin holds 10 tokens, less than one held-out window of 11"):
        HeldoutWindows(counting(tmp_path, 10), 10)


def test_heldout_limit_below_one_window(reader):
    with pytest.raises(ValueError, match="limit of 9 held-out tokens is less than one window of 10"):
        HeldoutWindows(reader, 10, 9)


@pytest.mark.parametrize("block_tokens", [1, 7, 1000, 2000])
def test_first_token_beyond_the_vocabulary_is_named(reader, monkeypatch, block_tokens):
    monkeypatch.setattr(loader, "_BLOCK_TOKENS", block_tokens)
    check_vocabulary(reader, 1000, "train.bin")
    with pytest.raises(ValueError, match=r"train\.bin: token 993 is 993, outside the model's vocabulary of 993"):
        check_vocabulary(reader, 993, "train.bin")


def test_negative_token_is_named(tmp_path):
    reader = counting(tmp_path, 20, vocab_size=70_000)
    reader.path_stem.with_suffix(".bin").write_bytes(np.array([*range(19), -3], dtype="<i4").tobytes())
    with pytest.raises(ValueError, match="token 19 is -3, outside"):
        check_vocabulary(reader, 70_000, "train.bin")
