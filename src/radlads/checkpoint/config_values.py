"""Whether the values of a config.json, which may be anybody's, are of the kinds that their keys want."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from radlads.config.sizes import LARGEST_SIZE, sizes_of
from radlads.model.configuration import RadladsConfig

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: f"a whole number from 0 to {LARGEST_SIZE}",
    float: "a number",
    dict: "an object",
    str: "a text",
    list[str]: "a list of names",
    int | None: "a token's id",
    int | list[int] | None: "a token's id or a list of them",
}


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError that names the key whose value is of another kind than it wants; null stands for its default."""
    sizes_of(values)
    kinds = {field.name: field.type for field in fields(RadladsConfig) if field.type in _KINDS}
    kinds["model_type"] = str
    for key, kind in kinds.items():
        if values.get(key) is not None and not _is_of(kind, values[key]):
            raise ValueError(f"has {key} {values[key]!r:.40}, which is not {_KINDS[kind]}")
    if not isinstance(values.get("auto_map", {}), dict):  # transformers, which opens the tokenizer, trips over null
        raise ValueError("has an auto_map that is no object")
    layers, types = values["num_hidden_layers"], values.get("layer_types")
    if types is not None and (len(types) != layers or not set(types) <= set(LAYER_TYPES)):
        raise ValueError(f"has layer_types {types!r:.40}, which are not {layers} of {', '.join(LAYER_TYPES)}")


def _is_of(kind: Any, value: object) -> bool:
    if kind is bool:
        return value in (0, 1) and isinstance(value, int)
    if kind is int:
        return type(value) is int and 0 <= value <= LARGEST_SIZE
    if kind is float:
        return isinstance(value, int | float)
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind in (str, dict):
        return isinstance(value, kind)
    ids = value if isinstance(value, list) and kind == int | list[int] | None else [value]
    return all(type(each) is int for each in ids)
