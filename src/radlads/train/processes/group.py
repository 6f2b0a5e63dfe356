"""The processes of a run, as one of them sees them, and the four things that they do together.

Leaves how they are started to joining.py, and what is reduced between them, and when, to others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from radlads.config.schema import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them: `rank` of `size`, on `device`. By default it is alone."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = field(default=None, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of a tensor, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. Values are pickled, so they are small, and this package's own."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, work: Callable[[], T]) -> T:
        """What work() returns in the first process, which alone calls it; a user's error in it is raised in all."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            dist.barrier(device_ids=None if self.device is None or self.device.index is None else [self.device.index])


ALONE = Processes()


def check_processes(train: TrainConfig, processes: Processes) -> None:
    """Raise ValueError if a stage is asked to run on more processes than there are, as where no command starts them."""
    asked = max(1, train.devices) * train.num_nodes
    if processes.size < asked:
        raise ValueError(
            f"train.devices {train.devices} and train.num_nodes {train.num_nodes} ask for {asked} processes, but "
            f"{processes.size} runs: use radlads train, which starts them (under SLURM, give srun as many tasks), or "
            "set both to 1"
        )
