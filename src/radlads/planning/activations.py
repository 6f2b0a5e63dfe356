"""Bytes per token that a forward pass keeps for the backward pass, and that the backward pass adds, from the shapes.

What is kept is what torch.compile's partitioner keeps of Block.mixed and Block.feed, together with the recurrence's
own (`Chunks.forward_keeping` in chunked_passes.py). C hidden size, D = H * N, H heads, N head size, F the channel
mixer's size. `wide`: mixed precision, where the residual stream is fp32 and weights are rounded to bf16 for every
product.
"""

from radlads.model.configuration import RadladsConfig


def residual(config: RadladsConfig, *, wide: bool) -> int:
    """The residual stream once."""
    return (4 if wide else 2) * config.hidden_size


def mixer_kept(config: RadladsConfig, layer: int, *, wide: bool) -> float:
    """What a layer's time mixer keeps, its normed input included, the residual stream before it not."""
    return config.mixer_class(layer).kept_bytes(config, layer, wide=wide)


def channel_mixer_kept(config: RadladsConfig) -> int:
    """What a channel mixer keeps: its normed input, gate(x) and up(x)."""
    return 2 * config.hidden_size + 2 * 2 * config.intermediate_size


def mixer_backward(config: RadladsConfig, layer: int) -> float:
    """What going back through a time mixer adds when all its gradients are there, less what is kept no longer."""
    return config.mixer_class(layer).backward_bytes(config, layer)


def channel_mixer_backward(config: RadladsConfig) -> int:
    """What going back through a channel mixer adds: the gradients of their product, of gate(x) and of up(x)."""
    return 3 * 2 * config.intermediate_size


def teacher_forward(config: RadladsConfig) -> int:
    """What a frozen block holds at most: the residual stream, its norm, gate(x), up(x) and their product."""
    return 2 * 2 * config.hidden_size + 3 * 2 * config.intermediate_size
