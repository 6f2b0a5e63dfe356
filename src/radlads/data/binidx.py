"""Token corpora on disk: a `.bin` file of raw token ids and the Megatron `.idx` file that says where documents lie.

Owns the file format, reading without copying, and all-or-nothing writing, of a mask too. Leaves the mask's own format
to `mask.py`, tokenisation to `build.py`, and which tokens a training sample takes to `sampling.py` and `loader.py`.
"""

import os
import struct
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radlads.checksums import corpus_record
from radlads.data.mask import mask_file, mask_header
from radlads.files import naming

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
# magic, version, dtype code, number of sizes, number of document indices
_HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 of the format are floating-point types, which hold no token ids.
_DTYPES = {
    code: np.dtype(name) for code, name in ((1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
_INT32_CODE, _UINT16_CODE = 4, 8
_UINT16_IDS = 2**16


class BinIdxReader:
    """A token corpus, memory-mapped: opening it reads the index, and tokens are read when they are indexed.

    `path` is the name that `x.bin` and `x.idx` share, or either file. `tokens` is the whole corpus as one read-only
    array `[num_tokens]` of `dtype`, documents back to back. Pickles as its path. Raises ValueError, naming the file
    and the remedy, if a file is missing, is not of this format, is cut short, or does not fit the other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path_stem = corpus_stem(path)
        bin_path, idx_path = corpus_files(self.path_stem)
        _require_files(Path(path), bin_path, idx_path)
        self.dtype, sizes, self._pointers, self._document_indices = _read_index(idx_path)
        self.num_documents = len(self._document_indices) - 1
        self.num_tokens = int(sizes.sum(dtype=np.int64))
        described_bytes, found_bytes = self.num_tokens * self.dtype.itemsize, bin_path.stat().st_size
        if described_bytes != found_bytes:
            raise ValueError(
                f"{bin_path} has {found_bytes} bytes but {idx_path} describes {described_bytes}: "
                "one of them is cut short or from another corpus, so copy or build both again"
            )
        if self.num_tokens == 0:
            raise ValueError(f"{bin_path} holds no tokens: build the corpus again from text that is not empty")
        self.tokens: np.memmap[Any, np.dtype[Any]] = np.memmap(bin_path, dtype=self.dtype, mode="r")

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # A pickled memmap is a copy of the whole corpus, once for every spawned worker.
        return type(self), (self.path_stem,)

    def document(self, i: int) -> NDArray[Any]:
        """Return document `i`'s tokens, its EOS included, as a read-only view. Raises IndexError if there is none."""
        i = range(self.num_documents)[i]
        first, last = self._document_indices[i : i + 2]
        return self.tokens[self._token_position(first) : self._token_position(last)]

    def document_starts(self) -> NDArray[np.int64]:
        """Return the position of every document's first token, and of the corpus's end: `[num_documents + 1]`."""
        bounds = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        return bounds[self._document_indices]

    def _token_position(self, sequence: int) -> int:
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize


class TokenSpan:
    """The tokens `first` .. `last` - 1 of a corpus, for what needs no documents. Pickles as its corpus's path."""

    def __init__(self, reader: BinIdxReader, first: int, last: int) -> None:
        assert 0 <= first < last <= reader.num_tokens
        self._reader, self._first = reader, first
        self.path_stem, self.num_tokens = reader.path_stem, last - first

    @property
    def tokens(self) -> NDArray[Any]:
        return self._reader.tokens[self._first : self._first + self.num_tokens]


class BinIdxWriter:
    """Writes a token corpus as a context manager: both files appear when the block ends, neither if it raises.

    Ids are stored as uint16 if every id below `vocab_size` fits, else as int32. The files grow under temporary names in
    the folder of `path_stem` (created if missing), which an exception removes. A corpus of that name is replaced.
    masked: every document comes with a mask, for a `.mask` file beside the two. Raises ValueError if what bears the
    corpus's name is none, and on leaving the block if no token was added.
    """

    def __init__(self, path_stem: str | Path, vocab_size: int, *, masked: bool = False) -> None:
        self.path_stem = corpus_stem(path_stem)
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self._sizes = array("i")
        self._mask = bytearray() if masked else None
        self._dtype_code = _UINT16_CODE if vocab_size <= _UINT16_IDS else _INT32_CODE
        self._bin_temporary, self._idx_temporary, self._mask_temporary = (
            path.with_name(f".{path.name}.{os.getpid()}.tmp")
            for path in (*corpus_files(self.path_stem), mask_file(self.path_stem))
        )

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    def __enter__(self) -> Self:
        self._bin_temporary.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(corpus_files(self.path_stem)[1])
        with ExitStack() as stack:
            stack.callback(self._bin_temporary.unlink, missing_ok=True)
            stack.callback(self._idx_temporary.unlink, missing_ok=True)
            stack.callback(self._mask_temporary.unlink, missing_ok=True)
            self._bin_file = stack.enter_context(open(self._bin_temporary, "wb"))
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with naming(corpus_files(self.path_stem)[0]), self._cleanup:
            if exc_type is None:
                self._publish()

    def add_document(self, ids: ArrayLike, mask: ArrayLike | None = None) -> None:
        """Append one document, a 1-D sequence of integer ids; the caller ends it with EOS. mask: of the same length,
        True where the assistant wrote; of a masked corpus alone.

        Raises ValueError, naming the id and where it stands, if one is not in `[0, vocab_size)`.
        """
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise ValueError(f"{self.path_stem}: document {self.num_documents} has {ids.dtype} ids: pass integers")
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            position = int(outside.argmax())
            raise ValueError(
                f"{self.path_stem}: token {position} of document {self.num_documents} is {ids[position]}, outside the "
                f"vocabulary of {self.vocab_size}: use the tokenizer that belongs to the model"
            )
        if self._mask is not None:
            marked = np.asarray(mask, dtype=bool)
            assert marked.shape == ids.shape
            self._mask += marked.tobytes()
        with naming(corpus_files(self.path_stem)[0]):
            self._bin_file.write(ids.astype(_DTYPES[self._dtype_code]).tobytes())
        self._sizes.append(ids.size)
        self.num_tokens += ids.size

    def _publish(self) -> None:
        if self.num_tokens == 0:
            raise ValueError(f"{self.path_stem} would hold no tokens: add at least one document that is not empty")
        _sync_and_close(self._bin_file)
        index = self._index()
        _write(self._idx_temporary, index)
        bin_path, idx_path = corpus_files(self.path_stem)
        if self._mask is not None:
            _write(self._mask_temporary, mask_header(self.num_tokens, index) + self._mask)
        # Without its index an old corpus cannot be read, so no reader ever sees the new .bin with the old .idx.
        idx_path.unlink(missing_ok=True)
        corpus_record(self.path_stem).unlink(missing_ok=True)
        mask_file(self.path_stem).unlink(missing_ok=True)
        os.replace(self._bin_temporary, bin_path)
        if self._mask is not None:
            os.replace(self._mask_temporary, mask_file(self.path_stem))
        os.replace(self._idx_temporary, idx_path)

    def _index(self) -> bytes:
        sizes = np.array(self._sizes, dtype="<i4")
        ends = sizes.cumsum(dtype="<i8")
        pointers = (ends - sizes) * _DTYPES[self._dtype_code].itemsize
        document_indices = np.arange(len(sizes) + 1, dtype="<i8")
        header = _HEADER.pack(_MAGIC, _VERSION, self._dtype_code, len(sizes), len(document_indices))
        return b"".join([header, sizes.tobytes(), pointers.tobytes(), document_indices.tobytes()])


class _Index(NamedTuple):
    dtype: np.dtype[Any]
    sizes: NDArray[np.int32]  # tokens of each sequence
    pointers: NDArray[np.int64]  # byte in .bin at which each sequence starts
    document_indices: NDArray[np.int64]  # document i is the sequences [i] .. [i + 1] - 1


def corpus_stem(path: str | Path) -> Path:
    """The name that a corpus's files share, by itself or by one of them."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def corpus_files(stem: Path) -> tuple[Path, Path]:
    """The .bin and the .idx of a corpus, by the name that they share."""
    return stem.parent / f"{stem.name}.bin", stem.parent / f"{stem.name}.idx"


def _check_replaceable(idx_path: Path) -> None:
    """Raise ValueError if what bears the name of a corpus's index is something else."""
    if not idx_path.exists():
        return
    with open(idx_path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{idx_path} is no corpus that a new one could replace: remove it, or choose another name")


def _require_files(given: Path, bin_path: Path, idx_path: Path) -> None:
    missing = [path for path in (bin_path, idx_path) if not path.is_file()]
    if missing and given.is_dir():
        raise ValueError(
            f"{given} is a folder: name the corpus in it, as in {given / 'train'} for train.bin and train.idx"
        )
    if missing:
        raise ValueError(
            f"{missing[0]} is missing: a corpus is a .bin and an .idx file side by side, so copy or build both"
        )


def _read_index(path: Path) -> _Index:
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(f"{path} is cut short in its header: copy or build the corpus again")
    magic, version, dtype_code, num_sizes, num_document_indices = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ValueError(
            f"{path} starts with {magic!r}, not {_MAGIC!r}: pass a Megatron token corpus, or build one from text"
        )
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}, and only version {_VERSION} is known: build the corpus again")
    if dtype_code not in _DTYPES:
        raise ValueError(f"{path} has dtype code {dtype_code}, which is no integer type: build the corpus again")
    needed_bytes, found_bytes = _HEADER.size + 12 * num_sizes + 8 * num_document_indices, path.stat().st_size
    if found_bytes < needed_bytes:
        raise ValueError(
            f"{path} is cut short at {found_bytes} of {needed_bytes} bytes: copy or build the corpus again"
        )
    raw = np.memmap(path, dtype=np.uint8, mode="r")[_HEADER.size : needed_bytes]
    sizes, pointers = raw[: 4 * num_sizes].view("<i4"), raw[4 * num_sizes : 12 * num_sizes].view("<i8")
    document_indices = _with_end(raw[12 * num_sizes :].view("<i8"), num_sizes)
    if num_document_indices == 0 or document_indices[0] != 0 or document_indices[-1] != num_sizes:
        raise ValueError(f"{path} has documents that do not cover its {num_sizes} sequences: build the corpus again")
    if num_sizes and sizes.min() < 0:
        raise ValueError(f"{path} has a document of less than 0 tokens: build the corpus again")
    if (np.diff(document_indices) < 0).any():
        raise ValueError(f"{path} has documents that are out of order: build the corpus again")
    lengths_bytes = sizes.astype(np.int64) * _DTYPES[dtype_code].itemsize
    if not np.array_equal(pointers, lengths_bytes.cumsum() - lengths_bytes):
        raise ValueError(f"{path} has sequences that do not lie back to back: build the corpus again")
    return _Index(_DTYPES[dtype_code], sizes, pointers, document_indices)


def _with_end(document_indices: NDArray[np.int64], num_sizes: int) -> NDArray[np.int64]:
    """The indices with the closing `num_sizes`, which the released make_data_hf.py leaves out: it stores 0 .. n - 1 for
    n documents of one sequence each."""
    if num_sizes and np.array_equal(document_indices, np.arange(num_sizes)):
        return np.append(document_indices, num_sizes)
    return document_indices


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        _sync_and_close(file)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
