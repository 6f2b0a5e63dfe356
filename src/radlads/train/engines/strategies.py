"""Lightning's strategies, by the names that train.strategy knows."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from radlads.config.schema import TrainConfig
from radlads.train.engines.zero import ZeroStrategy, is_partitioned, uses_engine
from radlads.train.engines.zero3 import PartitionedStrategy
from radlads.train.processes.group import Processes


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP without torch's wrapper around the model.

    The wrapper's reducer expects one backward pass over all parameters; a stage has one for every part of its loss, and
    the align stage's are a CUDA graph. Gradients are added up by train/replicas.py instead, once a step.
    """

    def configure_ddp(self) -> None:
        """Leave the model as it is."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, for models that train/sharding.py has sharded before the trainer exists."""

    def __init__(self, num_processes: int):
        super().__init__(data_parallel_size=num_processes, tensor_parallel_size=1)


def strategy_arguments(train: TrainConfig, processes: Processes) -> dict[str, Any]:
    """What the Trainer is told about processes that have been started and joined already."""
    if processes.size == 1:
        return {"devices": 1}
    per_node = processes.size // train.num_nodes
    return {"strategy": _strategy(train, processes), "devices": per_node, "num_nodes": train.num_nodes}


def _strategy(train: TrainConfig, processes: Processes) -> Strategy:
    if uses_engine(train, processes):
        return PartitionedStrategy(train) if is_partitioned(train, processes) else ZeroStrategy(train)
    return ShardedStrategy(processes.size) if train.strategy == "fsdp" else ReplicatedStrategy()
