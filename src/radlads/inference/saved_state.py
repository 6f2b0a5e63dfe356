"""A text that has been read: its state in memory, and as a file that another process goes on from.

A state file is a safetensors file: the state after the last whole piece of PREFILL_TOKENS, the tokens since then (at
least one, at most a piece), and as metadata the model's fingerprint and a digest of the tensors. The last tokens are
read again when the text goes on, so that pieces fall as they would have without the file, bit for bit.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from radlads.checkpoint.atomic import unfinished_file
from radlads.checkpoint.safetensors_writer import write_safetensors
from radlads.checkpoint.weights import HeldTensors, SafetensorsFolder
from radlads.inference.finite import NotFinite
from radlads.inference.prefill import PREFILL_TOKENS, prefill
from radlads.model.cache import RadladsCache, RecurrentCacheLayer
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

FORMAT = "radlads-state-1"
_SAMPLED_VALUES = 256


@dataclass(frozen=True)
class ReadText:
    """One text's tokens: `cache` is the state after all but the last ones, which `tail` holds (at least one)."""

    cache: RadladsCache
    tail: list[int]

    @property
    def num_tokens(self) -> int:
        return self.cache.get_seq_length() + len(self.tail)

    def rows(self, count: int) -> RadladsCache:
        """A copy of the state, `count` times over, for as many continuations."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        return cache


def read_text(model: RadladsForCausalLM, token_ids: Sequence[int], after: ReadText | None = None) -> ReadText:
    """Read a text, or more of the one `after`, which stays as it is. Raises ValueError if there is no token."""
    tokens = [*(after.tail if after else ()), *token_ids]
    if not tokens:
        raise ValueError("the prompt is empty: give at least one token to read")
    cache = after.rows(1) if after else RadladsCache(model.config)
    num_whole = (len(tokens) - 1) // PREFILL_TOKENS * PREFILL_TOKENS
    if num_whole:
        prefill(model, torch.tensor([tokens[:num_whole]], device=model.device), cache=cache)
    return ReadText(cache, tokens[num_whole:])


def check_finite(model: RadladsForCausalLM, read: ReadText) -> None:
    """Read a text to its end, tail and all, and raise NotFinite if the logits there are not finite."""
    prefill(model, torch.tensor([read.tail], device=model.device), cache=read.rows(1))


def fingerprint(folder: Path, config: RadladsConfig) -> str:
    """A digest of a model folder that differs wherever states do: the sizes, and of every stored tensor its name, shape
    and 256 values or more from all over it.

    Headers and sizes alone are the same for all stages of a conversion; a hash of all bytes would read as long again as
    the model takes to load.
    """
    digest = hashlib.sha256(json.dumps(_decisive(config), sort_keys=True).encode())
    weights = SafetensorsFolder(folder)
    for name in sorted(weights):
        values = weights[name].reshape(-1)
        step = max(1, values.numel() // _SAMPLED_VALUES)
        digest.update(f"{name} {weights.info(name).shape}".encode())
        digest.update(_bytes(values[::step].float()))
    return digest.hexdigest()


def save_state(read: ReadText, model_fingerprint: str, path: Path) -> int:
    """Write a text's state under a name that does not exist yet; the file's bytes.

    Errors as unfinished_file, and NotFinite for a state that is not finite.
    """
    tensors = _tensors(read)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise NotFinite(read.cache.get_seq_length(), "states")
    with unfinished_file(path) as partial:
        metadata = {"format": FORMAT, "fingerprint": model_fingerprint, "sha256": _digest(tensors)}
        write_safetensors(HeldTensors(tensors), list(tensors), partial, metadata=metadata)
    return path.stat().st_size


def load_state(model: RadladsForCausalLM, model_fingerprint: str, path: Path) -> ReadText:
    """The text whose state save_state wrote, on the model's device and in its dtype.

    Raises ValueError for a file that is missing, truncated, damaged, no state, or another model's state.
    """
    tensors = _stored(path, model_fingerprint)
    tail = tensors.pop("tail").tolist()
    cache = RadladsCache(model.config)
    if tensors:
        _fill(cache, tensors, model)
    return ReadText(cache, tail)


def _decisive(config: RadladsConfig) -> dict[str, object]:
    """What of a configuration decides a state: our own fields, which do not change with transformers' version. A model
    whose mixers have no settings of their own has the fingerprint that it had before there were any."""
    values = {name: getattr(config, name) for name in RadladsConfig.__annotations__ if name in config.__dict__}
    return {name: value for name, value in values.items() if name != "mixer_settings" or value}


def _tensors(read: ReadText) -> dict[str, torch.Tensor]:
    tensors = {"tail": torch.tensor(read.tail)}
    if read.cache.next_positions is not None:
        tensors["next_positions"] = read.cache.next_positions
        for index, layer in enumerate(read.cache.layers):
            tensors |= {f"layers.{index}.{name}": x for name, x in _held(layer).items() if x is not None}
    return {name: x.cpu().contiguous() for name, x in tensors.items()}


def _held(layer: Any) -> dict[str, torch.Tensor | None]:
    if isinstance(layer, RecurrentCacheLayer):
        assert layer.state is not None
        return layer.state._asdict()
    return {"keys": layer.keys, "values": layer.values}


def _stored(path: Path, model_fingerprint: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is no state file: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no state file ({error}): read the text anew") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no state file of this version: give one that --save-state wrote")
    if metadata.get("fingerprint") != model_fingerprint:
        raise ValueError(f"{path} is the state of another model: read the text with this one")
    if metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is damaged: read the text anew")
    return tensors


def _fill(cache: RadladsCache, tensors: Mapping[str, torch.Tensor], model: RadladsForCausalLM) -> None:
    """Put stored tensors into an empty cache; what a mixer's state is made of is seen by running one token."""
    _, example = prefill(model, torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    positions = tensors["next_positions"].to(model.device)
    for index, layer in enumerate(example.layers):
        held = {name: _like(x, tensors, f"layers.{index}.{name}") for name, x in _held(layer).items()}
        if isinstance(layer, RecurrentCacheLayer):
            cache.store(index, type(layer.state)(**held), int(positions))  # type: ignore[misc]
        else:
            cache.update(held["keys"], held["values"], index)
    cache.next_positions = positions


def _like(example: torch.Tensor | None, tensors: Mapping[str, torch.Tensor], name: str) -> Any:
    return None if example is None else tensors[name].to(example.device, example.dtype)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
