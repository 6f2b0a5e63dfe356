"""How gradients become an update: what differs between the ways in which processes share the work.

A process that is alone, and processes that hold the student whole or in shards, are here; train/deepspeed_engine.py has
those that leave it to DeepSpeed. When a window ends, and what is made of the norms, is left to StageModule.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from radlads.config.schema import TrainConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.own_parts import own_parts, take_gradients
from radlads.train.engines.replicas import GradientSums
from radlads.train.optimizers.optim import weights_to_keep
from radlads.train.optimizers.step import GradientNorms, optimizer_step
from radlads.train.processes.group import Processes


class Updates(Protocol):
    """The updates of one student. own_parts: its trained parameters by name, as the optimisers of this process know
    them."""

    own_parts: Mapping[str, torch.nn.Parameter]

    def begin_last(self) -> None:
        """A micro-batch begins that is its window's last, and gives every parameter its gradient once."""
        ...

    def add_up(self) -> None:
        """The window's gradients are all there: make them those of all processes. A CUDA graph may record it."""
        ...

    def step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        count: torch.Tensor,
        clip_val: float,
        sums: torch.Tensor,
        leave_out: torch.Tensor | None,
    ) -> GradientNorms:
        """Update by gradients that have been added up; see optimizer_step."""
        ...

    def let_go(self) -> None:
        """There will be no further step: gradients stay where a backward pass puts them."""
        ...

    def finish(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """The training is over: leave the student the weights to keep, and of the optimisers no state."""
        ...


class ReplicatedUpdates:
    """Of a student that is whole in every process, or in the only one."""

    def __init__(self, student: RadladsForCausalLM, train: TrainConfig, processes: Processes):
        trained = trained_parameters(student)
        self.own_parts: Mapping[str, torch.nn.Parameter] = trained
        self._may_lack = bool(train.reset_state_at_eos)
        self._sums = None if processes.size == 1 else GradientSums(trained, processes, may_lack=self._may_lack)

    def begin_last(self) -> None:
        """See Updates."""
        if self._sums is not None and not self._may_lack:
            self._sums.begin_last()

    def add_up(self) -> None:
        """See Updates."""
        if self._sums is not None:
            self._sums.finish()

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Updates."""
        return optimizer_step(
            optimizers, self.own_parts.values(), count=count, clip_val=clip_val, sums=sums, leave_out=leave_out
        )

    def let_go(self) -> None:
        """See Updates."""

    def finish(self, optimizers) -> None:
        """See Updates."""
        _keep_weights(optimizers)


class ShardedUpdates:
    """Of a student that FSDP2 has sharded."""

    def __init__(self, student: RadladsForCausalLM, processes: Processes):
        self._student, self._processes = student, processes
        self.own_parts: Mapping[str, torch.nn.Parameter] = own_parts(trained_parameters(student))

    def begin_last(self) -> None:
        """See Updates."""

    def add_up(self) -> None:
        """See Updates. FSDP2's own hooks have."""
        take_gradients(self._student, self.own_parts)

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Updates."""
        return optimizer_step(
            optimizers,
            self.own_parts.values(),
            count=count,
            clip_val=clip_val,
            sums=sums,
            add_up=self._processes.sum_,
            leave_out=leave_out,
        )

    def let_go(self) -> None:
        """See Updates."""

    def finish(self, optimizers) -> None:
        """See Updates."""
        _keep_weights(optimizers)


def trained_parameters(student: RadladsForCausalLM) -> dict[str, torch.nn.Parameter]:
    """The parameters that train, by name."""
    return {name: each for name, each in student.named_parameters() if each.requires_grad}


def _keep_weights(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    with weights_to_keep(optimizers):
        for optimizer in optimizers:
            optimizer.param_groups.clear()  # or leaving the block would change the weights back
            optimizer.state.clear()
