"""The protocol of an engine: the way in which the processes of a run share the work of a stage.

Models are built by one engine and trained by another of the same class, so building leaves nothing in it. Training
calls the methods in this order: `lazy_init`, `placed`, `begin`; in each window `begin_last_micro_batch`,
`reduce_gradients` and `step`, and after some of them `checkpoint_state`; `finish`, and `save` when the stage is over.
All processes call the same methods in the same order.

If an engine keeps parameters in parts, they are DTensors of Shard(0) before and after training. In between FSDP2 makes
them whole, or Turns do (model/whole_parameters.py): code that reads a parameter asks these two.

Leaves to the stage what a loss is, and to its module when a window ends and what is made of the norms.
"""

# ruff: noqa: B027  (methods that do nothing are for engines that have nothing to do there)

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from radlads.checkpoint.weights import StoredWeights, own_part
from radlads.config.schema import TrainConfig
from radlads.convert.blueprint import Blueprint
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.footprint import Footprint
from radlads.train.optimizers.step import GradientNorms
from radlads.train.processes.group import Processes


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint takes of a run: the student's weights, its optimisers' tensors and the rest of their state.

    by: who has the tensors. "first": the first process has all of them. "all": all processes have to ask for each, in
    one order, and the first writes it. "rows": each has rows of its own, and writes those.
    """

    weights: StoredWeights
    moments: StoredWeights
    groups: list[dict[str, Any]]
    by: Literal["first", "all", "rows"] = "first"


class Engine(ABC):
    """How `processes` share the work of the stage that `train` describes.

    own_parts: from `begin` on, the trained parameters by name, as the optimisers of this process know them.
    """

    records_graphs: ClassVar[bool] = False
    """Whether a CUDA graph may record `begin_last_micro_batch`, the passes and `reduce_gradients`. Not inherited: what
    Python does in them is done once, when they are recorded, and not in a replay."""
    supports_fp8_teacher: ClassVar[bool] = True
    """Whether the teacher may be a copy in 8 bits."""
    supports_bf16_true: ClassVar[bool] = True
    """Whether it trains under bf16-true, which has no fp32 weights."""
    plan_note: ClassVar[str] = ""
    """What `radlads plan` says of it."""

    def __init__(self, train: TrainConfig, processes: Processes):
        self.train, self.processes = train, processes
        self.own_parts: Mapping[str, torch.nn.Parameter] = {}

    def __init_subclass__(cls) -> None:
        cls.records_graphs = vars(cls).get("records_graphs", False)

    @classmethod
    @abstractmethod
    def footprint(cls, num_gpus: int, precision: str) -> Footprint:
        """The memory of a step on each of num_gpus GPUs; precision: "bf16-true" or "bf16"."""

    # The models

    def check(self, student: RadladsConfig) -> None:
        """Raise ValueError for settings, or a student, that the engine does not go with. Before models are built."""

    @abstractmethod
    def build(
        self, blueprint: Blueprint, device: torch.device, *, is_student: bool
    ) -> tuple[RadladsForCausalLM, Counter]:
        """A model as it waits for training, and what the blueprint's fill returned."""

    def build_idle_teacher(self, blueprint: Blueprint, device: torch.device) -> tuple[RadladsForCausalLM, Counter]:
        """As build, of a teacher that is not run, or only as a copy in 8 bits: on the CPU."""
        return blueprint.build()

    def lazy_init(self, model: RadladsForCausalLM) -> None:
        """Called once it is decided which of the model's parameters train, before the model first runs."""

    @abstractmethod
    def placed(
        self,
        student: RadladsForCausalLM,
        teacher: RadladsForCausalLM | None,
        device: torch.device,
        precision: str,
    ) -> AbstractContextManager[RadladsForCausalLM | None]:
        """While open, both models are on the device, in the dtype that they train in. It yields the teacher to learn
        from, which may be a copy. Afterwards both are where they were. precision: the Trainer's, "32-true" or
        "bf16-mixed"."""

    @abstractmethod
    def save(self, student: RadladsForCausalLM, folder: Path) -> None:
        """Write the finished student's folder, in the first process."""

    # When memory runs out

    def remedies_for_models(self) -> list[str]:
        """What to do if a GPU's memory is too small for the models alone."""
        remedies = [] if self.train.precision == "bf16-true" else ["set train.precision bf16-true (under ddp or fsdp)"]
        if self.footprint(self.processes.size, self.train.precision).shared.weights > 1:
            return [*remedies, "take more GPUs"]
        as_it_is = " and train.teacher_precision same" if self.train.teacher_precision == "fp8" else ""
        return [*remedies, f"set train.strategy fsdp{as_it_is} on several GPUs"]

    def remedies_for_steps(self, recompute: list[str]) -> list[str]:
        """Settings that take less memory in a step. recompute: the setting that recomputes more, if there is one."""
        return [] if self.train.precision == "bf16-true" else ["train.precision bf16-true"]

    # A step

    def trainer_arguments(self) -> dict[str, Any]:
        """What Lightning's Trainer is told about processes that have been started and joined already."""
        per_node = self.processes.size // self.train.num_nodes
        return {"strategy": self.lightning_strategy(), "devices": per_node, "num_nodes": self.train.num_nodes}

    def lightning_strategy(self) -> Any:
        """Lightning's strategy: by default one that joins processes and leaves the models as they are."""
        from radlads.train.engines.strategies import ReplicatedStrategy

        return ReplicatedStrategy()

    @abstractmethod
    def begin(self, student: RadladsForCausalLM) -> None:
        """Make `own_parts`. Called when the student is placed, before its optimisers are built."""

    def begin_last_micro_batch(self) -> None:
        """Called before the last micro-batch of a window, which gives every parameter its gradient once."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Make the window's gradients sums over all processes. Called after its last backward pass.

        Afterwards every process has the same bits, for each parameter that it updates and another process has too, or
        they would drift apart. A parameter that has a gradient in some processes alone gets one in all.
        """

    @abstractmethod
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

    def release_hooks(self) -> None:
        """Called when no step will follow: from now on gradients stay where a backward pass puts them."""

    @abstractmethod
    def finish(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Called when training is over: leave the weights to keep in the student, and free the optimisers' state."""

    def own_values(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of one of the student's parameters that this process holds."""
        return own_part(parameter)

    # Checkpoints

    @abstractmethod
    def checkpoint_state(self, optimizers: Sequence[torch.optim.Optimizer]) -> CheckpointState:
        """What a checkpoint takes, the same under every engine, so that any goes on from it."""

    @abstractmethod
    def restore_optimizers(
        self, stored: StoredWeights, groups: list[dict[str, Any]], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Give the optimisers their state of a checkpoint, by whatever engine that was written: of each tensor in
        `stored`, which are whole, this process's part; and of each optimiser its groups and what is no tensor."""
