"""Token files: what is written is read, damaged pairs are refused by name, and an interrupted write leaves nothing."""

import os
import pickle
import struct

import numpy as np
import pytest

from radlads.data.binidx import BinIdxReader, BinIdxWriter

DOCUMENTS = [[5, 1, 0], [7], [2, 3, 4, 6]]


@pytest.fixture
def stem(tmp_path):
    return write(tmp_path / "corpus.v1")


def write(stem, documents=DOCUMENTS, vocab_size=8):
    with BinIdxWriter(stem, vocab_size) as writer:
        for ids in documents:
            writer.add_document(ids)
    return stem


def index_of(stem):
    return stem.with_name(stem.name + ".idx")


def tokens_of(stem):
    return stem.with_name(stem.name + ".bin")


def patch_index(stem, offset, layout, value):
    raw = bytearray(index_of(stem).read_bytes())
    struct.pack_into(layout, raw, offset, value)
    index_of(stem).write_bytes(raw)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(8, np.uint16), (65536, np.uint16), (65537, np.int32), (151936, np.int32)]
)
def test_round_trip(tmp_path, vocab_size, dtype):
    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    reader = BinIdxReader(write(tmp_path / "x", documents, vocab_size))
    assert reader.dtype == reader.tokens.dtype == dtype
    assert (reader.num_tokens, reader.num_documents) == (10, 4)
    assert reader.tokens.tolist() == [token for ids in documents for token in ids]
    assert [reader.document(i).tolist() for i in range(4)] == documents


def test_writer_counts(tmp_path):
    with BinIdxWriter(tmp_path / "x", 8) as writer:
        writer.add_document([1, 2])
        writer.add_document(np.array([3], dtype=np.uint8))
    assert (writer.num_tokens, writer.num_documents) == (3, 2)


def test_written_bytes_are_the_published_format(tmp_path):
    write(tmp_path / "x", [[1, 2], [3]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<3H", 1, 2, 3)
    assert (tmp_path / "x.idx").read_bytes() == b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ 2i 2q 3q", 1, 8, 2, 3, *(2, 1), *(0, 4), *(0, 1, 2)
    )


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_integer_type_is_read(stem, code, dtype):
    tokens_of(stem).write_bytes(np.arange(8, dtype=dtype).tobytes())
    patch_index(stem, 17, "<B", code)
    for sequence, first_token in enumerate(np.cumsum([0, *map(len, DOCUMENTS[:-1])])):
        patch_index(stem, 46 + 8 * sequence, "<q", first_token * np.dtype(dtype).itemsize)
    assert BinIdxReader(stem).tokens.tolist() == list(range(8))


def test_document_of_several_sequences(tmp_path):
    (tmp_path / "x.bin").write_bytes(bytes(range(6)))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 1, 3, 3)
    (tmp_path / "x.idx").write_bytes(header + struct.pack("<3i 3q 3q", *(1, 2, 3), *(0, 1, 3), *(0, 2, 3)))
    reader = BinIdxReader(tmp_path / "x")
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_either_file_names_the_corpus(stem, suffix):
    assert BinIdxReader(f"{stem}{suffix}").path_stem == stem


def test_tokens_are_mapped_not_copied(stem):
    reader = BinIdxReader(stem)
    assert isinstance(reader.tokens, np.memmap) and np.shares_memory(reader.tokens, reader.document(1))
    assert not reader.tokens.flags.writeable


def test_pickle_holds_the_path_only(tmp_path):
    reader = BinIdxReader(write(tmp_path / "x", [[1] * 10_000]))
    pickled = pickle.dumps(reader)
    assert len(pickled) < 1000 and pickle.loads(pickled).num_tokens == 10_000


@pytest.mark.parametrize("i", [3, -4])
def test_document_out_of_range(stem, i):
    with pytest.raises(IndexError):
        BinIdxReader(stem).document(i)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(stem, suffix):
    missing = stem.with_name(stem.name + suffix)
    missing.unlink()
    with pytest.raises(ValueError, match=rf"{missing} is missing.* copy or build both"):
        BinIdxReader(stem)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder: name the corpus in it"):
        BinIdxReader(tmp_path)


def test_what_is_no_corpus_is_not_replaced_by_one(tmp_path):
    (tmp_path / "x.idx").write_text("a list of mine")
    with pytest.raises(ValueError, match=r"x\.idx is no corpus that a new one could replace"):
        write(tmp_path / "x", [[1]])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a list of mine"]


def test_folder_of_the_same_name_does_no_harm(stem):
    stem.mkdir()
    assert BinIdxReader(stem).num_tokens == 8


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "<B", 0, "starts with .* pass a Megatron token corpus"),
        (9, "<Q", 2, "has version 2, and only version 1 is known"),
        (17, "<B", 9, "has dtype code 9, which is no integer type"),
        (17, "<B", 6, "has dtype code 6, which is no integer type"),
        (18, "<Q", 2**60, "is cut short at"),
        (26, "<Q", 0, "has documents that do not cover its 3 sequences"),
        (70, "<q", 1, "has documents that do not cover its 3 sequences"),
        (94, "<q", 2, "has documents that do not cover its 3 sequences"),
        (78, "<q", 3, "has documents that are out of order"),
        (46, "<q", 2, "has sequences that do not lie back to back"),
        (62, "<q", 10**9, "has sequences that do not lie back to back"),
    ],
)
def test_damaged_index_is_refused(stem, offset, layout, value, message):
    patch_index(stem, offset, layout, value)
    with pytest.raises(ValueError, match=f"{index_of(stem)} {message}"):
        BinIdxReader(stem)


@pytest.mark.parametrize("kept_bytes", [0, 33, 34, 101])
def test_truncated_index_is_refused(stem, kept_bytes):
    os.truncate(index_of(stem), kept_bytes)
    with pytest.raises(ValueError, match=f"{index_of(stem)} is cut short"):
        BinIdxReader(stem)


@pytest.mark.parametrize("found_bytes", [0, 14, 15, 17, 18])
def test_sizes_must_fill_the_bin_file_exactly(stem, found_bytes):
    os.truncate(tokens_of(stem), found_bytes)
    with pytest.raises(
        ValueError, match=f"{tokens_of(stem)} has {found_bytes} bytes but {index_of(stem)} describes 16"
    ):
        BinIdxReader(stem)


def test_no_tokens_are_refused(tmp_path):
    (tmp_path / "x.bin").touch()
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQq", 1, 8, 0, 1, 0))
    with pytest.raises(ValueError, match=r"x\.bin holds no tokens"):
        BinIdxReader(tmp_path / "x")


@pytest.mark.parametrize("token_id", [-1, 8, 65536 + 3])
def test_id_outside_the_vocabulary_leaves_nothing(tmp_path, token_id):
    with pytest.raises(ValueError, match=f"token 1 of document 3 is {token_id}, outside the vocabulary of 8"):
        write(tmp_path / "x", [*DOCUMENTS, [0, token_id, -1]])
    assert list(tmp_path.iterdir()) == []


def test_ids_must_be_integers(tmp_path):
    with pytest.raises(ValueError, match="document 0 has float64 ids: pass integers"):
        write(tmp_path / "x", [[1.5]])


@pytest.mark.parametrize("documents", [[], [[]]])
def test_writing_no_tokens_leaves_nothing(tmp_path, documents):
    with pytest.raises(ValueError, match="would hold no tokens"):
        write(tmp_path / "x", documents)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_interruption_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), BinIdxWriter(tmp_path / "x", 8) as writer:
        writer.add_document([1])
        raise interruption
    assert list(tmp_path.iterdir()) == []


def test_interruption_keeps_the_corpus_that_was_there(stem):
    with pytest.raises(RuntimeError), BinIdxWriter(stem, 8) as writer:
        writer.add_document([1])
        raise RuntimeError
    assert BinIdxReader(stem).document(2).tolist() == DOCUMENTS[2]
    assert len(list(stem.parent.iterdir())) == 2


def test_failure_between_the_renames_leaves_no_mixed_pair(stem, monkeypatch):
    real_replace = os.replace

    def replace(source, target):
        if target.suffix == ".idx":
            raise OSError("disk gone")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk gone"):
        write(stem, [[6] * 8])
    assert list(stem.parent.iterdir()) == [tokens_of(stem)]


def test_final_names_appear_only_at_the_end(tmp_path):
    with BinIdxWriter(tmp_path / "new" / "x", 8) as writer:
        writer.add_document([1])
        assert not {"x.bin", "x.idx"} & set(os.listdir(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path / "new")) == ["x.bin", "x.idx"]
