"""RoPE from a configuration: its checks, its frequencies and yarn's factor. The rotation itself is in layers.py."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import RadladsConfig

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def check_rope(rope: Mapping[str, Any]) -> None:
    """Raise ValueError for a RoPE scaling that we lack, or one whose parameters are missing or no numbers."""
    kind = rope["rope_type"]
    if kind not in ROPE_KEYS:
        raise ValueError(f"RoPE scaling {kind!r} is not supported: use one of {', '.join(ROPE_KEYS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor must be 1: a RoPE over a part of each head is not supported")
    for key in ("rope_theta", *ROPE_KEYS[kind]):
        value = rope.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"RoPE of type {kind!r} needs a positive {key}, not {value!r}: copy it from the teacher")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError("RoPE of type 'llama3' needs a high_freq_factor above its low_freq_factor")


def rope_inverse_frequencies(config: "RadladsConfig") -> list[float]:
    """RoPE angular frequencies, radians per token, one per pair of channels."""
    rope, size = config.rope_parameters, config.head_dim
    base = rope["rope_theta"]
    frequencies = [math.exp(-math.log(base) * channel / size) for channel in range(0, size, 2)]
    kept = {"default": _all_kept, "linear": _none_kept, "llama3": _llama3_kept, "yarn": _yarn_kept}[rope["rope_type"]]
    factor = rope.get("factor", 1.0)
    return [f * share + f / factor * (1 - share) for f, share in zip(frequencies, kept(frequencies, rope), strict=True)]


def rope_attention_factor(config: "RadladsConfig") -> float:
    """What rotated queries and keys are multiplied by: 1, but for yarn, whose longer contexts need sharper scores."""
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    numerator, denominator = rope.get("mscale"), rope.get("mscale_all_dim")
    if numerator and denominator:
        return _yarn_sharpness(rope["factor"], numerator) / _yarn_sharpness(rope["factor"], denominator)
    return _yarn_sharpness(rope["factor"], 1.0)


def _yarn_sharpness(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


# How much of each frequency a scaling keeps, 1 all of it, 0 none: the rest is slowed down by `factor`


def _all_kept(frequencies: list[float], rope: Mapping[str, Any]) -> list[float]:
    return [1.0] * len(frequencies)


def _none_kept(frequencies: list[float], rope: Mapping[str, Any]) -> list[float]:
    return [0.0] * len(frequencies)


def _llama3_kept(frequencies: list[float], rope: Mapping[str, Any]) -> list[float]:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = [rope["original_max_position_embeddings"] * f / (2 * math.pi) for f in frequencies]
    return [min(1.0, max(0.0, (number - low) / (high - low))) for number in turns]


def _yarn_kept(frequencies: list[float], rope: Mapping[str, Any]) -> list[float]:
    """A ramp over the pairs, from the one that turns beta_fast times in the original context to that of beta_slow."""
    size, base = 2 * len(frequencies), rope["rope_theta"]
    context = rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return size * math.log(context / (times * 2 * math.pi)) / (2 * math.log(base))

    start, end = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, size - 1)
    end += 0.001 if start == end else 0  # as published, against a division by 0
    return [1 - min(1.0, max(0.0, (pair - start) / (end - start))) for pair in range(len(frequencies))]
