"""Samples from corpora that are looked at each time: a file that was cut short kills whoever reads its mapping, and one
that was overwritten gives another corpus's tokens."""

from collections.abc import Iterable

from torch import Tensor
from torch.utils.data import Dataset

from radlads.data.binidx import BinIdxReader, corpus_files
from radlads.data.identity import samples_digest


class WatchedCorpora(Dataset[Tensor]):
    """The samples `first`, `first` + 1, ... of a dataset that reads mapped corpora.

    An item raises ValueError if the .bin file of a corpus has gone, changed its size, or was written to and holds
    other tokens. Pages of a shorter file may be gone: the system ends a process that reads them by SIGBUS, without a
    word.
    """

    def __init__(self, samples: Dataset[Tensor], corpora: Iterable[BinIdxReader], *, first: int = 0) -> None:
        self._samples, self._first = samples, first
        self._files = [_WatchedFile(reader) for reader in corpora]

    def __len__(self) -> int:
        return len(self._samples) - self._first  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Tensor:
        i = range(len(self))[i]
        for file in self._files:
            file.check()
        return self._samples[self._first + i]


class _WatchedFile:
    """A corpus's .bin file as it was: its size, when it was last written, and a hash of samples of it."""

    def __init__(self, reader: BinIdxReader) -> None:
        self._path = corpus_files(reader.path_stem)[0]
        self._num_bytes = reader.num_tokens * reader.dtype.itemsize
        self._written_ns = self._path.stat().st_mtime_ns
        self._samples = samples_digest(self._path)

    def check(self) -> None:
        found = self._path.stat() if self._path.is_file() else None
        if found is None or found.st_size != self._num_bytes:
            state = "is gone" if found is None else f"has {found.st_size} bytes now"
            raise self._error(f"{state}, and had {self._num_bytes}")
        if found.st_mtime_ns == self._written_ns:
            return
        if samples_digest(self._path) != self._samples:
            raise self._error("holds other tokens now than")
        self._written_ns = found.st_mtime_ns

    def _error(self, state: str) -> ValueError:
        return ValueError(
            f"{self._path} {state} when the stage began: put it back as it was, and start the same command again to go "
            "on from the last checkpoint"
        )
