"""A model on disk: config.json and safetensors, as transformers lays them out."""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError

from radlads.checkpoint.config_values import check_values
from radlads.checkpoint.described_weights import check_described, keep_own_head
from radlads.checkpoint.foreign_folders import refuse_adapter, refuse_quantised
from radlads.checkpoint.manifest import check_model_files
from radlads.checkpoint.mixer_code import check_brought
from radlads.checkpoint.published import (
    ARCHITECTURE_OF,
    ARCHITECTURES,
    UsedWeights,
    published_config,
    published_kind,
)
from radlads.checkpoint.safetensors_files import WEIGHTS_FILE
from radlads.checkpoint.safetensors_writer import SHARD_BYTES, file_order, shards_of, write_safetensors, write_shards
from radlads.checkpoint.strict_loading import check_fit, load_strict
from radlads.checkpoint.weights import CastWeights, ModelWeights, SafetensorsFolder, StoredWeights, TiedWeights
from radlads.files import read_json
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import is_registered

STUDENT_ARCHITECTURES = (RadladsForCausalLM.__name__, *ARCHITECTURES)
"""Of the folders that open_model opens: ours, and the published ones."""
_ARCHITECTURE_OF = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    RadladsConfig.model_type: RadladsForCausalLM.__name__,
    **ARCHITECTURE_OF,
}


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
    """open_model, once its files are found to be those that hashes beside them describe (check_model_files).

    verify: every byte of an export too. Raises ValueError, also for weights that do not fit a model of ours, for which
    no memory is taken then, and for a mixer whose code nobody but the folder has.
    """
    check_model_files(folder, whole=verify)
    stored = open_model(folder)
    check_brought(stored.config, folder)
    if is_registered(stored.config):
        check_fit(unplaced_model(stored.config, torch.float32), stored.used, folder)
    return stored


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

    A head that is stored beside the embedding is used where the two differ, whatever config.json says. Raises
    ValueError for a folder that is none, another architecture, sizes that make no model, and weights that are missing,
    unreadable, quantised or of other sizes.
    """
    values = read_config(folder, *STUDENT_ARCHITECTURES)
    config, weights = config_of(values, folder), SafetensorsFolder(folder)
    check_described(config, weights, folder)
    keep_own_head(config, weights)
    if published_kind(values) is not None:
        return StoredModel(config, weights, UsedWeights(weights, config))
    return StoredModel(config, weights, TiedWeights(weights) if config.tie_word_embeddings else weights)


def config_of(values: dict, folder: Path) -> RadladsConfig:
    """The configuration that our or a published config.json's values are, less the code that the folder brings along.

    Raises ValueError for one of no model.
    """
    try:
        check_values(values)
        if published_kind(values) is not None:
            return published_config(values, folder)
        return RadladsConfig.from_dict({key: value for key, value in values.items() if key != "auto_map"})
    except (StrictDataclassError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"{folder}/config.json describes no model that can be read here: {reason}") from error


def read_config(folder: Path, *architectures: str) -> dict:
    """A folder's config.json as a dictionary, with an architecture of these.

    Raises ValueError if it is missing, no JSON, or of another architecture, and for adapters and quantised models.
    """
    refuse_adapter(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    values = read_json(path)
    found = architectures_of(values)
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} is not a model's configuration: copy it anew")
    if not set(found) & set(architectures):
        named = ", ".join(found) or "no architecture"
        raise ValueError(f"{path} names {named}, but only {' and '.join(architectures)} can be read here")
    refuse_quantised(values, folder)
    return values | {"architectures": found}


def architectures_of(values: dict) -> list[str]:
    """The architectures that a config.json's values name; the one of its model_type if they name none."""
    found = values.get("architectures")
    if not found:
        found = _ARCHITECTURE_OF.get(str(values.get("model_type")))
    return found if isinstance(found, list) else [found] if found else []
