"""What tells corpora apart: any token of a small one, the spread samples of a large one, and never the place."""

import shutil

import numpy as np
import tiny

from radlads.data.binidx import BinIdxReader
from radlads.data.identity import describe_corpus, samples_digest


def test_every_token_of_a_small_corpus_counts_and_its_place_does_not(tmp_path):
    (tmp_path / "moved").mkdir()
    stem = tiny.corpus(tmp_path / "a", num_tokens=4020)
    for suffix in (".bin", ".idx"):
        shutil.copy(stem.with_suffix(suffix), tmp_path / "moved")
    was = describe_corpus(BinIdxReader(stem))
    assert was["name"] == str(stem) and (was["tokens"], was["dtype"]) == (4020, "uint16")
    assert describe_corpus(BinIdxReader(tmp_path / "moved" / "a")) == was | {"name": str(tmp_path / "moved" / "a")}
    tokens = np.memmap(tmp_path / "moved" / "a.bin", dtype="<u2", mode="r+")
    tokens[2011] += 1
    tokens.flush()
    assert describe_corpus(BinIdxReader(tmp_path / "moved" / "a"))["samples"] != was["samples"]


def test_samples_of_a_large_file_reach_from_its_first_byte_to_its_last(tmp_path):
    path, num_bytes = tmp_path / "x.bin", 3 * 1024 * 4096 + 5
    path.write_bytes(bytes(num_bytes))
    digests = {samples_digest(path)}
    for position in (0, 13_000, num_bytes - 1):
        content = bytearray(num_bytes)
        content[position] = 1
        path.write_bytes(content)
        digests.add(samples_digest(path))
    assert len(digests) == 4


def test_an_empty_file_and_a_shorter_one_have_hashes_of_their_own(tmp_path):
    files = [tmp_path / str(size) for size in (0, 1, 4096, 4097)]
    for file in files:
        file.write_bytes(bytes(int(file.name)))
    assert len({samples_digest(file) for file in files}) == 4
