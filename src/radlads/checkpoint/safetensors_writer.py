"""Writing weights as safetensors, tensor by tensor: one file, or shards with their index."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from radlads.checkpoint.safetensors_files import WEIGHTS_FILE, WEIGHTS_INDEX
from radlads.checkpoint.weights import DTYPE_NAMES, StoredWeights
from radlads.files import write_text

SHARD_BYTES = 5 * 10**9
FORMAT = {"format": "pt"}


def write_shards(weights: StoredWeights, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights into a folder that exists: shards and their index, or one file where one is enough."""
    shards = shards_of(weights, shard_bytes)
    if len(shards) == 1:
        write_safetensors(weights, shards[0], folder / WEIGHTS_FILE)
        return
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(weights, names, folder / file)
        file_of |= dict.fromkeys(names, file)
    total_bytes = sum(weights.info(name).num_bytes for name in weights)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}
    write_text(folder / WEIGHTS_INDEX, json.dumps(index, indent=2) + "\n")


def write_safetensors(
    weights: StoredWeights, names: Sequence[str], path: Path, *, metadata: Mapping[str, str] = FORMAT
) -> None:
    """Write these tensors as one safetensors file, reading each when its turn has come.

    Raises ValueError for a type of numbers that safetensors lacks, and OSError if the disk is full (safetensors' own
    writer raises SafetensorError there).
    """
    infos = {name: weights.info(name) for name in names}
    order = file_order(weights, names)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        shape, dtype = infos[name]
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} holds {dtype}, which safetensors has no name for: convert it to a float type")
        begin, end = end, end + infos[name].num_bytes
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(weights[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def file_order(weights: StoredWeights, names: Iterable[str]) -> list[str]:
    """The order in which a file holds tensors: wide types first, so that each is aligned to its own width."""
    return sorted(names, key=lambda name: (-weights.info(name).dtype.itemsize, name))


def shards_of(weights: StoredWeights, shard_bytes: int) -> list[list[str]]:
    """The names in order, divided into shards of at most `shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in weights:
        num_bytes = weights.info(name).num_bytes
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards
