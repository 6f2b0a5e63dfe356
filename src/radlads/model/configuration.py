"""The model's configuration: which mixer each layer uses, and the sizes all of them share."""

from dataclasses import field
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .mixer_settings import settings_from
from .registry import DEFAULT, find_mixer_class, known_mixers, mixer_class, registered_name
from .rope import check_rope
from .time_mixer import TimeMixer

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
    default, linear, llama3 or yarn. `mixer_settings`: the settings that mixers define themselves, by the mixer's name.
    `layer_types`: whether each layer's state grows; for a mixer of one's own it counts as given. Raises ValueError for
    sizes, names or RoPE parameters that do not fit together.
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
    mixer_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
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
        mixers = self.time_mixers or [DEFAULT] * layers
        self.qk_norm = self.qk_norm or "qwen3" in mixers
        self.time_mixers = [registered_name(name) for name in mixers]
        self.channel_mixers = self.channel_mixers or ["swiglu"] * layers
        if len(self.time_mixers) != layers or len(self.channel_mixers) != layers:
            raise ValueError(f"time_mixers and channel_mixers must name one mixer for each of the {layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        self.mixer_settings = self.mixer_settings or {}
        if not isinstance(self.mixer_settings, dict) or not all(
            isinstance(x, dict) for x in self.mixer_settings.values()
        ):
            raise ValueError("mixer_settings must give each mixer's settings by the mixer's name: correct config.json")
        self.layer_types = self._layer_types(self.layer_types)
        if self.head_dim % 2 and (self.use_rope or "full_attention" in self.layer_types):
            raise ValueError(f"head_dim must be even for RoPE, which turns pairs of channels, not {self.head_dim}")
        if self.gate_rank_type not in (0, 1, 2):
            raise ValueError(
                f"gate_rank_type must be 0 (none), 1 (full rank) or 2 (low rank), not {self.gate_rank_type}"
            )
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

    def _layer_types(self, given: list[str]) -> list[str]:
        """Of each layer, whether its state grows with the text. To read a configuration runs nobody's code: the file of
        a mixer of one's own is not looked for, and `given` counts."""
        stored = given if len(given or ()) == self.num_hidden_layers else ["linear_attention"] * self.num_hidden_layers
        ours = known_mixers()
        return [
            layer_type_of(ours[name]) if name in ours else kind
            for name, kind in zip(self.time_mixers, stored, strict=True)
        ]

    def mixer_class(self, layer_idx: int) -> type[TimeMixer]:
        """The class of a layer's time mixer. Raises ValueError if it cannot be found."""
        return mixer_class(self.time_mixers[layer_idx])

    def settings_of(self, layer_idx: int) -> Any:
        """The settings of a layer's time mixer, an object of its class's Settings."""
        given = self.mixer_settings.get(self.time_mixers[layer_idx], {})
        return settings_from(self.mixer_class(layer_idx).Settings, given)

    @property
    def first_value_layer(self) -> int | None:
        """The first layer whose values later ones mix in (TimeMixer.shares_first_values); None in a stack without."""
        for layer, name in enumerate(self.time_mixers):
            kind = find_mixer_class(name)
            if kind is not None and kind.shares_first_values:
                return layer
        return None

    @property
    def recurrent_layers(self) -> list[int]:
        """Indices of the layers whose state does not grow with the sequence."""
        return [layer for layer, kind in enumerate(self.layer_types) if kind == "linear_attention"]


def layer_type_of(kind: type[TimeMixer]) -> str:
    """transformers' name for what a mixer's state does."""
    return "full_attention" if kind.state_grows else "linear_attention"


def names_code(key: str) -> bool:
    """Whether a key of a config.json chooses code for attention or experts."""
    return "_implementation" in key


def low_rank(hidden_size: int, multiplier: float, exponent: float) -> int:
    """A low rank that grows with the hidden size, a multiple of 32."""
    return max(1, round(hidden_size**exponent * multiplier / 32)) * 32


def state_bytes(config: RadladsConfig, context_tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes that one sequence's state takes after `context_tokens`. bytes_per_value: of the dtype that the model
    computes in; recurrent matrices are fp32 whatever it is."""
    return sum(
        tensor.num_bytes(context_tokens, bytes_per_value)
        for layer in range(config.num_hidden_layers)
        for tensor in config.mixer_class(layer).state_tensors(config, layer).values()
    )
