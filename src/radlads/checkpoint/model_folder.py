"""A model on disk: config.json and safetensors, as transformers lays them out."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from radlads.checkpoint.published import (
    ARCHITECTURES,
    UsedWeights,
    published_config,
    published_kind,
    untie_if_head_differs,
)
from radlads.checkpoint.weights import WEIGHTS_FILE, SafetensorsFolder, StoredWeights, load_strict
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM


def save_model(model: RadladsForCausalLM, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the model's config.json and weights (in `dtype`, default: their own) into a folder that exists."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype or next(model.parameters()).dtype
    model.config.save_pretrained(folder)
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.named_parameters()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> RadladsForCausalLM:
    """The model of a folder that save_model or an export wrote, or of a published checkpoint, in evaluation mode.

    Raises ValueError for a folder that is none, another architecture, and weights that do not fit (load_strict).
    """
    values = read_config(folder, RadladsForCausalLM.__name__, *ARCHITECTURES)
    weights: StoredWeights = SafetensorsFolder(folder)
    if published_kind(values):
        config = published_config(values, folder)
        untie_if_head_differs(config, weights)
        weights = UsedWeights(weights, config)
    else:
        config = RadladsConfig.from_dict(values)
    model = RadladsForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    load_strict(model, weights, folder)
    return model.eval()


def read_config(folder: Path, *architectures: str) -> dict:
    """A folder's config.json as a dictionary. Raises ValueError if missing, no JSON, or of another architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get("architectures") or []
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a model's configuration: copy it anew") from error
    if not set(found) & set(architectures):
        named = ", ".join(found) or "no architecture"
        raise ValueError(f"{path} names {named}, but only {' and '.join(architectures)} can be read here")
    return values
