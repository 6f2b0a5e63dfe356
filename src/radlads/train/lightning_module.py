"""A stage as a LightningModule: backward part by part, one optimiser step per accumulation window."""

from collections.abc import Callable, Sequence

import lightning as L
import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import Stage, is_trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.diagnosis import explained
from radlads.train.engines.engine import Engine
from radlads.train.logging.throughput import Throughput, stage_flops
from radlads.train.on_policy import OnPolicy
from radlads.train.optimizers.optim import build_optimizers, set_learning_rates
from radlads.train.optimizers.step import GradientNorms
from radlads.train.passes import Passes
from radlads.train.step_reader import StepReader, nothing_to_predict
from radlads.train.stopping import StopRequests
from radlads.train.window import Window


class StageModule(L.LightningModule):
    """Trains `student` by `stage`. The frozen teacher is kept out of the module tree and so of every checkpoint.

    Optimisation is manual, because a stage's loss comes in parts whose graphs are freed one by one, and because a
    loss is a sum over a count: gradients of sums are added up over the window and divided once by its whole count.

    On a GPU the host queues a step while the one before still runs, and reads that one's metrics then; steps that are
    logged, and the last, are waited for (`reader`).

    Of several processes each has its own samples, and all make the same steps: gradients, sums and counts are those
    of all, as the `engine` adds them up, and so is what is asked for in between (`stop`, and `wants_checkpoint` by the
    clock of any process).

    on_policy: what writes the student's own rows, if the stage has such.
    """

    def __init__(
        self,
        stage: Stage,
        student: RadladsForCausalLM,
        teacher: RadladsForCausalLM | None,
        train: TrainConfig,
        num_steps: int,
        engine: Engine,
        stop: StopRequests,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.stage, self.student, self.settings, self.num_steps = stage, student, train, num_steps
        self.engine, self.processes, self.stop = engine, engine.processes, stop
        self.wants_checkpoint: Callable[[], bool] = lambda: False
        self.steps_done = self.tokens_done = 0
        self.on_policy: OnPolicy | None = None
        self.passes = Passes(stage, student, teacher, engine)
        self.reader = StepReader(stage, student, stop, self._explained)
        self._window = Window(self.reader.parts)
        self._throughput: Throughput | None = None  # begins with the first micro-batch
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_trainable(name, student, stage.trainable))

    @property
    def teacher(self) -> RadladsForCausalLM | None:
        """The frozen teacher, if the stage has one."""
        return self.passes.teacher

    def begin_at(self, *, steps: int, tokens: int) -> None:
        """Count from here, where the weights and the samples that follow are those after so many steps."""
        self.steps_done, self.tokens_done = steps, tokens

    def configure_model(self) -> None:
        """Nothing: the engine has built the model as it trains."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        self.engine.begin(self.student)
        return build_optimizers(self.student, self.settings, self.engine.own_parts)

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        """Add one micro-batch [B, T + 1] to the window; step at the window's end.

        ValueError for a loss or gradient that is not finite, naming the tensor that was the first; on a GPU it may come
        one step late, but a step that is not finite never changes a weight.
        """
        if self._throughput is None:
            flops = stage_flops(self.stage, self.student, self.teacher, tokens.shape[1] - 1)
            self._throughput = Throughput(flops, self.device, num_devices=self.processes.size)
            self._throughput.begin(self.tokens_done)
        if self.on_policy is not None:
            tokens = self.on_policy.fill(tokens, self.student, self.steps_done)
        is_last = (batch_idx + 1) % self.settings.accumulate_grad_batches == 0
        self._window.add(tokens, self.passes.run(tokens, ends_window=is_last, backward=self.manual_backward))
        self.tokens_done += tokens[:, 1:].numel() * self.processes.size
        if is_last:
            self._optimizer_step()

    def on_train_end(self) -> None:
        """After the callbacks' own, and so the last measurement."""
        self.engine.finish(self.trainer.optimizers)

    def cpu(self) -> "StageModule":
        """Stay. Lightning moves what it has trained to the CPU, where student and teacher may have never been."""
        return self

    def _optimizer_step(self) -> None:
        if self.processes.size == 1 and self._window.is_empty():
            raise ValueError(nothing_to_predict(self.steps_done + 1))
        # Not Lightning's wrappers: automatic precision scaling is not used, and stepping through them costs time
        optimizers = self.trainer.optimizers
        for optimizer in optimizers:
            set_learning_rates(optimizer, self.settings, self.steps_done, self.num_steps)
        flags = [*self.stop.flags(), float(self.wants_checkpoint())]
        totals = self.processes.sum_(self._window.totals(flags, self.device))
        norms = self._update(optimizers, totals)
        self.steps_done += 1
        self.reader.add(
            step=self.steps_done,
            tokens=self.tokens_done,
            totals=totals,
            norms=norms,
            optimizers=optimizers,
            batches=self._window.batches,
        )
        self._window = Window(self.reader.parts)
        self._read_and_log()

    def _update(self, optimizers: Sequence[torch.optim.Optimizer], totals: torch.Tensor) -> GradientNorms:
        num, guard = len(self.reader.parts), self.reader.guard
        sums, count = totals[:num], totals[num : 2 * num].sum() / self.reader.share
        return self.engine.step(
            optimizers,
            count=count.float(),
            clip_val=self.settings.gradient_clip_val,
            sums=sums,
            leave_out=None if guard is None else guard.is_spike(sums.sum() / count),
        )

    def _read_and_log(self) -> None:
        interval = min(self.settings.log_every_n_steps, self.num_steps)
        is_logged = self.steps_done % interval == 0
        waits = is_logged or self.steps_done == self.num_steps or self.device.type == "cpu"
        self.reader.read(lag=0 if waits else 1)
        if self.steps_done == self.num_steps:
            self.passes.forget_graph()  # before the held-out measurement at the end, which takes memory of its own
        if is_logged:
            # Not self.log_dict, which counts batches from where this process began
            assert self._throughput is not None
            row = self.reader.last_metrics | self._throughput.since_last_row(self.tokens_done)
            for logger in self.trainer.loggers:
                logger.log_metrics(row, self.steps_done)

    def _explained(self, fault: str, batches: list[torch.Tensor]) -> str:
        self.passes.forget_graph()
        return explained(fault, self.stage, self.student, self.teacher, batches, self.engine)
