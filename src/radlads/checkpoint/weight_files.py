"""Weights from one file format into another, tensor by tensor: memory holds one, whatever the checkpoint's size."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from radlads.checkpoint.atomic import unfinished_file, unfinished_folder, write_text
from radlads.checkpoint.hf_export import copy_all_but_weights
from radlads.checkpoint.pth import PthFile, write_pth
from radlads.checkpoint.weights import DTYPE_NAMES, WEIGHTS_FILE, WEIGHTS_INDEX, SafetensorsFolder, StoredWeights

SHARD_BYTES = 5 * 10**9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def open_weights(path: Path) -> StoredWeights:
    """The tensors of a `.pth` file, a `.safetensors` file or a folder of the latter. Raises ValueError for others."""
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return SafetensorsFolder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a .pth file, a .safetensors file or a model folder")
    return PthFile(path)


def is_weights_file(path: Path) -> bool:
    """True for the name of a weights file, as against a model folder's or a hub name."""
    return path.suffix in (".pth", ".safetensors") and not path.is_dir()


def convert_to_pth(source: Path, target: Path) -> None:
    """Write the weights of a folder or file as a `.pth` file. Errors as open_weights and write_pth."""
    write_pth(open_weights(source), target)


def convert_to_safetensors(source: Path, target: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights of a `.pth` file, or others, as `target`: a `.safetensors` file or else a folder of shards.

    A folder's shards hold at most `shard_bytes` (one tensor at least); where the source is a model folder too, the rest
    of the model comes along, so that AutoModelForCausalLM can load it. Raises ValueError if `target` exists or the
    weights cannot be read, and OSError if the disk is full; nothing is left under its name then.
    """
    weights = open_weights(source)
    if target.suffix == ".safetensors":
        with unfinished_file(target) as partial:
            write_safetensors(weights, list(weights), partial)
        return
    with unfinished_folder(target) as partial:
        write_shards(weights, partial, shard_bytes=shard_bytes)
        if source.is_dir():
            copy_all_but_weights(source, partial)


def write_shards(weights: StoredWeights, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights into a folder that exists: shards and their index, or one file where one is enough."""
    shards = _shards(weights, shard_bytes)
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


def write_safetensors(weights: StoredWeights, names: Sequence[str], path: Path) -> None:
    """Write these tensors as one safetensors file, reading each when its turn has come.

    Raises ValueError for a type of numbers that safetensors lacks.
    """
    infos = {name: weights.info(name) for name in names}
    # Wide types first, so that every tensor is aligned to its own width
    order = sorted(names, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000. Raises ValueError for other text and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", text.strip().upper())
    num_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if num_bytes < 1:
        raise ValueError(f"a shard's size is given as 5GB, 500MB or a number of bytes, not {text!r}")
    return num_bytes


def _shards(weights: StoredWeights, shard_bytes: int) -> list[list[str]]:
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
