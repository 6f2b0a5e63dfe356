"""The two models of a plan: Qwen2.5's sizes by name or a folder's, and how many parameters lie where."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from radlads.bench.models import Shape
from radlads.checkpoint.model_folder import read_config
from radlads.checkpoint.named_models import NAMED_MODELS
from radlads.config.schema import ModelConfig
from radlads.convert.hf_source import SUPPORTED_ARCHITECTURES, locate, teacher_config
from radlads.convert.student import student_config
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import registered_name

Variant = Literal["group_norm", "balanced"]
MIXERS = ("rad_rwkv7", "rad_rwkv6")
# Layers, hidden size, channel mixer, heads, key/value heads, vocabulary, tied head
QWEN25 = {
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "3b": (36, 2048, 11008, 16, 2, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 152064, False),
    "14b": (48, 5120, 13824, 40, 8, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
    "72b": (80, 8192, 29568, 64, 8, 152064, False),
}


def open_shape(name: str, *, mixer: str, variant: Variant) -> Shape:
    """Teacher and student of a size of Qwen2.5 ("7b"), or of a Hugging Face folder with a config.json.

    Raises ValueError for an unknown size or mixer, and for a folder that is no model we know.
    """
    mixer = registered_name(mixer)
    if mixer not in MIXERS:
        raise ValueError(f"--mixer must be {' or '.join(MIXERS)}, not {mixer!r}")
    teacher = _teacher(name)
    group_norm = variant == "group_norm" and mixer == "rad_rwkv7"
    model = ModelConfig(
        tmix=mixer, gate_rank_type=2, balance_state=0 if group_norm else 1, groupnorm_att=1 if group_norm else 0
    )
    return Shape(name=name, teacher=teacher, student=student_config(teacher, model))


def _teacher(name: str) -> RadladsConfig:
    if name.lower() in QWEN25:
        return _qwen25(name.lower())
    path = Path(name).expanduser()
    if not path.exists() and name not in NAMED_MODELS:
        raise ValueError(
            f"no size, folder or file {name!r}: choose one of {', '.join((*QWEN25, *NAMED_MODELS))}, a Hugging Face "
            "folder or a GGUF file"
        )
    folder = locate(name)
    return teacher_config(read_config(folder, *SUPPORTED_ARCHITECTURES), folder)


def _qwen25(size: str) -> RadladsConfig:
    layers, channels, inner, heads, kv_heads, vocab, tied = QWEN25[size]
    return RadladsConfig(
        num_hidden_layers=layers,
        hidden_size=channels,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        time_mixers=["qwen2"] * layers,
    )


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many parameters a model has. mixers: of each layer, what aligning trains. channel_mixers: of each layer, with
    both norms. matrices: in the blocks' linear layers, which the 8-bit teacher rounds. head: 0 if tied."""

    embedding: int
    head: int
    mixers: tuple[int, ...]
    channel_mixers: tuple[int, ...]
    matrices: int

    @property
    def total(self) -> int:
        """All of them, but for the final norm."""
        return self.embedding + self.head + sum(self.mixers) + sum(self.channel_mixers)

    @property
    def largest_block(self) -> int:
        """Those of the largest block."""
        return max(map(sum, zip(self.mixers, self.channel_mixers, strict=True)))


def count_parameters(config: RadladsConfig) -> Parameters:
    """Counted on the model itself, which is built without memory."""
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    counts: Counter[tuple[int, bool]] = Counter()
    for name, parameter in model.model.layers.named_parameters():
        layer, part, _ = name.split(".", 2)
        counts[int(layer), part == "self_attn"] += parameter.numel()
    linear = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    layers = range(config.num_hidden_layers)
    return Parameters(
        embedding=model.model.embed_tokens.weight.numel(),
        head=0 if config.tie_word_embeddings else model.lm_head.weight.numel(),
        mixers=tuple(counts[layer, True] for layer in layers),
        channel_mixers=tuple(counts[layer, False] for layer in layers),
        matrices=sum(module.weight.numel() for module in linear),
    )
