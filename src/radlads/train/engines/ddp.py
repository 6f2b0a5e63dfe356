"""ddp: every process holds both models whole, and gradients are added up while backward still runs."""

from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.replicas import GradientSums
from radlads.train.engines.replicated import Replicated


class Ddp(Replicated):
    """The engine that train.strategy ddp names."""

    records_graphs = True
    plan_note = "ddp: all is replicated, as on one GPU"

    def begin(self, student: RadladsForCausalLM) -> None:
        """See Engine."""
        super().begin(student)
        self._sums = GradientSums(dict(self.own_parts), self.processes)

    def begin_last_micro_batch(self) -> None:
        """See Engine."""
        self._sums.begin_last()

    def reduce_gradients(self) -> None:
        """See Engine. A CUDA graph may record it."""
        self._sums.finish()
