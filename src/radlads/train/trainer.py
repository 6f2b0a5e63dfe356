"""Lightning's Trainer, as stages use it."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from radlads.config.schema import TrainConfig
from radlads.train.engines.engine import Engine
from radlads.train.hardware import check_hardware
from radlads.train.lightning_internals import leave_signals_alone
from radlads.train.logging.loggers import build_loggers

# The engine casts the weights for bf16-true: Lightning's own would also make bf16 the default type of every tensor that
# a model makes on its way, RoPE frequencies among them
_LIGHTNING_PRECISION: dict[str, Any] = {
    "bf16": "bf16-mixed",
    "bf16-true": "32-true",
    "fp32": "32-true",
    "32": "32-true",
}


def build_trainer(
    train: TrainConfig, folder: Path, callbacks: list[L.Callback], engine: Engine, *, first_step: int = 0
) -> L.Trainer:
    """Lightning's Trainer for one pass over the stage's samples; loggers as build_loggers says.

    first_step: steps that are done already. Raises ValueError as check_hardware does.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    accelerator, precision = check_hardware(train)
    trainer = L.Trainer(
        accelerator=accelerator,
        **engine.trainer_arguments(),
        precision=_LIGHTNING_PRECISION.get(precision, precision),
        max_epochs=1,
        callbacks=callbacks,
        logger=build_loggers(train, folder, first_step=first_step),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    leave_signals_alone(trainer)
    return trainer
