"""The model's configuration: which mixer each layer uses, and the sizes all of them share."""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

FULL_ATTENTION_MIXERS = ("qwen2",)
# qwen3 is the softmax mixer of a stack with qk_norm
MIXER_ALIASES = {"qwerky6": "rad_rwkv6", "qwerky7": "rad_rwkv7", "qwen3": "qwen2"}
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}

# (multiplier, exponent) of rank = max(1, round(C^exponent * multiplier / 32)) * 32, from the released training code
LOW_RANK_RULES = {
    "tokenshift": (1.8, 0.5),
    "decay": (1.8, 0.5),
    "iclr": (1.8, 0.5),
    "value_residual_mix": (1.3, 0.5),
    "gate": (0.6, 0.8),
}


class RadladsConfig(PreTrainedConfig):
    """Configuration of a decoder whose layers each have a time mixer and a channel mixer.

    Keys beside Qwen2's: `time_mixers` and `channel_mixers` (a name per layer), the low ranks `lora_rank_*`
    (0: the rule of the released code), and the switches `use_rope`, `gate_rank_type` (0 none, 1 full
    rank, 2 low rank), `balance_state`, `groupnorm_att`, `use_tokenshift`. The switches concern recurrent mixers only.
    `qk_norm`: every mixer norms each head's queries and keys before RoPE (Qwen3). `rope_parameters`: of rope_type
    default, linear, llama3 or yarn. Raises ValueError for sizes, names or RoPE parameters that do not fit together.
    """

    model_type = "radlads"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds a list to it)

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    qk_norm: bool = False
    rope_parameters: dict = field(default_factory=dict)
    rope_theta: float = 1e6
    time_mixers: list[str] = field(default_factory=list)
    channel_mixers: list[str] = field(default_factory=list)
    layer_types: list[str] = field(default_factory=list)
    use_rope: bool = True
    gate_rank_type: int = 2
    balance_state: bool = True
    groupnorm_att: bool = False
    use_tokenshift: bool = True
    lora_rank_tokenshift: int = 0
    lora_rank_decay: int = 0
    lora_rank_iclr: int = 0
    lora_rank_value_residual_mix: int = 0
    lora_rank_gate: int = 0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        layers = self.num_hidden_layers
        mixers = self.time_mixers or ["rad_rwkv7"] * layers
        self.qk_norm = self.qk_norm or "qwen3" in mixers
        self.time_mixers = [MIXER_ALIASES.get(name, name) for name in mixers]
        self.channel_mixers = self.channel_mixers or ["swiglu"] * layers
        if len(self.time_mixers) != layers or len(self.channel_mixers) != layers:
            raise ValueError(f"time_mixers and channel_mixers must name one mixer for each of the {layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2 and (self.use_rope or not set(FULL_ATTENTION_MIXERS).isdisjoint(self.time_mixers)):
            raise ValueError(f"head_dim must be even for RoPE, which turns pairs of channels, not {self.head_dim}")
        if self.gate_rank_type not in (0, 1, 2):
            raise ValueError(
                f"gate_rank_type must be 0 (none), 1 (full rank) or 2 (low rank), not {self.gate_rank_type}"
            )
        self.layer_types = [
            "full_attention" if name in FULL_ATTENTION_MIXERS else "linear_attention" for name in self.time_mixers
        ]
        for kind, (multiplier, exponent) in LOW_RANK_RULES.items():
            if not getattr(self, f"lora_rank_{kind}"):
                setattr(self, f"lora_rank_{kind}", low_rank(self.hidden_size, multiplier, exponent))
        if not self.rope_parameters:
            self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        self.rope_theta = self.rope_parameters.get("rope_theta", self.rope_theta)
        super().__post_init__(**kwargs)
        check_rope(self.rope_parameters)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers', for our own values. Raises ValueError for another model type, whose keys and defaults mean
        something else, so that from_pretrained would build another model.

        Attention code is the caller's choice alone: a config.json that names a kernel as `owner/name` would have it
        fetched and run, so these keys are dropped."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"config.json is of model type {found!r}, not {cls.model_type!r}: load a published checkpoint "
                "(rwkv6qwen2, rwkv7qwen2) with radlads.checkpoint.model_folder.load_model, others with transformers"
            )
        return super().from_dict({key: value for key, value in config_dict.items() if not names_code(key)}, **kwargs)

    @property
    def first_value_layer(self) -> int | None:
        """The first RAD-RWKV7 layer, whose values the later ones mix in; None in a stack without any."""
        return self.time_mixers.index("rad_rwkv7") if "rad_rwkv7" in self.time_mixers else None

    @property
    def recurrent_layers(self) -> list[int]:
        """Indices of the layers whose state does not grow with the sequence."""
        return [layer for layer, kind in enumerate(self.layer_types) if kind == "linear_attention"]


def names_code(key: str) -> bool:
    """Whether a key of a config.json chooses code for attention or experts."""
    return "_implementation" in key


def low_rank(hidden_size: int, multiplier: float, exponent: float) -> int:
    """A low rank that grows with the hidden size, a multiple of 32."""
    return max(1, round(hidden_size**exponent * multiplier / 32)) * 32


def depth_fraction(config: RadladsConfig, layer_idx: int) -> float:
    """0 at the first layer, 1 at the last; initial decays depend on it."""
    return layer_idx / max(1, config.num_hidden_layers - 1)


def state_bytes(config: RadladsConfig, context_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes one sequence's state takes after `context_tokens`: fp32 recurrent states, keys and values elsewhere."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    total = 0
    for name, kind in zip(config.time_mixers, config.layer_types, strict=True):
        if kind == "full_attention":
            total += 2 * kv_heads * size * context_tokens * bytes_per_value
        else:
            total += 4 * heads * size * size
            if name == "rad_rwkv6" and config.use_tokenshift:
                total += bytes_per_value * config.hidden_size
    return total


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


def rope_inverse_frequencies(config: RadladsConfig) -> list[float]:
    """RoPE angular frequencies, radians per token, one per pair of channels."""
    rope, size = config.rope_parameters, config.head_dim
    base = rope["rope_theta"]
    frequencies = [math.exp(-math.log(base) * channel / size) for channel in range(0, size, 2)]
    kept = {"default": _all_kept, "linear": _none_kept, "llama3": _llama3_kept, "yarn": _yarn_kept}[rope["rope_type"]]
    factor = rope.get("factor", 1.0)
    return [f * share + f / factor * (1 - share) for f, share in zip(frequencies, kept(frequencies, rope), strict=True)]


def rope_attention_factor(config: RadladsConfig) -> float:
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
