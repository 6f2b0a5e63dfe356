"""All that is touched of Lightning's private attributes, and why; tests/contract/test_lightning_internals.py fails when
Lightning changes them."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Let Lightning take no signal, and ask no process for one.

    Signals are StopRequests', agreed on in the step's own sum. Lightning's handler would broadcast at once, and its
    loop wait for the GPU before every micro-batch to hear of that. No argument of the Trainer switches either off.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


class DeepSpeedOfModule(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy, in which a subclass may say what module DeepSpeed puts its hooks on.

    Lightning hands the LightningModule itself to DeepSpeed, in a private method, and has no setting for it.
    """

    def hooked(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module whose calls and parameters DeepSpeed follows, given Lightning's."""
        return model

    def _setup_model_and_optimizer(self, model: torch.nn.Module, *rest: Any) -> Any:
        return super()._setup_model_and_optimizer(self.hooked(model), *rest)
