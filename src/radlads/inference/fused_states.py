"""The states that a fused step advances: of every layer side by side, row by row, each at a fixed place in memory.

Shape letters: L layers, B rows, H heads, N head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from radlads.inference.packed_weights import PackedLayer
from radlads.model.cache import RadladsCache, RecurrentCacheLayer
from radlads.model.window import HeldWindow


@dataclass(frozen=True)
class FusedStates:
    """matrices: [L, B, H, N, N] fp32. counters: [2, B] int64, each row's position and number of tokens seen, which
    grow together; every layer's window has the latter as its `seen`."""

    matrices: torch.Tensor
    counters: torch.Tensor
    windows: list[HeldWindow | None]

    @staticmethod
    def empty(layers: Sequence[PackedLayer], rows: int, like: torch.Tensor) -> "FusedStates":
        """States of zeros on the device of `like`; the windows' keys and values have its dtype."""
        H, N = layers[0].mixer.num_heads, layers[0].mixer.head_dim
        matrices = torch.zeros(len(layers), rows, H, N, N, device=like.device, dtype=torch.float32)
        counters = torch.zeros(2, rows, device=like.device, dtype=torch.int64)
        return FusedStates(matrices, counters, [_empty_window(layer, rows, like, counters[1]) for layer in layers])

    @property
    def positions(self) -> torch.Tensor:
        return self.counters[0]

    def put(self, row: int, cache: RadladsCache, index: int) -> None:
        """Copy the text `index` of a prefilled cache into a row."""
        for held, given in self._pairs(cache):
            held[row].copy_(given[index])

    def load(self, cache: RadladsCache) -> None:
        """Copy a cache of as many texts as there are rows."""
        for held, given in self._pairs(cache):
            held.copy_(given)

    def _pairs(self, cache: RadladsCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is held, and what a prefilled cache has for it."""
        assert cache.next_positions is not None
        yield self.positions, cache.next_positions
        for matrices, window, layer in zip(self.matrices, self.windows, cache.layers, strict=True):
            assert isinstance(layer, RecurrentCacheLayer) and layer.state is not None
            yield matrices, layer.state.wkv
            for name, held in () if window is None else window._asdict().items():
                yield held, getattr(layer.state, name)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        held = [x for window in self.windows if window is not None for x in (window.keys, window.values)]
        for x in (*self.matrices, *self.counters, *held):
            x[target].copy_(x[source])

    def narrowed(self, rows: int) -> "FusedStates":
        """The first rows, at the same place."""
        counters = self.counters[:, :rows]
        windows = [
            window and HeldWindow(window.keys[:rows], window.values[:rows], counters[1]) for window in self.windows
        ]
        return FusedStates(self.matrices[:, :rows], counters, windows)


def _empty_window(layer: PackedLayer, rows: int, like: torch.Tensor, seen: torch.Tensor) -> HeldWindow | None:
    mixer, settings = layer.mixer, layer.mixer.window
    if settings is None:
        return None
    shape = rows, mixer.num_heads // mixer.groups, settings.held_tokens, mixer.head_dim
    return HeldWindow(like.new_zeros(shape), like.new_zeros(shape), seen)
