"""`.pth` files: a plain state dict as torch.save writes it, read and written without ever holding all of it.

Both ways go through a mapping of the file into memory, which is made anew every REMAP_BYTES: pages that were touched
count as the process's own for as long as their mapping lives.
"""

import contextlib
import mmap
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from radlads.checkpoint.atomic import unfinished_file
from radlads.checkpoint.weights import StoredWeights, TensorInfo

REMAP_BYTES = 2**29


class PthFile(StoredWeights):
    """The tensors of a `.pth` file by name. Nothing in the file is executed.

    Raises ValueError if the file is missing, truncated, asks for code to be run, or holds anything but tensors by name.
    """

    def __init__(self, path: Path):
        self.path = path
        self._tensors = _mapped(path)
        self._infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self._touched_bytes = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._touched_bytes > REMAP_BYTES:
            self._tensors, self._touched_bytes = _mapped(self.path), 0
        self._touched_bytes += self._infos[name].num_bytes
        return self._tensors[name]

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def write_pth(weights: StoredWeights, path: Path) -> None:
    """Write the tensors as a `.pth` file, which torch.load(path, weights_only=True) reads.

    Raises ValueError if `path` exists, and OSError if the disk is full; nothing is left under its name then. Checksums
    inside the file are left out, which torch does not look at.
    """
    infos = {name: weights.info(name) for name in weights}
    with unfinished_file(path) as partial:
        with _as_os_error(path):
            _write_without_data(infos, partial)
        _reserve(partial)
        for names in _portions(infos):
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                tensors = _mapped(partial)
            for name in names:
                tensors[name].copy_(weights[name])
            del tensors


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: name the .pth file itself")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights, such as code to be run, or is damaged, and was not read: take a "
            "checkpoint that is a plain state dict, from a source you trust"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # of a damaged pickle torch raises whatever its reading runs into
        raise ValueError(
            f"{path} is truncated or damaged, or not a .pth file that torch.save (1.6 or newer) wrote: copy it anew"
        ) from error
    if not isinstance(tensors, Mapping) or not tensors:
        raise ValueError(f"{path} holds no tensors by name: save the model's state_dict() itself")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path} holds {name!r}, which is no tensor: save the model's state_dict() itself")
    return dict(tensors)


def _write_without_data(infos: dict[str, TensorInfo], path: Path) -> None:
    """The file at its full size, with everything in place but the tensors' numbers."""
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        empty = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
        torch.save(empty, path)


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """torch.save reports a disk that is full or read-only as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: is the disk full, or the folder read-only?") from error


def _reserve(path: Path) -> None:
    """Have the disk set the file's space aside: writing to a mapping beyond it would end the process by a signal."""
    if sys.platform != "linux":
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _portions(infos: dict[str, TensorInfo]) -> Iterator[list[str]]:
    """Names in order, in lists of about REMAP_BYTES."""
    names: list[str] = []
    num_bytes = 0
    for name, info in infos.items():
        names.append(name)
        num_bytes += info.num_bytes
        if num_bytes > REMAP_BYTES:
            yield names
            names, num_bytes = [], 0
    if names:
        yield names
