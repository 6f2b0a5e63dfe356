"""Samples from corpora that are looked at each time: a file that was cut short kills whoever reads its mapping."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from radlads.data.binidx import BinIdxReader


class WatchedCorpora(Dataset[Tensor]):
    """The samples `first`, `first` + 1, ... of a dataset that reads mapped corpora.

    An item raises ValueError if the .bin file of a corpus has gone or changed its size: its pages may be gone too,
    and the system ends a process that reads them by SIGBUS, without a word.
    """

    def __init__(self, samples: Dataset[Tensor], corpora: Iterable[BinIdxReader], *, first: int = 0) -> None:
        self._samples, self._first = samples, first
        self._bytes = {
            reader.path_stem.parent / f"{reader.path_stem.name}.bin": reader.num_tokens * reader.dtype.itemsize
            for reader in corpora
        }

    def __len__(self) -> int:
        return len(self._samples) - self._first  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Tensor:
        i = range(len(self))[i]
        for path, num_bytes in self._bytes.items():
            _check_size(path, num_bytes)
        return self._samples[self._first + i]


def _check_size(path: Path, num_bytes: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != num_bytes:
        state = "is gone" if found is None else f"has {found} bytes now"
        raise ValueError(
            f"{path} {state}, and had {num_bytes} when the stage began: put it back as it was, and start the same "
            "command again to go on from the last checkpoint"
        )
