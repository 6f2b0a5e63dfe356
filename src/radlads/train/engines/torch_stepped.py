"""The common part of all engines whose parameters torch's optimisers update."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch

from radlads.config.schema import TrainConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.engine import Engine
from radlads.train.engines.optimizer_state import restore_state
from radlads.train.optimizers.optim import weights_to_keep
from radlads.train.optimizers.step import GradientNorms, optimizer_step


class TorchStepped(Engine):
    """An engine that steps by optimizer_step."""

    student: RadladsForCausalLM

    def begin(self, student: RadladsForCausalLM) -> None:
        """See Engine."""
        self.student = student
        self.own_parts = self.own_parts_of(trained_parameters(student))

    @abstractmethod
    def own_parts_of(self, trained: dict[str, torch.nn.Parameter]) -> Mapping[str, torch.nn.Parameter]:
        """The part of each trained parameter that this process updates, by name."""

    @property
    def add_up_rows(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """A sum over the processes that have the other rows of the parameters; None if none have."""
        return None

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Engine."""
        return optimizer_step(
            optimizers,
            self.own_parts.values(),
            count=count,
            clip_val=clip_val,
            sums=sums,
            add_up=self.add_up_rows,
            leave_out=leave_out,
        )

    def finish(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """See Engine."""
        with weights_to_keep(optimizers):
            for optimizer in optimizers:
                optimizer.param_groups.clear()  # or leaving the block would change the weights back
                optimizer.state.clear()

    def restore_optimizers(self, stored, groups, optimizers) -> None:
        """See Engine."""
        restore_state(stored, groups, self.student, self.own_parts, optimizers)


def trained_parameters(student: RadladsForCausalLM) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: each for name, each in student.named_parameters() if each.requires_grad}


def own_dtype(train: TrainConfig) -> torch.dtype:
    """The type of the weights that the student begins with: bf16 under bf16-true, else fp32."""
    return torch.bfloat16 if train.precision == "bf16-true" else torch.float32
