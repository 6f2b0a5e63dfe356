"""Where a run's metrics go: metrics.csv, speed.csv and TensorBoard, always; Weights & Biases where it is asked for."""

import json
import logging
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from radlads.config.load import load_config
from radlads.config.schema import TrainConfig
from radlads.files import read_json, write_text
from radlads.train.logging.metrics_csv import METRICS, SPEED, MetricsCsv
from radlads.train.logging.throughput import SPEED_METRICS

WANDB_RUN = "wandb.json"
CARRIED = (METRICS, SPEED, WANDB_RUN)
"""Files of an unfinished stage's folder that its checkpoints hold, and that go back to what they were on resuming."""
HELDOUT_PREFIX = "heldout_"
"""Of metrics that heldout.csv has already."""

_log = logging.getLogger(__name__)


def check_loggers(train: TrainConfig) -> None:
    """Raise ValueError if what the configuration would log to is not installed. Quick where it asks for nothing."""
    if train.wandb:
        _wandb()


def build_loggers(train: TrainConfig, folder: Path, *, first_step: int = 0) -> list[Logger]:
    """The loggers of a run in `folder`, an unfinished stage's that holds config.yaml.

    first_step: steps that are done already; later ones that a killed run has written to tensorboard/ are hidden there.
    Raises ValueError if Weights & Biases cannot be logged to.
    """
    purge_step = first_step + 1 if first_step else None
    loggers: list[Logger] = [
        MetricsCsv(folder / METRICS, lambda name: name not in SPEED_METRICS and not name.startswith(HELDOUT_PREFIX)),
        MetricsCsv(folder / SPEED, lambda name: name in SPEED_METRICS or name in ("optimizer_step", "tokens")),
        TensorBoardLogger(folder, name="tensorboard", version="", purge_step=purge_step),
    ]
    if train.wandb and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        loggers.append(_WandbRun(train.wandb, folder))
    return loggers


def carry(origin: Path, target: Path) -> None:
    """Copy CARRIED from a stage's folder to its checkpoint, or back; what `origin` has not, `target` has no longer."""
    for name in CARRIED:
        (target / name).unlink(missing_ok=True)
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)


class _WandbRun(WandbLogger):
    """A run of `project` named as the stage's folder, with the configuration of its config.yaml; files in wandb/.

    Goes on with the run that wandb.json names if it is of the same project and name. Training never waits or ends for
    it: should its process die, that is said once, and the other loggers go on. It ends with the fit, so that no file is
    written into a folder that is renamed.
    """

    def __init__(self, project: str, folder: Path):
        wandb, name = _wandb(), folder.name.removesuffix(".partial")
        config = asdict(load_config([folder / "config.yaml"], {}))
        try:
            run = wandb.init(
                project=project, name=name, id=_run_id(folder, project, name), dir=folder, resume="allow",
                reinit="finish_previous",
            )  # fmt: skip
            run.config.update(config, allow_val_change=True)
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        except (OSError, wandb.Error) as error:
            what = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"train.wandb is {project!r}, but Weights & Biases cannot be reached ({what}): run `wandb login`, set "
                "WANDB_MODE=offline to write files alone, or leave train.wandb out"
            ) from error
        super().__init__(experiment=run, project=project)
        self._is_lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """As Lightning's, but for a process of W&B's that has died."""
        if self._is_lost:
            return
        try:
            super().log_metrics(metrics, step)
        except (OSError, _wandb().Error) as error:
            self._lose(error)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, as failed unless `status` is "success"."""
        if self._is_lost:
            return
        try:
            self.experiment.finish(exit_code=0 if status == "success" else 1)
        except (OSError, _wandb().Error) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._is_lost = True
        _log.warning("Weights & Biases has stopped logging (%s); training goes on, and so do the other logs", error)


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "train.wandb needs wandb, which is not installed: pip install 'radlads[wandb]', or leave train.wandb out"
        ) from error
    return wandb


def _run_id(folder: Path, project: str, name: str) -> str:
    """The id of the folder's W&B run, a new one unless wandb.json is of this project and name."""
    path, run = folder / WANDB_RUN, {"project": project, "name": name}
    if path.is_file():
        held = read_json(path)
        if run == {key: held.get(key) for key in run} and isinstance(held.get("id"), str):
            return held["id"]
    number = secrets.token_hex(4)
    write_text(path, json.dumps(run | {"id": number}) + "\n")
    return number
