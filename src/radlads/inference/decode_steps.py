"""The ways of taking a step, one token for all rows: through the growing cache, the model's blocks, or fused kernels.

Leaves the kernels to fused_step.py. Shape letters: B rows, V vocabulary.
"""

from typing import Any, Protocol

import torch

from radlads.model.cache import RadladsCache, RecurrentCacheLayer
from radlads.model.contracts import SharedInputs
from radlads.model.modeling import RadladsForCausalLM, has_triton
from radlads.model.registry import all_can
from radlads.model.rope import rope_attention_factor, rope_inverse_frequencies
from radlads.model.swiglu import SwiGLU

FUSED_ROWS = 64


class Step(Protocol):
    """One token for all rows. load() takes over a prefilled cache; a call maps tokens [B] to the next logits [B, V].

    is_graphable: a call does the same to the same memory every time, so that it can be replayed.
    """

    is_graphable: bool

    def load(self, cache: RadladsCache) -> None: ...

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor: ...


class CachedStep:
    """The model's own forward with its growing cache: for stacks with softmax layers."""

    is_graphable = False

    def __init__(self, model: RadladsForCausalLM):
        self.model = model
        self.cache: RadladsCache | None = None

    def load(self, cache: RadladsCache) -> None:
        self.cache = cache

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens[:, None], past_key_values=self.cache, use_cache=True).logits[:, -1]


class RecurrentStep:
    """The model's own blocks, for any stack without softmax layers, with states that stay at their place in memory."""

    def __init__(self, model: RadladsForCausalLM):
        self.model = model
        self.is_graphable = all_can(model.config, "CUDA graph")
        self.cache = RadladsCache(model.config)
        self.positions: torch.Tensor | None = None
        self.frequencies = torch.tensor(rope_inverse_frequencies(model.config), device=model.device)

    def load(self, cache: RadladsCache) -> None:
        """Copy the cache's states; the memory they go to is taken at the first call."""
        assert cache.next_positions is not None
        if self.positions is None:
            self.positions = torch.empty_like(cache.next_positions)
            for held, given in zip(self._layers(self.cache), self._layers(cache), strict=True):
                held.state = _state_like(given.state)
        self.positions.copy_(cache.next_positions)
        for held, given in zip(self._layers(self.cache), self._layers(cache), strict=True):
            _copy_state(held.state, given.state)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.positions is not None
        model, layers = self.model.model, self._layers(self.cache)
        held = [layer.state for layer in layers]
        angles = self.positions[:, None, None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        shared = SharedInputs(angles.cos(), angles.sin())
        hidden, v_first = model.embed_tokens(tokens[:, None]), None
        for block in model.layers:
            hidden, v_first = block(hidden, v_first, shared, past_key_values=self.cache)
        for layer, state in zip(layers, held, strict=True):
            _copy_state(state, layer.state)
            layer.state = state
        self.positions.add_(1)
        return self.model.lm_head(model.norm(hidden))[:, -1]

    @staticmethod
    def _layers(cache: RadladsCache) -> list[RecurrentCacheLayer]:
        return [layer for layer in cache.layers if isinstance(layer, RecurrentCacheLayer)]


def _state_like(state: Any) -> Any:
    return type(state)(*(None if x is None else torch.empty_like(x) for x in state))


def _copy_state(into: Any, state: Any) -> None:
    for target, source in zip(into, state, strict=True):
        if target is not None:
            target.copy_(source)


def build_step(model: RadladsForCausalLM, rows: int, *, fused: bool = True) -> Step:
    """The fastest way of taking a step that this model, device and number of rows allow."""
    if len(model.config.recurrent_layers) < model.config.num_hidden_layers:
        return CachedStep(model)
    if fused and model.device.type == "cuda" and has_triton(model.device) and can_be_fused(model, rows):
        from radlads.inference.fused_step import FusedStep

        return FusedStep(model, rows)
    return RecurrentStep(model)


def can_be_fused(model: RadladsForCausalLM, rows: int) -> bool:
    """True if the fused kernels cover the model: RAD-RWKV7 and SwiGLU layers, head size 64 or 128, one dtype and
    device, and queries and keys that are neither normed nor scaled (yarn)."""
    blocks = model.model.layers
    return (
        rows <= FUSED_ROWS
        and model.config.head_dim in (64, 128)
        and not model.config.qk_norm
        and rope_attention_factor(model.config) == 1.0
        and all(
            type(block.self_attn).obstacle_in(model.config, layer, "fused decode") is None
            for layer, block in enumerate(blocks)
        )
        and all(type(block.mlp) is SwiGLU for block in blocks)
        and len({(parameter.dtype, parameter.device) for parameter in model.parameters()}) == 1
    )
