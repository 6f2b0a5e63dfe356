"""The two models of a plan, and how many parameters lie where in each."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from radlads.convert.shapes import Shape
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many parameters a model has. mixers: of each layer's time mixer. channel_mixers: of each layer, with both
    norms. matrices: in the blocks' linear layers, which the 8-bit teacher rounds. head: 0 if tied."""

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


@dataclass(frozen=True)
class Models:
    """Teacher and student of a plan, and their parameters."""

    shape: Shape
    student: Parameters
    teacher: Parameters

    @classmethod
    def of(cls, shape: Shape) -> "Models":
        """With the parameters counted."""
        return cls(shape, count_parameters(shape.student), count_parameters(shape.teacher))

    @property
    def aligned(self) -> tuple[int, ...]:
        """Parameters of each time mixer that aligning trains: the recurrent layers'."""
        return tuple(self.student.mixers[layer] for layer in self.shape.student.recurrent_layers)


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
