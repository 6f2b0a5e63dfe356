"""The micro-batches that one optimiser step is made of, as this process has had them."""

from collections.abc import Iterable, Sequence

import torch

from radlads.train.optimizers.step import PartSum


class Window:
    """Loss sums and counts of the parts `names`, added up over micro-batches, and these batches."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self.batches: list[torch.Tensor] = []

    def add(self, tokens: torch.Tensor, parts: Iterable[PartSum]) -> None:
        """Add a micro-batch [B, T + 1], and its parts as they are asked for."""
        self.batches.append(tokens)
        for part in parts:
            self._sums[part.name] = self._sums[part.name] + part.sum if part.name in self._sums else part.sum
            self._counts[part.name] = self._counts.get(part.name, 0) + part.count

    def is_empty(self) -> bool:
        """Whether there was nothing to predict."""
        return not sum(self._counts.values())

    def totals(self, flags: list[float], device: torch.device) -> torch.Tensor:
        """On the device: the parts' loss sums, their counts, and `flags`."""
        numbers = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=numbers, device=device)
        sums = torch.stack([self._sums[name].to(numbers) if name in self._sums else zero for name in self._names])
        known = [*(float(self._counts.get(name, 0)) for name in self._names), *flags]
        return torch.cat([sums, torch.tensor(known, dtype=numbers).to(device, non_blocking=True)])
