"""Weights by name, read tensor by tensor: a model's, a safetensors folder's or file's, and views of other weights.

Also the rows of a sharded parameter that this process holds.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from radlads.checkpoint.safetensors_files import opened, tensor_files

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


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types that weights are stored in; fewer bits need scales, which only quantised models' own code knows."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


class ModelWeights(StoredWeights):
    """A model's parameters by name, each on the CPU when it is asked for. A head that is the embedding is left out.

    All processes have to ask for a sharded one, in the same order.
    """

    def __init__(self, model: torch.nn.Module):
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self._parameters[name].shape), self._parameters[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class HeldTensors(StoredWeights):
    """Tensors by name, each on the CPU when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().cpu()

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(tuple(self._tensors[name].shape), self._tensors[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class CastWeights(StoredWeights):
    """Other weights with floating-point tensors in `dtype`; all as they are if it is None."""

    def __init__(self, weights: StoredWeights, dtype: torch.dtype | None):
        self._weights, self._dtype = weights, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[name].to(self.info(name).dtype)

    def info(self, name: str) -> TensorInfo:
        stored = self._weights.info(name)
        if self._dtype is None or not stored.dtype.is_floating_point:
            return stored
        return stored._replace(dtype=self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class SelectedWeights(StoredWeights):
    """Some of other weights, by name."""

    def __init__(self, weights: StoredWeights, names: Iterable[str]):
        self._weights, self._names = weights, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._weights[name]

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TiedWeights(SelectedWeights):
    """Other weights without the head: for models whose embedding is the head."""

    def __init__(self, weights: StoredWeights):
        super().__init__(weights, (name for name in weights if name != HEAD))


class SafetensorsFolder(StoredWeights):
    """The tensors of a folder's safetensors files, or of one such file, by name.

    Raises ValueError as tensor_files does.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file_of = tensor_files(folder)
        self._described: dict[Path, dict[str, tuple[tuple[int, ...], str]]] = {}
        if not self._file_of:
            raise ValueError(f"{folder} holds no weights: copy it anew")

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # Mapping's own reads the tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        with opened(self._file_of[name]) as file:
            return file.get_tensor(name)

    def info(self, name: str) -> TensorInfo:
        path = self._file_of[name]
        if path not in self._described:  # a header at a time: opening a file takes longer than reading its header
            self._described[path] = _shapes_and_kinds(path)
        shape, kind = self._described[path][name]
        if kind not in _DTYPES:
            raise ValueError(
                f"{name} in {path} holds {kind}, which is not supported: "
                "take a checkpoint in bf16 or another float type"
            )
        return TensorInfo(shape, _DTYPES[kind])

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class RowShards(StoredWeights):
    """Tensors whose rows are spread over several files, in their order; a tensor without rows is the first file's."""

    def __init__(self, shards: Sequence[StoredWeights]):
        self._shards = shards

    def __contains__(self, name: object) -> bool:
        return name in self._shards[0]

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [shard[name] for shard in self._shards if name in shard]
        if not parts:
            raise KeyError(name)
        return torch.cat(parts) if parts[0].ndim and len(parts) > 1 else parts[0]

    def info(self, name: str) -> TensorInfo:
        infos = [shard.info(name) for shard in self._shards if name in shard]
        shape = infos[0].shape
        rows = (sum(each.shape[0] for each in infos), *shape[1:]) if shape else shape
        return infos[0]._replace(shape=rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards[0])

    def __len__(self) -> int:
        return len(self._shards[0])


class PrefixedWeights(StoredWeights):
    """Those of other weights whose names begin with `prefix`, by the rest of their names."""

    def __init__(self, weights: StoredWeights, prefix: str):
        self._weights, self._prefix = weights, prefix
        self._names = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[self._prefix + name]

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what this process holds of a sharded one; of the same memory, without gradients."""
    with torch.no_grad():  # else reading a shard costs ten times as much, as something to record
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def own_rows(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The rows of `whole` that this process holds where `parameter` is sharded; all of them where it is not."""
    return rows_of(whole, parameter.device_mesh) if isinstance(parameter, DTensor) else whole


def rows_of(whole: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This process's of as many groups of rows as the mesh has processes, as torch's Shard(0) cuts them."""
    chunks, rank = whole.chunk(mesh.size()), mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]


def _shapes_and_kinds(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors' name for the type of every tensor of a file."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        return {name: (tuple(stored.get_shape()), stored.get_dtype()) for name, stored in slices.items()}
