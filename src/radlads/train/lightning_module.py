"""A stage as a LightningModule: backward part by part, one optimiser step per accumulation window."""

import math
from dataclasses import dataclass

import lightning as L
import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import Stage, is_trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.train import spike_guard
from radlads.train.diagnosis import first_not_finite
from radlads.train.optim import build_optimizers, set_learning_rates
from radlads.train.step import GraphedParts, PartSum, Readout, backward_parts, optimizer_step
from radlads.train.throughput import Throughput, stage_flops


@dataclass(frozen=True)
class StepRecord:
    """What is known of a step when it is queued: its number and tokens (with all before it), each part's count, the
    learning rates, its batches, and, arriving later, the parts' loss sums followed by the gradient's norm and the
    numbers of `names`."""

    step: int
    tokens: int
    counts: dict[str, int]
    rates: dict[str, float]
    names: tuple[str, ...]
    readout: Readout
    batches: list[torch.Tensor]

    def fault(self, stage: str) -> str | None:
        """What is not finite, loss or gradient; None if both are. Waits until the step is done."""
        sums, (norm, *_) = self._numbers()
        for name, value in zip(self.counts, sums, strict=True):
            if not math.isfinite(value):
                return f"the loss of {stage} ({name}) is {value} at step {self.step}"
        return None if math.isfinite(norm) else f"the gradient of {stage} is {norm} at step {self.step}"

    def metrics(self) -> dict[str, float]:
        """A row of metrics. Waits until the step is done."""
        sums, (norm, *others) = self._numbers()
        metrics = {
            "loss": sum(sums) / sum(self.counts.values()),
            "grad_norm": norm,
            "optimizer_step": float(self.step),
            "tokens": float(self.tokens),
        } | self.rates
        metrics |= zip(self.names, others, strict=True)
        if len(sums) > 1:
            parts = zip(self.counts.items(), sums, strict=True)
            metrics |= {name: value / count for (name, count), value in sorted(parts)}
        return metrics

    def _numbers(self) -> tuple[list[float], list[float]]:
        """The loss sums, and what follows them."""
        values = self.readout.values()
        return values[: len(self.counts)], values[len(self.counts) :]


class StageModule(L.LightningModule):
    """Trains `student` by `stage`. The frozen teacher is kept out of the module tree and so of every checkpoint.

    Optimisation is manual, because a stage's loss comes in parts whose graphs are freed one by one, and because a
    loss is a sum over a count: gradients of sums are added up over the window and divided once by its whole count.

    On a GPU the host queues a step while the one before still runs, and reads that one's metrics then; steps that are
    logged, and the last, are waited for. `last_metrics` are those of the newest step that was read. `graphed`, set
    before the first step, records forward and backward as a CUDA graph (see GraphedParts).
    """

    def __init__(
        self,
        stage: Stage,
        student: RadladsForCausalLM,
        teacher: RadladsForCausalLM | None,
        train: TrainConfig,
        num_steps: int,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.stage, self.student, self.settings, self.num_steps = stage, student, train, num_steps
        self._outside_the_tree = (teacher,)
        self.steps_done = self.tokens_done = 0
        self.last_metrics: dict[str, float] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._batches: list[torch.Tensor] = []
        self._unread: list[StepRecord] = []
        self.graphed = False
        self._graphed_parts: GraphedParts | None = None
        self.spike_guard: spike_guard.SpikeGuard | None = None
        self._throughput: Throughput | None = None  # begins with the first micro-batch
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_trainable(name, student, stage.trainable))

    @property
    def teacher(self) -> RadladsForCausalLM | None:
        """The frozen teacher, if the stage has one."""
        return self._outside_the_tree[0]

    def learn_from(self, teacher: RadladsForCausalLM | None) -> None:
        """Take another teacher, or the same one in another precision."""
        self._outside_the_tree = (teacher,)

    def begin_at(self, *, steps: int, tokens: int) -> None:
        """Count from here, where the weights and the samples that follow are those after so many steps."""
        self.steps_done, self.tokens_done = steps, tokens

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.student, self.settings)

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        """Add one micro-batch [B, T + 1] to the window; step at the window's end.

        ValueError for a loss or gradient that is not finite, naming the tensor that was the first; on a GPU it may come
        one step late, but a step that is not finite never changes a weight.
        """
        if self._throughput is None:
            flops = stage_flops(self.stage, self.student, self.teacher, tokens.shape[1] - 1)
            self._throughput = Throughput(flops, self.device)
            self._throughput.begin(self.tokens_done)
        self._batches.append(tokens)
        for part in self._backward_parts(tokens):
            self._sums[part.name] = self._sums[part.name] + part.sum if part.name in self._sums else part.sum
            self._counts[part.name] = self._counts.get(part.name, 0) + part.count
        self.tokens_done += tokens[:, 1:].numel()
        if (batch_idx + 1) % self.settings.accumulate_grad_batches == 0:
            self._optimizer_step()

    def _backward_parts(self, tokens: torch.Tensor) -> list[PartSum]:
        if not self.graphed:
            return backward_parts(self.stage, self.student, self.teacher, tokens, backward=self.manual_backward)
        if self._graphed_parts is None:
            self._graphed_parts = GraphedParts(self.stage, self.student, self.teacher)
        return self._graphed_parts(tokens)

    def forget_graph(self) -> None:
        """Let the recorded graph and its memory go."""
        self._graphed_parts = None

    def _optimizer_step(self) -> None:
        if not sum(self._counts.values()):
            raise ValueError(
                f"step {self.steps_done + 1} has nothing to predict, as its rows hold only ends of documents: "
                "raise train.micro_bsz, or build the corpus without empty documents"
            )
        # Not Lightning's wrappers: automatic precision scaling is not used, and stepping through them costs time
        optimizers = self.trainer.optimizers
        for optimizer in optimizers:
            set_learning_rates(optimizer, self.settings, self.steps_done, self.num_steps)
        sums, count = torch.stack(list(self._sums.values())), sum(self._counts.values())
        guard = self.spike_guard
        norms = optimizer_step(
            optimizers,
            self.student.parameters(),
            count=count,
            clip_val=self.settings.gradient_clip_val,
            sums=sums,
            leave_out=None if guard is None else guard.is_spike(sums.sum() / count),
        )
        self.steps_done += 1
        rates = {f"lr_{group['role']}": group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        names = tuple(f"grad_norm_{role}" for role in norms.by_role) + (() if guard is None else spike_guard.NAMES)
        numbers = [sums, torch.stack([norms.whole, *norms.by_role.values()]).to(sums)]
        readout = Readout(torch.cat(numbers if guard is None else [*numbers, guard.state.to(sums)]))
        self._unread.append(
            StepRecord(self.steps_done, self.tokens_done, self._counts, rates, names, readout, self._batches)
        )
        self._sums, self._counts, self._batches = {}, {}, []
        interval = min(self.settings.log_every_n_steps, self.num_steps)
        is_logged = self.steps_done % interval == 0
        waits = is_logged or self.steps_done == self.num_steps or self.device.type == "cpu"
        self.read_steps(lag=0 if waits else 1)
        if is_logged:
            # Not self.log_dict, which counts batches from where this process began
            assert self._throughput is not None
            row = self.last_metrics | self._throughput.since_last_row(self.tokens_done)
            for logger in self.trainer.loggers:
                logger.log_metrics(row, self.steps_done)

    def read_steps(self, *, lag: int = 0) -> None:
        """Read the metrics of all steps but the newest `lag`, waiting for them; ValueError as training_step."""
        while len(self._unread) > lag:
            record = self._unread.pop(0)
            if fault := record.fault(self.stage.name):
                raise ValueError(self._explained(fault, record.batches))
            self.last_metrics = record.metrics()
            if self.spike_guard is not None:
                self.spike_guard.see(self.last_metrics)

    def _explained(self, fault: str, batches: list[torch.Tensor]) -> str:
        """The fault, which tensor was the first that is not finite, and what to do."""
        self.forget_graph()
        self.student.compile_blocks(False)
        first = first_not_finite(self.stage, self.student, self.teacher, batches)
        remedy = "lower the learning rate, or look for NaN in the weights the stage started from"
        return f"{fault}, {first}: {remedy}"
