"""The model's configuration: which mixer each layer uses, and the sizes all of them share."""

import math
from dataclasses import field

from transformers.configuration_utils import PreTrainedConfig

FULL_ATTENTION_MIXERS = ("qwen2",)
MIXER_ALIASES = {"qwerky6": "rad_rwkv6", "qwerky7": "rad_rwkv7"}

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
    Raises ValueError for sizes or names that do not fit together.
    """

    model_type = "radlads"
    keys_to_ignore_at_inference = ("past_key_values",)

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
        self.time_mixers = [MIXER_ALIASES.get(name, name) for name in mixers]
        self.channel_mixers = self.channel_mixers or ["swiglu"] * layers
        if len(self.time_mixers) != layers or len(self.channel_mixers) != layers:
            raise ValueError(f"time_mixers and channel_mixers must name one mixer for each of the {layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
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

    @property
    def first_value_layer(self) -> int | None:
        """The first RAD-RWKV7 layer, whose values the later ones mix in; None in a stack without any."""
        return self.time_mixers.index("rad_rwkv7") if "rad_rwkv7" in self.time_mixers else None

    @property
    def recurrent_layers(self) -> list[int]:
        """Indices of the layers whose state does not grow with the sequence."""
        return [layer for layer, kind in enumerate(self.layer_types) if kind == "linear_attention"]


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


def rope_inverse_frequencies(config: RadladsConfig) -> list[float]:
    """RoPE angular frequencies, one per pair of channels. Raises ValueError for a scaled RoPE we do not implement."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"RoPE scaling {kind!r} is not supported: only rope_type 'default' is")
    base, size = config.rope_parameters["rope_theta"], config.head_dim
    return [math.exp(-math.log(base) * channel / size) for channel in range(0, size, 2)]
