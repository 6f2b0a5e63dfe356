"""Where a run's metrics go: metrics.csv, speed.csv and TensorBoard, always."""

import shutil
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from radlads.train.metrics_csv import METRICS, SPEED, MetricsCsv
from radlads.train.throughput import SPEED_METRICS

CARRIED = (METRICS, SPEED)
"""Files of an unfinished stage's folder that its checkpoints hold, and that go back to what they were on resuming."""


def build_loggers(folder: Path, *, first_step: int = 0) -> list[Logger]:
    """The loggers of a run in `folder`.

    first_step: steps that are done already; later ones that a killed run has written to tensorboard/ are hidden there.
    """
    purge_step = first_step + 1 if first_step else None
    return [
        MetricsCsv(folder / METRICS, lambda name: name not in SPEED_METRICS),
        MetricsCsv(folder / SPEED, lambda name: name in SPEED_METRICS or name in ("optimizer_step", "tokens")),
        TensorBoardLogger(folder, name="tensorboard", version="", purge_step=purge_step),
    ]


def carry(origin: Path, target: Path) -> None:
    """Copy CARRIED from a stage's folder to its checkpoint, or back; what `origin` has not, `target` has no longer."""
    for name in CARRIED:
        (target / name).unlink(missing_ok=True)
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)
