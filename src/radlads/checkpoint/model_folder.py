"""A model on disk: config.json and safetensors, as transformers lays them out."""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from radlads.checkpoint.atomic import read_json
from radlads.checkpoint.manifest import check_model_files
from radlads.checkpoint.published import (
    ARCHITECTURES,
    UsedWeights,
    published_config,
    published_kind,
    untie_if_head_differs,
)
from radlads.checkpoint.safetensors_writer import SHARD_BYTES, file_order, shards_of, write_safetensors, write_shards
from radlads.checkpoint.weights import (
    WEIGHTS_FILE,
    CastWeights,
    ModelWeights,
    SafetensorsFolder,
    StoredWeights,
    load_strict,
)
from radlads.config.sizes import sizes_of
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import is_registered


def save_model(
    model: RadladsForCausalLM,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    weights: StoredWeights | None = None,
) -> None:
    """Write the model's config.json and weights (in `dtype`, default: their own) into a folder that exists.

    The weights are one file, or shards of at most `shard_bytes` where one is not enough. `weights`: others of the same
    names, instead of the model's own.
    """
    model.config.architectures = [type(model).__name__]
    weights = CastWeights(ModelWeights(model) if weights is None else weights, dtype)
    model.config.dtype = weights.info(next(iter(weights))).dtype
    model.config.save_pretrained(folder)
    if shard_bytes is None:
        write_safetensors(weights, list(weights), folder / WEIGHTS_FILE)
    else:
        write_shards(weights, folder, shard_bytes=shard_bytes)


def take_part_in_saving(model: RadladsForCausalLM, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Gather a sharded model's tensors where another process writes them by save_model in shards of that size."""
    weights = ModelWeights(model)
    for names in shards_of(weights, shard_bytes):
        for name in file_order(weights, names):
            weights[name]


class StoredModel(NamedTuple):
    """A model folder that is open: `weights` are all its tensors, `used` those that the model computes with."""

    config: RadladsConfig
    weights: StoredWeights
    used: StoredWeights


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32, verify: bool = False) -> RadladsForCausalLM:
    """The model of a folder that save_model or an export wrote, or of a published checkpoint, in evaluation mode.

    Raises ValueError as open_checked, and for weights that do not fit (load_strict).
    """
    stored = open_checked(folder, verify=verify)
    model = unfilled_model(stored.config, dtype)
    load_strict(model, stored.used, folder)
    return model.eval()


def open_checked(folder: Path, *, verify: bool = False) -> StoredModel:
    """open_model, once its files are found to be those that hashes beside them describe (check_model_files). Raises
    ValueError. verify: every byte of an export too."""
    check_model_files(folder, whole=verify)
    return open_model(folder)


def unfilled_model(config: RadladsConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> RadladsForCausalLM:
    """A model on `device` whose parameters are yet to be filled, all of them."""
    model = unplaced_model(config, dtype)
    if model.device.type != "meta":
        return model.to(device)  # type: ignore[arg-type]
    model.to_empty(device=device)
    model.tie_weights()
    return model


def unplaced_model(config: RadladsConfig, dtype: torch.dtype) -> RadladsForCausalLM:
    """A model on the meta device, as initial values would take minutes. One with a user's own mixer, which may have
    buffers, is on the CPU and has them."""
    if not is_registered(config):
        return RadladsForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = RadladsForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    assert not list(model.buffers()), "their values would be lost"
    return model


def open_model(folder: Path) -> StoredModel:
    """A model folder's configuration and its tensors, of which none is read yet.

    Raises ValueError for a folder that is none, another architecture, sizes that make no model, and weights that are
    missing or unreadable.
    """
    values = read_config(folder, RadladsForCausalLM.__name__, *ARCHITECTURES)
    config, weights = config_of(values, folder), SafetensorsFolder(folder)
    if published_kind(values) is None:
        return StoredModel(config, weights, weights)
    untie_if_head_differs(config, weights)
    return StoredModel(config, weights, UsedWeights(weights, config))


def config_of(values: dict, folder: Path) -> RadladsConfig:
    """The configuration that our or a published config.json's values are. Raises ValueError for one of no model."""
    try:
        sizes_of(values)
        return RadladsConfig.from_dict(values) if published_kind(values) is None else published_config(values, folder)
    except (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"{folder}/config.json describes no model that can be read here: {reason}") from error


def read_config(folder: Path, *architectures: str) -> dict:
    """A folder's config.json as a dictionary. Raises ValueError if missing, no JSON, or of another architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    values = read_json(path)
    found = values.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} is not a model's configuration: copy it anew")
    if not set(found) & set(architectures):
        named = ", ".join(found) or "no architecture"
        raise ValueError(f"{path} names {named}, but only {' and '.join(architectures)} can be read here")
    return values
