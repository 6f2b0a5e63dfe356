"""The models that are measured: random weights, made on the device."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from radlads.convert.shapes import SIZE_KEYS
from radlads.model.block import Block, sets_fresh_values
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import build_channel_mixer, build_time_mixer

WEIGHT_STD = 0.02


@torch.no_grad()
def random_model(config: RadladsConfig, *, device: torch.device, dtype: torch.dtype) -> RadladsForCausalLM:
    """A model with random weights, made on the device in `dtype`: no more than a mixer of them is ever on the CPU.

    Noise lies on everything that a conversion starts at a fixed value, low-rank factors at zero among it, so that every
    kernel sees real data.
    """
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    for block in model.model.layers:
        assert isinstance(block, Block)
        # In fp32 until it is filled: there is no orthogonal matrix in bf16
        _fill_block(block.to_empty(device=device), config)
        block.to(dtype)
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        part.to(dtype).to_empty(device=device)
        _fill(part)
    model.tie_weights()
    return model.eval()


def _fill(module: nn.Module) -> None:
    """Normal weights, those of norms around 1."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            mean = 1.0 if name == "weight" and parameter.ndim == 1 else 0.0
            parameter.normal_(mean, WEIGHT_STD)


def _fill_block(block: Block, config: RadladsConfig) -> None:
    """As _fill; what of the mixer is fresh, around its initial values, and buffers as their constructors leave them."""
    _fill(block)
    mixer = block.self_attn
    if sets_fresh_values(mixer):
        mixer.reset_fresh_parameters()
    else:
        block.begin_mixer(config)
    for name, parameter in mixer.named_parameters():
        if name.partition(".")[0] not in mixer.from_teacher:
            parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_STD)
    _copy_buffers(mixer, build_time_mixer, config, block.layer_idx)
    _copy_buffers(block.mlp, build_channel_mixer, config, block.layer_idx)


def _copy_buffers(module: nn.Module, build: Callable, config: RadladsConfig, layer_idx: int) -> None:
    if not list(module.buffers()):
        return
    with torch.device("cpu"):
        built = dict(build(config, layer_idx).named_buffers())
    for name, buffer in module.named_buffers():
        buffer.copy_(built[name])


def stock_teacher(config: RadladsConfig, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own Qwen2 of the teacher's sizes with SDPA: what runs where nothing is converted."""
    sizes = {name: getattr(config, name) for name in SIZE_KEYS}
    stock = Qwen2Config(
        **sizes, tie_word_embeddings=config.tie_word_embeddings, rope_parameters=dict(config.rope_parameters)
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(stock, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])
