"""The ways of taking a step, one token for all rows: through the growing cache, the model's blocks, or fused kernels.

Leaves the kernels to fused_step.py. Shape letters: B rows, V vocabulary.
"""

from collections.abc import Callable
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

    def follow_weights(self) -> None:
        """Take over what has changed in the model's parameters, in place."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor: ...


class RowStep(Step, Protocol):
    """A step whose rows join and leave one by one, each with a state at a fixed place in memory."""

    def put(self, row: int, cache: RadladsCache, index: int = 0) -> None:
        """Have a row go on from the text `index` of a prefilled cache, which stays as it is."""

    def move(self, source: int, target: int) -> None:
        """Copy a row's state over another row's."""

    def narrowed(self, rows: int) -> "RowStep":
        """A step of the first `rows` rows alone, with the same states in memory."""


class CachedStep:
    """The model's own forward with its growing cache: for stacks with softmax layers."""

    is_graphable = False

    def __init__(self, model: RadladsForCausalLM):
        self.model = model
        self.cache: RadladsCache | None = None

    def load(self, cache: RadladsCache) -> None:
        self.cache = cache

    def follow_weights(self) -> None:
        """See Step. It reads them where they are."""

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
            self.reserve(cache, len(cache.next_positions))
        assert self.positions is not None
        self.positions.copy_(cache.next_positions)
        for held, given in zip(self._layers(self.cache), self._layers(cache), strict=True):
            _copy_state(held.state, given.state)

    def follow_weights(self) -> None:
        """See Step. It reads them where they are."""

    def reserve(self, cache: RadladsCache, rows: int) -> None:
        """Take memory for `rows` states of the kind that a prefilled cache holds; they are zeros."""
        assert cache.next_positions is not None
        self.positions = cache.next_positions.new_zeros(rows)
        for held, given in zip(self._layers(self.cache), self._layers(cache), strict=True):
            held.state = _mapped(lambda x: x.new_zeros((rows, *x.shape[1:])), given.state)

    def put(self, row: int, cache: RadladsCache, index: int = 0) -> None:
        """See RowStep. A row's memory is taken by reserve or load."""
        assert self.positions is not None and cache.next_positions is not None
        for held, given in zip(self._tensors(self.cache), self._tensors(cache), strict=True):
            held[row].copy_(given[index])
        self.positions[row].copy_(cache.next_positions[index])

    def move(self, source: int, target: int) -> None:
        """See RowStep."""
        assert self.positions is not None
        for x in (*self._tensors(self.cache), self.positions):
            x[target].copy_(x[source])

    def narrowed(self, rows: int) -> "RecurrentStep":
        """See RowStep."""
        assert self.positions is not None
        step = RecurrentStep(self.model)
        step.positions = self.positions[:rows]
        for part, whole in zip(self._layers(step.cache), self._layers(self.cache), strict=True):
            part.state = _mapped(lambda x: x[:rows], whole.state)
        return step

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

    def _tensors(self, cache: RadladsCache) -> list[torch.Tensor]:
        return [x for layer in self._layers(cache) for x in layer.state or () if x is not None]


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], state: Any) -> Any:
    return type(state)(*(None if x is None else change(x) for x in state))


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


def build_row_step(model: RadladsForCausalLM, rows: int, cache: RadladsCache, *, fused: bool = True) -> RowStep:
    """As build_step, of a stack without softmax layers, for rows that join and leave. cache: any prefilled one."""
    step = build_step(model, rows, fused=fused)
    assert not isinstance(step, CachedStep)
    if isinstance(step, RecurrentStep):
        step.reserve(cache, rows)
    return step  # type: ignore[return-value]


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
