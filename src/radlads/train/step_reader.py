"""Reading steps once the device has done them: what they put out, what is wrong with them, what processes ask for."""

from collections.abc import Callable, Sequence

import torch

from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.train import spike_guard
from radlads.train.optimizers.step import GradientNorms, Readout
from radlads.train.step_record import StepRecord
from radlads.train.stopping import StopRequests


class StepReader:
    """Reads the steps of a stage, in their order.

    last_metrics: those of the newest step that was read. checkpoint_agreed: whether a process has asked for a
    checkpoint; a signal to one is told to `stop`. guard: judges losses that leap, if there is one. explain: the
    sentence for a fault of a step, given its batches.
    """

    def __init__(
        self,
        stage: Stage,
        student: RadladsForCausalLM,
        stop: StopRequests,
        explain: Callable[[str, list[torch.Tensor]], str],
    ):
        self.parts, self.share = stage.part_names(student), stage.share(student)
        self._stage, self._stop, self._explain = stage, stop, explain
        self.last_metrics: dict[str, float] = {}
        self.checkpoint_agreed = False
        self.guard: spike_guard.SpikeGuard | None = None
        self._unread: list[StepRecord] = []

    def add(
        self,
        *,
        step: int,
        tokens: int,
        totals: torch.Tensor,
        norms: GradientNorms,
        optimizers: Sequence[torch.optim.Optimizer],
        batches: list[torch.Tensor],
    ) -> None:
        """A step is queued. totals: of all processes, as Window.totals has them."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        others = [f"grad_norm_{role}" for role in norms.by_role]
        numbers = [totals, torch.stack([norms.whole, *norms.by_role.values()]).to(totals)]
        if self.guard is not None:
            others += spike_guard.NAMES
            numbers.append(self.guard.state.to(totals))
        record = StepRecord(
            step=step,
            tokens=tokens,
            parts=self.parts,
            share=self.share,
            num_flags=len(totals) - 2 * len(self.parts),
            others=others,
            rates={f"lr_{group['role']}": group["lr"] for group in groups},
            readout=Readout(torch.cat(numbers)),
            batches=batches,
        )
        self._unread.append(record)

    def read(self, *, lag: int = 0) -> None:
        """Read all steps but the newest `lag`, waiting for them. ValueError for one that is not finite, or empty."""
        while len(self._unread) > lag:
            record = self._unread.pop(0)
            if record.is_empty():
                raise ValueError(nothing_to_predict(record.step))
            if fault := record.fault(self._stage.name):
                raise ValueError(self._explain(fault, record.batches))
            self.last_metrics = record.metrics()
            *signals, checkpoint = record.flags()
            self._stop.agree(signals)
            self.checkpoint_agreed |= bool(checkpoint)
            if self.guard is not None:
                self.guard.see(self.last_metrics)


def nothing_to_predict(step: int) -> str:
    """The sentence for a step without labels."""
    return (
        f"step {step} has nothing to predict, as its rows hold only ends of documents: raise train.micro_bsz, or "
        "build the corpus without empty documents"
    )
