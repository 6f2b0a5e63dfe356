"""fsdp: every process holds its rows of every parameter of both models (FSDP2), and a block is whole while it runs.

How such models are built is sharding.py's.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from radlads.checkpoint.weights import HeldTensors, own_part
from radlads.config.schema import stage_of
from radlads.convert.blueprint import Blueprint
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines import sharding
from radlads.train.engines.engine import CheckpointState
from radlads.train.engines.footprint import Footprint, Sharding, torch_stepped
from radlads.train.engines.optimizer_state import optimizer_state
from radlads.train.engines.own_parts import own_parts, take_gradients
from radlads.train.engines.rows import save_by_all
from radlads.train.engines.torch_stepped import TorchStepped, own_dtype


class Fsdp(TorchStepped):
    """The engine that train.strategy fsdp names."""

    supports_fp8_teacher = False
    plan_note = (
        "fsdp: all is sharded, the teacher too; blocks, embedding, heads are whole in turn; two GPUs: within 8 %"
    )

    @classmethod
    def footprint(cls, num_gpus: int, precision: str) -> Footprint:
        """See Engine."""
        return torch_stepped(Sharding(num_gpus, num_gpus, num_gpus), precision)

    def check(self, student: RadladsConfig) -> None:
        """See Engine."""
        train = self.train
        refused = {
            "train.teacher_precision fp8": (train.teacher_precision == "fp8", "needs whole matrices to round"),
            "train.optimizer adam8bit": (train.optimizer == "adam8bit", "scales blocks that rows are no multiple of"),
            "train.optimizer muon": (train.optimizer == "muon", "needs whole matrices to update"),
        }
        for setting, (is_set, why) in refused.items():
            if is_set:
                raise ValueError(f"{setting} {why}, which train.strategy fsdp does not have: set train.strategy ddp")
        if student.tie_word_embeddings:
            raise ValueError("the student's head is its embedding, and train.strategy fsdp shards them apart: set ddp")

    def build(
        self, blueprint: Blueprint, device: torch.device, *, is_student: bool
    ) -> tuple[RadladsForCausalLM, Counter]:
        """See Engine. In shards. Raises ValueError as sharding.build_sharded."""
        mesh = init_device_mesh(device.type, (self.processes.size,))
        mixers_run_alone = is_student and stage_of(self.train) == "align"
        return sharding.build_sharded(
            blueprint, mesh, device, dtype=own_dtype(self.train), mixers_run_alone=mixers_run_alone
        )

    def build_idle_teacher(self, blueprint: Blueprint, device: torch.device) -> tuple[RadladsForCausalLM, Counter]:
        """See Engine. In shards as the others: it is where all are."""
        return self.build(blueprint, device, is_student=False)

    def lazy_init(self, model: RadladsForCausalLM) -> None:
        """See Engine. Runs one token through it."""
        sharding.settle(model)

    def placed(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, device: torch.device, precision: str
    ) -> AbstractContextManager[RadladsForCausalLM | None]:
        """See Engine. They are where they were built."""
        return nullcontext(teacher)

    def save(self, student: RadladsForCausalLM, folder: Path) -> None:
        """See Engine."""
        save_by_all(student, folder, self.processes)

    def lightning_strategy(self) -> Any:
        """See Engine."""
        from radlads.train.engines.strategies import ShardedStrategy

        return ShardedStrategy(self.processes.size)

    def own_parts_of(self, trained: dict[str, torch.nn.Parameter]) -> Mapping[str, torch.nn.Parameter]:
        """See TorchStepped. Its rows."""
        return own_parts(trained)

    def reduce_gradients(self) -> None:
        """See Engine. FSDP2's own hooks have."""
        take_gradients(self.student, self.own_parts)

    @property
    def add_up_rows(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """See TorchStepped."""
        return self.processes.sum_

    def checkpoint_state(self, optimizers) -> CheckpointState:
        """See Engine. Each process has its rows."""
        parameters = dict(self.student.named_parameters())
        assert all(isinstance(each, DTensor) for each in parameters.values()), "some parameters are gathered for now"
        moments, groups = optimizer_state(optimizers, self.own_parts)
        rows = {name: own_part(each) for name, each in parameters.items()}
        return CheckpointState(HeldTensors(rows), HeldTensors(moments), groups, by="rows")
