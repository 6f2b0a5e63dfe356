"""A stage as a LightningModule: backward part by part, one optimiser step per accumulation window."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import Stage, is_trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.diagnosis import first_not_finite
from radlads.train.optim import build_optimizers, set_learning_rates
from radlads.train.own_parts import own_parts, take_gradients
from radlads.train.processes import ALONE, Processes
from radlads.train.replicas import GradientSums
from radlads.train.sharding import is_sharded
from radlads.train.step import GraphedParts, PartSum, Readout, backward_parts, optimizer_step
from radlads.train.stopping import StopRequests


@dataclass(frozen=True)
class StepRecord:
    """What is known of a step when it is queued: its number and tokens (with all before it), the parts' names, the
    learning rates, its batches, and, arriving later, what all processes together found (see StageModule._totals)."""

    step: int
    tokens: int
    names: list[str]
    rates: dict[str, float]
    readout: Readout
    batches: list[torch.Tensor]

    def fault(self, stage: str) -> str | None:
        """What is wrong with loss or gradient; None if nothing is. Waits until the step is done."""
        sums, _, _, norm = self._totals()
        for name, value in zip(self.names, sums, strict=True):
            if not math.isfinite(value):
                return f"the loss of {stage} ({name}) is {value} at step {self.step}"
        return None if math.isfinite(norm) else f"the gradient of {stage} is {norm} at step {self.step}"

    def is_empty(self) -> bool:
        """Whether there was nothing to predict. Waits until the step is done."""
        return not sum(self._totals()[1])

    def flags(self) -> list[float]:
        """What the processes asked for, added up. Waits until the step is done."""
        return self._totals()[2]

    def metrics(self) -> dict[str, float]:
        """A row of metrics. Waits until the step is done."""
        sums, counts, _, norm = self._totals()
        metrics = {
            "loss": sum(sums) / sum(counts),
            "grad_norm": norm,
            "optimizer_step": float(self.step),
            "tokens": float(self.tokens),
        } | self.rates
        if len(sums) > 1:
            parts = sorted(zip(self.names, sums, counts, strict=True))
            metrics |= {name: value / count for name, value, count in parts if count}
        return metrics

    def _totals(self) -> tuple[list[float], list[float], list[float], float]:
        """Sums and counts of the parts, flags, and the gradient's norm."""
        values, num = self.readout.values(), len(self.names)
        return values[:num], values[num : 2 * num], values[2 * num : -1], values[-1]


class StageModule(L.LightningModule):
    """Trains `student` by `stage`. The frozen teacher is kept out of the module tree and so of every checkpoint.

    Optimisation is manual, because a stage's loss comes in parts whose graphs are freed one by one, and because a
    loss is a sum over a count: gradients of sums are added up over the window and divided once by its whole count.

    On a GPU the host queues a step while the one before still runs, and reads that one's metrics then; steps that are
    logged, and the last, are waited for. `last_metrics` are those of the newest step that was read. `graphed`, set
    before the first step, records forward and backward as a CUDA graph (see GraphedParts).

    Of several `processes` each has its own samples, and all make the same steps: gradients, sums and counts are those
    of all, and so is what is asked for in between (`stop`, and `wants_checkpoint` by the clock of any process).
    """

    def __init__(
        self,
        stage: Stage,
        student: RadladsForCausalLM,
        teacher: RadladsForCausalLM | None,
        train: TrainConfig,
        num_steps: int,
        *,
        stop: StopRequests | None = None,
        processes: Processes = ALONE,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.stage, self.student, self.settings, self.num_steps = stage, student, train, num_steps
        self.stop, self.processes = stop or StopRequests(), processes
        self.wants_checkpoint: Callable[[], bool] = lambda: False
        self.checkpoint_agreed = False
        self._outside_the_tree = (teacher,)
        self.steps_done = self.tokens_done = 0
        self.last_metrics: dict[str, float] = {}
        self._names = stage.part_names(student)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._batches: list[torch.Tensor] = []
        self._unread: list[StepRecord] = []
        self.graphed = False
        self._graphed_parts: GraphedParts | None = None
        self.own_parts: dict[str, torch.nn.Parameter] = {}
        self._gradient_sums: GradientSums | None = None
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

    def configure_model(self) -> None:
        """Nothing: sharded models are built so."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        trained = {name: each for name, each in self.student.named_parameters() if each.requires_grad}
        self.own_parts = own_parts(trained)
        if self.processes.size > 1 and not is_sharded(self.student):
            may_lack = bool(self.settings.reset_state_at_eos)
            self._gradient_sums = GradientSums(trained, self.processes, may_lack=may_lack)
        return build_optimizers(self.student, self.settings, self.own_parts)

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        """Add one micro-batch [B, T + 1] to the window; step at the window's end.

        ValueError for a loss or gradient that is not finite, naming the tensor that was the first; on a GPU it may come
        one step late, but a step that is not finite never changes a weight.
        """
        self._batches.append(tokens)
        is_last = (batch_idx + 1) % self.settings.accumulate_grad_batches == 0
        if is_last and self._gradient_sums is not None and not (self.graphed or self.settings.reset_state_at_eos):
            self._gradient_sums.begin_last()
        for part in self._backward_parts(tokens):
            self._sums[part.name] = self._sums[part.name] + part.sum if part.name in self._sums else part.sum
            self._counts[part.name] = self._counts.get(part.name, 0) + part.count
        self.tokens_done += tokens[:, 1:].numel() * self.processes.size
        if is_last:
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
        if self.processes.size == 1 and not sum(self._counts.values()):
            raise ValueError(self._nothing_to_predict(self.steps_done + 1))
        # Not Lightning's wrappers: automatic precision scaling is not used, and stepping through them costs time
        optimizers = self.trainer.optimizers
        for optimizer in optimizers:
            set_learning_rates(optimizer, self.settings, self.steps_done, self.num_steps)
        if self._gradient_sums is not None:
            self._gradient_sums.finish()
        take_gradients(self.student, self.own_parts)
        totals, num = self._totals(), len(self._names)
        norm = optimizer_step(
            optimizers,
            self.own_parts.values(),
            count=totals[num : 2 * num].sum().float(),
            clip_val=self.settings.gradient_clip_val,
            sums=totals[:num],
            add_up=self.processes.sum_ if is_sharded(self.student) else None,
        )
        self.steps_done += 1
        rates = {f"lr_{group['role']}": group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        readout = Readout(torch.cat([totals, norm.to(totals).unsqueeze(0)]))
        self._unread.append(StepRecord(self.steps_done, self.tokens_done, self._names, rates, readout, self._batches))
        self._sums, self._counts, self._batches = {}, {}, []
        interval = min(self.settings.log_every_n_steps, self.num_steps)
        is_logged = self.steps_done % interval == 0
        waits = is_logged or self.steps_done == self.num_steps or self.device.type == "cpu"
        self.read_steps(lag=0 if waits else 1)
        if is_logged:
            # Not self.log_dict, which counts batches from where this process began
            for logger in self.trainer.loggers:
                logger.log_metrics(self.last_metrics, self.steps_done)

    def _totals(self) -> torch.Tensor:
        """Of all processes: the parts' loss sums, their counts, and flags for signals and a checkpoint."""
        device = self.device
        numbers = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=numbers, device=device)
        sums = torch.stack([self._sums[name].to(numbers) if name in self._sums else zero for name in self._names])
        known = [*(float(self._counts.get(name, 0)) for name in self._names), *self.stop.flags()]
        known.append(float(self.wants_checkpoint()))
        return self.processes.sum_(torch.cat([sums, torch.tensor(known, dtype=numbers).to(device, non_blocking=True)]))

    def read_steps(self, *, lag: int = 0) -> None:
        """Read the metrics of all steps but the newest `lag`, waiting for them; ValueError as training_step."""
        while len(self._unread) > lag:
            record = self._unread.pop(0)
            if record.is_empty():
                raise ValueError(self._nothing_to_predict(record.step))
            if fault := record.fault(self.stage.name):
                raise ValueError(self._explained(fault, record.batches))
            self.last_metrics = record.metrics()
            *signals, checkpoint = record.flags()
            self.stop.agree(signals)
            self.checkpoint_agreed |= bool(checkpoint)

    def _nothing_to_predict(self, step: int) -> str:
        return (
            f"step {step} has nothing to predict, as its rows hold only ends of documents: raise train.micro_bsz, or "
            "build the corpus without empty documents"
        )

    def _explained(self, fault: str, batches: list[torch.Tensor]) -> str:
        """The fault, which tensor was the first that is not finite, and what to do."""
        self.forget_graph()
        self.student.compile_blocks(False)
        own = first_not_finite(self.stage, self.student, self.teacher, batches, whole=self.processes.size > 1)
        found = self.processes.gather(own)
        first = next((each for each in found if each.startswith("and")), found[0])
        remedy = "lower the learning rate, or look for NaN in the weights the stage started from"
        return f"{fault}, {first}: {remedy}"
