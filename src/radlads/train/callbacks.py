"""What happens beside the steps: live progress, and held-out measurements to heldout.csv."""

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch

from radlads.console import Console
from radlads.distill.heldout import Heldout, measure
from radlads.train.lightning_module import StageModule
from radlads.train.logging.loggers import HELDOUT_PREFIX
from radlads.train.optimizers.optim import weights_to_keep


class Progress(L.Callback):
    """Tokens, tokens per second, loss, learning rate and remaining time, about once a second."""

    def __init__(self, console: Console, budget_tokens: int, clock: Callable[[], float] = time.monotonic):
        self._console, self._budget, self._clock = console, budget_tokens, clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        self._began = self._shown = self._clock()
        self._tokens_before = pl_module.tokens_done

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        assert isinstance(pl_module, StageModule)
        now = self._clock()
        if pl_module.reader.last_metrics and (now - self._shown >= 1 or pl_module.steps_done == pl_module.num_steps):
            self._shown = now
            self._console.progress(self._line(pl_module, now - self._began))

    def _line(self, module: StageModule, elapsed_s: float) -> str:
        tokens, metrics = module.tokens_done, module.reader.last_metrics
        speed = (tokens - self._tokens_before) / max(elapsed_s, 1e-9)
        rate = metrics.get("lr_mixer", metrics.get("lr_rest", 0.0))
        return (
            f"{module.stage.name:8}{tokens / self._budget:5.0%}  {_short(tokens)} of {_short(self._budget)} tokens  "
            f"{_short(speed)} tok/s  loss {metrics['loss']:.4f}  lr {rate:.1e}  "
            f"{_duration((self._budget - tokens) / max(speed, 1e-9))} left"
        )


class HeldoutCallback(L.Callback):
    """Measures the student before, during and after the stage, for heldout.csv and the loggers.

    history: the measurements of the run that is gone on with, each with its step and tokens.
    """

    def __init__(
        self,
        batches: Iterable[torch.Tensor],
        every_steps: int,
        path: Path,
        history: Iterable[tuple[int, int, Heldout]] = (),
    ):
        self._batches, self._every, self._path = batches, every_steps, path
        self.history = list(history)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.history:
            self._measure(trainer, pl_module)
        elif trainer.is_global_zero:
            self._write()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        step = pl_module.steps_done
        if self._every and step % self._every == 0 and step > self.history[-1][0] and step < pl_module.num_steps:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, StageModule)
        with weights_to_keep(trainer.optimizers), trainer.strategy.precision_plugin.forward_context():
            result = measure(module.student, module.teacher, self._batches)
        self.history.append((module.steps_done, module.tokens_done, result))
        measured = {f"{HELDOUT_PREFIX}{name}": value for name, value in asdict(result).items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(measured, module.steps_done)
        if trainer.is_global_zero:
            self._write()

    def _write(self) -> None:
        with self._path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "tokens", "loss", "kl", "top1", "heldout_tokens"])
            writer.writerows([step, tokens, *asdict(result).values()] for step, tokens, result in self.history)


def _short(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return f"{count:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
