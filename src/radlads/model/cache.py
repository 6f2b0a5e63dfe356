"""Where a sequence's states live between calls, as transformers 5 wants it (generation, beam search, continuing)."""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from .configuration import RadladsConfig


class RecurrentCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """Holds one recurrent mixer's state: a NamedTuple of tensors (or None) whose first axis is the batch.

    Both bases are needed: the first makes transformers treat the layer as linear, the second as one that knows its
    length. The tensors are opaque here, so a user's own mixer may carry what it likes.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self)
        self.state = None
        self.seen_tokens = 0

    def store(self, state, num_tokens: int) -> None:
        """Replace the state by the one after `num_tokens` more tokens."""
        self.state = state
        self.seen_tokens += num_tokens
        self.is_initialized = True

    def _change(self, change) -> None:
        if self.state is not None:
            self.state = type(self.state)(*(None if x is None else change(x) for x in self.state))

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        """Number of sequences held; -1 while empty."""
        return -1 if self.state is None else next(x for x in self.state if x is not None).shape[0]

    def reset(self) -> None:
        self.state, self.seen_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent state cannot be cropped: it holds no separate tokens")

    def offload(self) -> None:
        """Nothing to do: the state is small and stays where it is."""

    prefetch = offload

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise TypeError("a recurrent cache layer is filled by store()")

    update = update_conv_state = update_recurrent_state = lazy_initialization  # type: ignore[assignment]


class KeyValueView:
    """A softmax mixer's state: the keys and values of one layer of a cache."""

    def __init__(self, cache: Cache, layer_idx: int):
        self._cache, self._layer_idx = cache, layer_idx

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values [B, kv heads, T, N] and return all of them."""
        return self._cache.update(keys, values, self._layer_idx)


class RadladsCache(DynamicCache):
    """The states of every layer, and what each row's padding did to its positions.

    next_positions: [B], the position of each row's next token, which differs from the length where there was padding.
    padding_mask: [B, S], False at padding; None where nothing was padded or no layer keeps separate tokens.
    """

    def __init__(self, config: RadladsConfig):
        self._layer_types = tuple(config.layer_types)
        Cache.__init__(self, layers=self._empty_layers())
        self.next_positions: torch.Tensor | None = None
        self.padding_mask: torch.Tensor | None = None

    def _empty_layers(self) -> list[Any]:
        return [RecurrentCacheLayer() if kind == "linear_attention" else DynamicLayer() for kind in self._layer_types]

    def load(self, layer_idx: int):
        """The state to give to a layer's mixer."""
        layer = self.layers[layer_idx]
        return layer.state if isinstance(layer, RecurrentCacheLayer) else KeyValueView(self, layer_idx)

    def store(self, layer_idx: int, state, num_tokens: int) -> None:
        """Keep the state a layer's mixer returned after `num_tokens` more tokens."""
        layer = self.layers[layer_idx]
        if isinstance(layer, RecurrentCacheLayer):
            layer.store(state, num_tokens)

    def state_bytes(self) -> int:
        """Bytes of everything carried."""
        total = 0
        for layer in self.layers:
            recurrent = isinstance(layer, RecurrentCacheLayer)
            held = layer.state if recurrent else (layer.keys, layer.values)  # type: ignore[union-attr]
            total += sum(x.numel() * x.element_size() for x in held or () if x is not None)
        return total

    def _change_rows(self, change) -> None:
        if self.next_positions is not None:
            self.next_positions = change(self.next_positions)
        if self.padding_mask is not None:
            self.padding_mask = change(self.padding_mask)

    def reset(self) -> None:
        self.layers = self._empty_layers()  # stock softmax layers keep their length in older transformers
        self.next_positions = self.padding_mask = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda x: x[indices.to(x.device)])


def check_cache_class(cache: Any) -> None:
    """Refuse a foreign cache class with one sentence."""
    if not isinstance(cache, RadladsCache | None):
        raise ValueError(
            f"past_key_values must be a RadladsCache (radlads.model.cache), not {type(cache).__name__}: leave it out, "
            "and the model makes its own"
        )


def check_cache(cache: Any, batch: int) -> None:
    """Refuse a foreign cache class, or a cache filled with another batch size, with one sentence."""
    check_cache_class(cache)
    if cache is None:
        return
    held = None if cache.next_positions is None else cache.next_positions.shape[0]
    if held is not None and cache.get_seq_length() and held != batch:
        raise ValueError(
            f"the cache holds {held} sequences but the input has {batch}: repeat the cache with "
            "batch_repeat_interleave() or pass inputs of its batch size"
        )
