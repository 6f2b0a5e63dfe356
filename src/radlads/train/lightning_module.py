"""A stage as a LightningModule: backward part by part, one optimiser step per accumulation window."""

import functools
from collections.abc import Callable

import lightning as L
import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import Stage, is_trainable
from radlads.model.modeling import RadladsForCausalLM
from radlads.train import spike_guard
from radlads.train.cuda_graph import GraphedPasses
from radlads.train.diagnosis import first_not_finite
from radlads.train.engines.sharding import is_sharded
from radlads.train.engines.updates import ReplicatedUpdates, ShardedUpdates, Updates
from radlads.train.engines.zero import DeepSpeedUpdates, is_partitioned, uses_engine
from radlads.train.engines.zero3 import PartitionedUpdates
from radlads.train.logging.throughput import Throughput, stage_flops
from radlads.train.optimizers.optim import build_optimizers, set_learning_rates
from radlads.train.optimizers.step import GradientNorms, PartSum, Readout, backward_parts
from radlads.train.processes.group import ALONE, Processes
from radlads.train.step_record import StepRecord
from radlads.train.stopping import StopRequests


class StageModule(L.LightningModule):
    """Trains `student` by `stage`. The frozen teacher is kept out of the module tree and so of every checkpoint.

    Optimisation is manual, because a stage's loss comes in parts whose graphs are freed one by one, and because a
    loss is a sum over a count: gradients of sums are added up over the window and divided once by its whole count.

    On a GPU the host queues a step while the one before still runs, and reads that one's metrics then; steps that are
    logged, and the last, are waited for. `last_metrics` are those of the newest step that was read. `graphed`, set
    before the first step, records forward and backward as a CUDA graph (see GraphedPasses).

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
        self._names, self._share = stage.part_names(student), stage.share(student)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._batches: list[torch.Tensor] = []
        self._unread: list[StepRecord] = []
        self.graphed = False
        self._graphed_passes: GraphedPasses | None = None
        self.updates: Updates  # comes with the optimisers
        self.spike_guard: spike_guard.SpikeGuard | None = None
        self._throughput: Throughput | None = None  # begins with the first micro-batch
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(is_trainable(name, student, stage.trainable))

    def _build_updates(self) -> Updates:
        if uses_engine(self.settings, self.processes):
            in_parts = is_partitioned(self.settings, self.processes)
            return PartitionedUpdates(self.student) if in_parts else DeepSpeedUpdates(self.student)
        if is_sharded(self.student):
            return ShardedUpdates(self.student, self.processes)
        return ReplicatedUpdates(self.student, self.settings, self.processes)

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
        self.updates = self._build_updates()
        return build_optimizers(self.student, self.settings, self.updates.own_parts)

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        """Add one micro-batch [B, T + 1] to the window; step at the window's end.

        ValueError for a loss or gradient that is not finite, naming the tensor that was the first; on a GPU it may come
        one step late, but a step that is not finite never changes a weight.
        """
        if self._throughput is None:
            flops = stage_flops(self.stage, self.student, self.teacher, tokens.shape[1] - 1)
            self._throughput = Throughput(flops, self.device, num_devices=self.processes.size)
            self._throughput.begin(self.tokens_done)
        self._batches.append(tokens)
        is_last = (batch_idx + 1) % self.settings.accumulate_grad_batches == 0
        for part in self._backward_parts(tokens, ends_window=is_last):
            self._sums[part.name] = self._sums[part.name] + part.sum if part.name in self._sums else part.sum
            self._counts[part.name] = self._counts.get(part.name, 0) + part.count
        self.tokens_done += tokens[:, 1:].numel() * self.processes.size
        if is_last:
            self._optimizer_step()

    def _backward_parts(self, tokens: torch.Tensor, *, ends_window: bool) -> list[PartSum]:
        """The passes of a micro-batch; where a window ends, gradients are those of all processes from then on."""
        if not self.graphed:
            return self._passes(tokens, ends_window=ends_window, backward=self.manual_backward)
        # A window of one batch is recorded whole, so that gradients travel while a replay still makes others
        is_window = self.settings.accumulate_grad_batches == 1
        if self._graphed_passes is None:
            passes = functools.partial(self._passes, ends_window=is_window, backward=torch.Tensor.backward)
            self._graphed_passes = GraphedPasses(passes, self.student, self.teacher, accumulates=not is_window)
        parts = self._graphed_passes(tokens)
        if ends_window and not is_window:
            self.updates.add_up()
        return parts

    def _passes(
        self, tokens: torch.Tensor, *, ends_window: bool, backward: Callable[[torch.Tensor], object]
    ) -> list[PartSum]:
        if ends_window:
            self.updates.begin_last()
        parts = backward_parts(self.stage, self.student, self.teacher, tokens, backward=backward)
        if ends_window:
            self.updates.add_up()
        return parts

    def on_train_end(self) -> None:
        """After the callbacks' own, and so the last measurement."""
        self.updates.finish(self.trainer.optimizers)

    def cpu(self) -> "StageModule":
        """Stay. Lightning moves what it has trained to the CPU, where student and teacher may have never been."""
        return self

    def forget_graph(self) -> None:
        """Let the recorded graph and its memory go."""
        self._graphed_passes = None

    def _optimizer_step(self) -> None:
        if self.processes.size == 1 and not sum(self._counts.values()):
            raise ValueError(self._nothing_to_predict(self.steps_done + 1))
        # Not Lightning's wrappers: automatic precision scaling is not used, and stepping through them costs time
        optimizers = self.trainer.optimizers
        for optimizer in optimizers:
            set_learning_rates(optimizer, self.settings, self.steps_done, self.num_steps)
        totals, num, guard = self._totals(), len(self._names), self.spike_guard
        sums, count = totals[:num], totals[num : 2 * num].sum() / self._share
        norms = self.updates.step(
            optimizers,
            count=count.float(),
            clip_val=self.settings.gradient_clip_val,
            sums=sums,
            leave_out=None if guard is None else guard.is_spike(sums.sum() / count),
        )
        self.steps_done += 1
        self._unread.append(self._record(totals, norms))
        self._sums, self._counts, self._batches = {}, {}, []
        interval = min(self.settings.log_every_n_steps, self.num_steps)
        is_logged = self.steps_done % interval == 0
        waits = is_logged or self.steps_done == self.num_steps or self.device.type == "cpu"
        self.read_steps(lag=0 if waits else 1)
        if self.steps_done == self.num_steps:
            self.forget_graph()  # before the held-out measurement at the end, which takes memory of its own
        if is_logged:
            # Not self.log_dict, which counts batches from where this process began
            assert self._throughput is not None
            row = self.last_metrics | self._throughput.since_last_row(self.tokens_done)
            for logger in self.trainer.loggers:
                logger.log_metrics(row, self.steps_done)

    def _record(self, totals: torch.Tensor, norms: GradientNorms) -> StepRecord:
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        others = [f"grad_norm_{role}" for role in norms.by_role]
        numbers = [totals, torch.stack([norms.whole, *norms.by_role.values()]).to(totals)]
        if self.spike_guard is not None:
            others += spike_guard.NAMES
            numbers.append(self.spike_guard.state.to(totals))
        return StepRecord(
            step=self.steps_done,
            tokens=self.tokens_done,
            parts=self._names,
            share=self._share,
            num_flags=len(totals) - 2 * len(self._names),
            others=others,
            rates={f"lr_{group['role']}": group["lr"] for group in groups},
            readout=Readout(torch.cat(numbers)),
            batches=self._batches,
        )

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
            if self.spike_guard is not None:
                self.spike_guard.see(self.last_metrics)

    def _nothing_to_predict(self, step: int) -> str:
        return (
            f"step {step} has nothing to predict, as its rows hold only ends of documents: raise train.micro_bsz, or "
            "build the corpus without empty documents"
        )

    def _explained(self, fault: str, batches: list[torch.Tensor]) -> str:
        """The fault, which tensor was the first that is not finite, and what to do."""
        self.forget_graph()
        self.student.compile_blocks(False)
        self.updates.let_go()
        own = first_not_finite(self.stage, self.student, self.teacher, batches, whole=self.processes.size > 1)
        found = self.processes.gather(own)
        first = next((each for each in found if each.startswith("and")), found[0])
        remedy = "lower the learning rate, or look for NaN in the weights the stage started from"
        return f"{fault}, {first}: {remedy}"
