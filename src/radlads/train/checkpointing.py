"""The callback that says when checkpoints are written, what a stage takes from the one it begins at, and when to end.

Its files are checkpoints/'s, and the formats of models radlads.checkpoint's.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from radlads.config.schema import TrainConfig
from radlads.console import Console
from radlads.train.callbacks import HeldoutCallback
from radlads.train.checkpoints.snapshots import (
    Position,
    checkpoints_in,
    remove,
    restore_random_numbers,
    stored_optimizers,
    write_checkpoint,
)
from radlads.train.corpora.samples import sequences_per_step
from radlads.train.lightning_module import StageModule
from radlads.train.stopping import StopRequests


class Checkpointing(L.Callback):
    """Writes checkpoints after every so many steps or minutes, and one when a signal asks the run to stop.

    Belongs after all callbacks that measure, so that a checkpoint holds what they found. begin: the checkpoint whose
    optimisers and random numbers the stage goes on with, and `position` what it says.
    """

    def __init__(
        self,
        train: TrainConfig,
        stage_folder: Path,
        run: Mapping[str, Any],
        stop: StopRequests,
        console: Console,
        *,
        measured: HeldoutCallback | None = None,
        begin: Path | None = None,
        position: Position | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._train, self._folder, self._run, self._stop, self._console = train, stage_folder, run, stop, console
        self._measured, self._begin, self._position, self._clock = measured, begin, position or Position(), clock
        self._random_numbers_from = begin

    def on_train_start(self, trainer, pl_module) -> None:
        self._began = self._written = self._clock()
        self._step_seen = self._position.step
        pl_module.wants_checkpoint = self.is_due_by_time
        if self._begin is not None:
            pl_module.engine.restore_optimizers(*stored_optimizers(self._begin), trainer.optimizers)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        # Not earlier, because a data loader that begins draws a number
        if self._random_numbers_from is not None:
            restore_random_numbers(self._random_numbers_from)
            self._random_numbers_from = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        assert isinstance(pl_module, StageModule)
        step = pl_module.steps_done
        if step == self._step_seen or step == pl_module.num_steps:
            return
        self._step_seen = step
        if self._stop.agreed is None and not (pl_module.reader.checkpoint_agreed or self.is_due_by_steps(step)):
            return
        path = self._write(trainer, pl_module)
        if self._stop.agreed is not None:
            self._console.line(
                f"{self._stop.agreed.name}: stopped after step {step} of {pl_module.num_steps}, with the checkpoint "
                f"{path}; start the same command again to go on from there"
            )
            raise self._stop.stopped()

    def on_exception(self, trainer, pl_module, exception) -> None:
        trainer.strategy.optimizers = []  # whose state Lightning would move to the CPU before the run ends

    def seconds(self) -> float:
        """Wall time of the stage, all runs before this one included."""
        return self._position.seconds + self._clock() - self._began

    def is_due_by_steps(self, step: int) -> bool:
        """Whether one is due after this step, whatever the time."""
        every_steps = self._train.checkpoint_every_steps
        return every_steps > 0 and step % every_steps == 0

    def is_due_by_time(self) -> bool:
        """Whether the last one is as old as this process's clock lets it be."""
        every_s = 60 * self._train.checkpoint_every_minutes
        return every_s > 0 and self._clock() - self._written >= every_s

    def _write(self, trainer: L.Trainer, module: StageModule) -> Path:
        module.reader.read()  # a step that is not finite ends the run before it reaches a checkpoint
        samples = module.steps_done * sequences_per_step(self._train, module.processes)
        heldout = tuple(self._measured.history) if self._measured else ()
        guard = tuple(module.reader.guard.state.tolist()) if module.reader.guard else ()
        position = Position(module.steps_done, samples, module.tokens_done, self.seconds(), heldout, guard)
        held = module.engine.checkpoint_state(trainer.optimizers)
        written = {} if module.on_policy is None else module.on_policy.state(module.steps_done)
        path = write_checkpoint(self._folder, module.student, held, position, self._run, module.processes, written)
        if module.processes.is_first:
            for old in checkpoints_in(self._folder)[: -self._train.keep_checkpoints]:
                self._remove(old)
        self._written, module.reader.checkpoint_agreed = self._clock(), False
        return path

    def _remove(self, old: Path) -> None:
        """Remove a checkpoint; one that holds somebody's own files stays, which is no reason to end a run."""
        try:
            remove(old)
        except ValueError as reason:
            self._console.line(f"{old} stays: {reason}")
