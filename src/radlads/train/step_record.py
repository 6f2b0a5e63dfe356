"""What is known of an optimiser step: some when it is queued, the rest once the device has done it."""

import math
from dataclasses import dataclass

import torch

from radlads.train.optimizers.step import Readout


@dataclass(frozen=True)
class StepRecord:
    """A step: its number and tokens (with all before it), the learning rates, this process's batches, and numbers that
    arrive later.

    share: the stage's (see Stage.share). The readout's numbers, of all processes: the loss sums of `parts`, their
    counts, the sums of `num_flags` flags, the gradient's norm, and the numbers of `others`.
    """

    step: int
    tokens: int
    parts: list[str]
    share: float
    num_flags: int
    others: list[str]
    rates: dict[str, float]
    readout: Readout
    batches: list[torch.Tensor]

    def fault(self, stage: str) -> str | None:
        """What is not finite, loss or gradient; None if both are. Waits until the step is done."""
        for name, value in zip(self.parts, self._sums(), strict=True):
            if not math.isfinite(value):
                return f"the loss of {stage} ({name}) is {value} at step {self.step}"
        norm = self._rest()[0]
        return None if math.isfinite(norm) else f"the gradient of {stage} is {norm} at step {self.step}"

    def is_empty(self) -> bool:
        """Whether there was nothing to predict. Waits until the step is done."""
        return not sum(self._counts())

    def flags(self) -> list[float]:
        """For each flag, how many processes raised it. Waits until the step is done."""
        return self.readout.values()[2 * len(self.parts) :][: self.num_flags]

    def metrics(self) -> dict[str, float]:
        """A row of metrics. Waits until the step is done."""
        sums, counts, (norm, *others) = self._sums(), self._counts(), self._rest()
        metrics = {
            "loss": self.share * sum(sums) / sum(counts),
            "grad_norm": norm,
            "optimizer_step": float(self.step),
            "tokens": float(self.tokens),
        } | self.rates
        metrics |= zip(self.others, others, strict=True)
        if len(self.parts) > 1:
            parts = zip(self.parts, sums, counts, strict=True)
            metrics |= {name: value / count for name, value, count in sorted(parts) if count}
        return metrics

    def _sums(self) -> list[float]:
        return self.readout.values()[: len(self.parts)]

    def _counts(self) -> list[float]:
        return self.readout.values()[len(self.parts) :][: len(self.parts)]

    def _rest(self) -> list[float]:
        return self.readout.values()[2 * len(self.parts) + self.num_flags :]
