"""Sizes of a model in our keys and in those of Hugging Face's config.json: from one to the other, and compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from radlads.config.schema import SIZE_KEYS, ModelConfig
from radlads.files import read_json

_REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
_OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# Far beyond any model: what is larger is damage, and would take hours or all memory to find out
LARGEST_SIZE, _MOST_LAYERS = 2**26, 4096


def sizes_from_hf(folder: Path) -> str:
    """YAML of the `model` section that has the sizes of `folder`/config.json, whatever its architecture.

    Works for every configuration with Llama's keys (Qwen2, Qwen3, Llama, Mistral...). Raises ValueError if there is no
    such file or it lacks a size.
    """
    values = _read_config(folder)
    try:
        sizes = sizes_of(values)
    except ValueError as error:
        raise ValueError(
            f"{folder / 'config.json'} {error}: only configurations with Llama's keys are known"
        ) from error
    section = yaml.safe_dump({"model": sizes}, sort_keys=False)
    return f"# Sizes of {folder.resolve().name} ({values.get('model_type', 'of no named type')}).\n{section}"


def sizes_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The size keys of a model section, from the values of a config.json.

    Raises ValueError naming what is missing or no size of a model.
    """
    missing = [name for name in _REQUIRED if not isinstance(values.get(name), int)]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for name in (*_REQUIRED, *_OPTIONAL):
        _check_size(name, values.get(name))
    epsilon = values.get("rms_norm_eps")
    if epsilon is not None and not (isinstance(epsilon, int | float) and 0 <= epsilon < 1):
        raise ValueError(f"has rms_norm_eps {epsilon!r:.40}, which is not a number from 0 to 1")
    heads, channels = values["num_attention_heads"], values["hidden_size"]
    head_size = values.get("head_dim") or channels // heads
    rope = values.get("rope_parameters") or {}
    return {
        "vocab_size": values["vocab_size"],
        "n_layer": values["num_hidden_layers"],
        "n_embd": channels,
        "dim_att": heads * head_size,
        "dim_ffn": values["intermediate_size"],
        "head_size": head_size,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "rms_norm_eps": float(values.get("rms_norm_eps") or 1e-6),
        "rope": {"base": float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)},
    }


def _check_size(name: str, value: Any) -> None:
    """Raise ValueError for what is no size; an optional one may be null or 0, which leaves it to the others."""
    if name in _OPTIONAL and (value is None or value == 0):
        return
    most = _MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
    if type(value) is not int or not 0 < value <= most:
        raise ValueError(f"has {name} {value!r:.40}, which is not a whole number from 1 to {most}")


def check_sizes(section: ModelConfig, prefix: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError if a size in `section` is not that of the model whose config.json has `values`.

    `prefix`: the section's dotted name. A size at its default counts as not given.
    """
    actual = sizes_of(values)
    for key, given in _given_sizes(section).items():
        name, _, below = key.partition(".")
        found = actual[name][below] if below else actual[name]
        if given != found:
            raise ValueError(
                f"{prefix}.{key} is {given}, but the model has {found}: give the size file of that very model, or none"
            )


def _given_sizes(section: ModelConfig) -> dict[str, Any]:
    default = ModelConfig()
    pairs = {key: (getattr(section, key), getattr(default, key)) for key in SIZE_KEYS if key != "rope"}
    pairs["rope.base"] = (section.rope.base, default.rope.base)
    return {key: given for key, (given, unset) in pairs.items() if given != unset}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model")
    return read_json(file)
