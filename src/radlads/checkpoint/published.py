"""The format of the published checkpoints, `RWKV6Qwen2ForCausalLM` and `RWKV7Qwen2ForCausalLM`, read as our model.

Owns what that format says in its own words: configuration keys and their defaults, and tensors that are stored but not
used. The code that such folders bring along is never run. Leaves writing to published_export.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radlads.checkpoint.hf_config import refuse_activation, rope_parameters, slides
from radlads.checkpoint.weights import HEAD, SelectedWeights, StoredWeights
from radlads.model.configuration import RadladsConfig
from radlads.model.rope import rope_inverse_frequencies

MIXER_OF = {"rwkv6qwen2": "rad_rwkv6", "rwkv7qwen2": "rad_rwkv7"}
ARCHITECTURE_OF = {"rwkv6qwen2": "RWKV6Qwen2ForCausalLM", "rwkv7qwen2": "RWKV7Qwen2ForCausalLM"}
ARCHITECTURES = tuple(ARCHITECTURE_OF.values())

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "rms_norm_eps"),
)
SWITCHES: dict[str, dict[str, Any]] = {
    "rwkv6qwen2": {
        "use_rope": False,
        "gate_rank_type": 1,
        "balance_state": True,
        "groupnorm_att": False,
        "use_tokenshift": True,
    },
    "rwkv7qwen2": {
        "use_rope": False,
        "gate_rank_type": 2,
        "balance_state": True,
        "groupnorm_att": False,
    },
}
RANKS = {
    "rwkv6qwen2": ("lora_rank_tokenshift", "lora_rank_decay", "lora_rank_gate"),
    "rwkv7qwen2": ("lora_rank_decay", "lora_rank_iclr", "lora_rank_value_residual_mix", "lora_rank_gate"),
}
OPTIONAL = (
    *("head_dim", "max_position_embeddings", "initializer_range", "attention_bias"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
# RAD-RWKV6's ranks below and from 4096 channels, where the configuration names none
_RWKV6_RANKS = {"lora_rank_tokenshift": (32, 64), "lora_rank_decay": (64, 128)}
_WIDE = 4096
_MIXER_TENSOR = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")


def published_kind(values: Mapping[str, Any]) -> str | None:
    """The published model type that a config.json's values are of; None if they are of another format."""
    named = values.get("architectures") or []
    return next((kind for kind, architecture in ARCHITECTURE_OF.items() if architecture in named), None)


def published_config(values: Mapping[str, Any], origin: Path) -> RadladsConfig:
    """A published config.json, of any transformers 4 or 5, as our configuration.

    Raises ValueError that names `origin` for sizes that are missing, and for what our mixers do not do.
    """
    kind = published_kind(values)
    assert kind is not None
    missing = [name for name in SIZES if values.get(name) is None]
    if missing:
        raise ValueError(f"{origin}/config.json lacks {', '.join(missing)}: copy it anew")
    _refuse_unknown_features(values, origin)
    layers, softmax = values["num_hidden_layers"], values.get("num_attention_layers") or 0
    if not 0 <= softmax <= layers:
        raise ValueError(f"{origin}/config.json asks for {softmax} softmax layers among {layers}: copy it anew")
    switches: dict[str, Any] = {"use_tokenshift": False}  # of RAD-RWKV7, whose released code does not look at the key
    for name, default in SWITCHES[kind].items():
        switches[name] = default if values.get(name) is None else values[name]
    sizes: dict[str, Any] = {name: values[name] for name in (*SIZES, *OPTIONAL) if values.get(name) is not None}
    ranks: dict[str, Any] = {name: _rank(name, kind, values) for name in RANKS[kind]}
    config = RadladsConfig(
        **sizes,
        **switches,
        **ranks,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        rope_parameters=rope_parameters(values),
        time_mixers=[MIXER_OF[kind]] * (layers - softmax) + ["qwen2"] * softmax,
    )
    rope_inverse_frequencies(config)
    return config


class UsedWeights(SelectedWeights):
    """The tensors of a published checkpoint that the model computes with; those it stores only are left out.

    Stored only: `r_k`; the first RAD-RWKV7 layer's v0, v1 and v2; k_k and k_a where the state is balanced; token shift
    where it is switched off; the head of a model whose head is its embedding.
    """

    def __init__(self, weights: StoredWeights, config: RadladsConfig):
        super().__init__(weights, (name for name in weights if not _is_stored_only(name, config)))


def stored_only(config: RadladsConfig, layer: int, mixer: str) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and value of the tensors of a layer that the format wants and the model lacks."""
    C, D = config.hidden_size, config.num_attention_heads * config.head_dim
    tensors: dict[str, tuple[tuple[int, ...], float]] = {}
    if mixer == "rad_rwkv7":
        tensors["r_k"] = (config.num_attention_heads, config.head_dim), 0.0
        if layer == config.first_value_layer:
            rank = config.lora_rank_value_residual_mix
            tensors |= {"v0": ((1, 1, D), 1.0), "v1": ((C, rank), 0.0), "v2": ((rank, D), 0.0)}
        if config.balance_state:
            tensors |= {"k_k": ((1, 1, D), 0.85), "k_a": ((1, 1, D), 1.0)}
    if mixer == "rad_rwkv6" and not config.use_tokenshift:
        rank = config.lora_rank_tokenshift
        tensors |= {f"time_maa_{name}": ((1, 1, C), 0.0) for name in "xrkvwg"}
        tensors |= {"time_maa_w1": ((C, 5 * rank), 0.0), "time_maa_w2": ((5, rank, C), 0.0)}
    return {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in tensors.items()}


def stored_in_pth(config: RadladsConfig, layer: int, mixer: str) -> dict[str, tuple[tuple[int, ...], float]]:
    """Those of stored_only that the released training code builds too: all but the token shift that is switched off."""
    return {} if mixer == "rad_rwkv6" else stored_only(config, layer, mixer)


def _is_stored_only(name: str, config: RadladsConfig) -> bool:
    if name == HEAD:
        return config.tie_word_embeddings
    match = _MIXER_TENSOR.fullmatch(name)
    if match is None or int(match[1]) >= config.num_hidden_layers:
        return False
    layer = int(match[1])
    return name in stored_only(config, layer, config.time_mixers[layer]) or match[2] == "rotary_emb.inv_freq"


def _refuse_unknown_features(values: Mapping[str, Any], origin: Path) -> None:
    refuse_activation(values)
    if values.get("attention_output_bias"):
        raise ValueError(
            f"{origin} has a bias on its attention output, which is not supported: take another checkpoint"
        )
    if values.get("num_attention_layers") and slides(values):
        raise ValueError(f"{origin} uses sliding-window attention, which is not supported: take another checkpoint")


def _rank(name: str, kind: str, values: Mapping[str, Any]) -> int:
    """A low rank by the configuration, else by the published code's rule; 0 leaves it to ours."""
    if values.get(name):
        return int(values[name])
    if kind == "rwkv6qwen2" and name in _RWKV6_RANKS:
        narrow, wide = _RWKV6_RANKS[name]
        return wide if values["hidden_size"] >= _WIDE else narrow
    return 0
