"""Weights by name: safetensors, a folder's or a file's, read tensor by tensor; and filling a model with them."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types of numbers."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorInfo(NamedTuple):
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StoredWeights(Mapping[str, torch.Tensor]):
    """Tensors on disk by name; each is read when asked for, and may be a view of the file: do not keep many."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and type of a tensor, which is not read."""


class SafetensorsFolder(StoredWeights):
    """The tensors of a folder's safetensors files, or of one such file, by name.

    Raises ValueError if the folder holds no weights, a shard is missing, or a file is truncated or not safetensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of = _tensor_files(folder)

    def __getitem__(self, name: str) -> torch.Tensor:
        with _opened(self._file_of[name]) as file:
            return _present(file, name, self._file_of[name]).get_tensor(name)

    def info(self, name: str) -> TensorInfo:
        with _opened(self._file_of[name]) as file:
            stored = _present(file, name, self._file_of[name]).get_slice(name)
            return TensorInfo(tuple(stored.get_shape()), _DTYPES[stored.get_dtype()])

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def load_strict(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], origin: Path | str) -> None:
    """Copy `weights` into every parameter of `model`; each must be there, have its shape and be finite.

    Raises ValueError that names the tensor for one missing, unexpected, wrongly shaped, or with NaN or infinity.
    """
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() - weights.keys()):
        raise ValueError(f"{origin} lacks {_some(missing)}, which the model has: is it the checkpoint of this model?")
    if unexpected := sorted(weights.keys() - parameters.keys()):
        raise ValueError(
            f"{origin} holds {_some(unexpected)}, which the model lacks: is it the checkpoint of this model?"
        )
    for name, parameter in parameters.items():
        copy_checked(parameter, weights[name], name, origin)


def copy_checked(parameter: torch.nn.Parameter, tensor: torch.Tensor, name: str, origin: Path | str) -> None:
    """Copy a tensor into a parameter. Raises ValueError for another shape, NaN or infinity."""
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{name} in {origin} has shape {tuple(tensor.shape)}, but the model needs {tuple(parameter.shape)}: "
            "is it the checkpoint of this model?"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} in {origin} holds NaN or infinity: the checkpoint is broken, take an earlier one")
    with torch.no_grad():
        parameter.copy_(tensor)


def _tensor_files(folder: Path) -> dict[str, Path]:
    if folder.is_file():
        with _opened(folder) as file:
            return dict.fromkeys(file.keys(), folder)
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        try:
            shards = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors shards: copy it anew") from error
        return {name: _existing(folder / shard) for name, shard in shards.items()}
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} holds no weights: {WEIGHTS_FILE} (or {WEIGHTS_INDEX} and its shards) is missing")
    with _opened(folder / WEIGHTS_FILE) as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS_FILE)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy all shards that {WEIGHTS_INDEX} names")
    return path


def _present(file, name: str, path: Path):
    if name not in set(file.keys()):
        raise ValueError(f"{path} lacks {name}, which {WEIGHTS_INDEX} says it holds: copy the folder anew")
    return file


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): copy it anew") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
