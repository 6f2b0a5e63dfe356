"""What a Hugging Face config.json of any family says in several ways: RoPE, activation and sliding windows."""

from collections.abc import Mapping
from typing import Any

# Qwen2's and Qwen3's own values where config.json has none
_WINDOW, _WINDOWLESS_LAYERS = 4096, 28


def rope_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's RoPE in transformers 5's form, also from the rope_theta and rope_scaling of transformers 4.

    As there, rope_scaling counts before rope_parameters, their rope_theta before that at the top, but the top's
    original_max_position_embeddings before theirs. Raises ValueError for one RoPE per kind of layer, and for a scaling
    that does not say from which context.
    """
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"it has a RoPE of its own for {nested[0]}, which is not supported: choose another checkpoint")
    kind = rope.pop("type", None)
    rope = {key: value for key, value in rope.items() if value is not None}
    rope.setdefault("rope_type", kind or "default")
    top = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    rope = {"rope_theta": 10000.0} | top | rope  # the base of all families that are read here
    if rope["rope_type"] in ("llama3", "yarn"):
        _set_original_context(rope, values)
    return rope


def _set_original_context(rope: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Say from which context a RoPE is scaled."""
    key = "original_max_position_embeddings"
    context = values.get(key) or rope.get(key) or values.get("max_position_embeddings")
    if context is None:
        raise ValueError(f"its RoPE of type {rope['rope_type']!r} needs {key}, in tokens: copy it from the model")
    rope[key] = context


def refuse_activation(values: Mapping[str, Any]) -> None:
    """Raise ValueError for another activation than silu, which is called swish too."""
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"it uses the activation {values['hidden_act']!r}: only silu is supported")


def slides(values: Mapping[str, Any]) -> bool:
    """Whether a config.json gives any layer a sliding window: by its layer_types, else from max_window_layers on.

    Raises ValueError for a max_window_layers that is no number.
    """
    if values.get("layer_types") is None:
        has_window = values.get("use_sliding_window") and values.get("sliding_window", _WINDOW) is not None
        first = values.get("max_window_layers", _WINDOWLESS_LAYERS)
        if has_window and type(first) is not int:
            raise ValueError(f"max_window_layers must be a number of layers, not {first!r:.80}")
        return bool(has_window) and first < values["num_hidden_layers"]
    return "sliding_attention" in values["layer_types"]
