"""What engines have in common whose models are whole in every process, in ordinary parameters."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from radlads.checkpoint.model_folder import save_model
from radlads.checkpoint.weights import HeldTensors, ModelWeights
from radlads.convert.blueprint import Blueprint
from radlads.distill.fp8_teacher import fp8_copy
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.engine import CheckpointState
from radlads.train.engines.footprint import Footprint, Sharding, torch_stepped
from radlads.train.engines.optimizer_state import optimizer_state
from radlads.train.engines.torch_stepped import TorchStepped, own_dtype


class Replicated(TorchStepped):
    """Both models are whole; how gradients are added up is left to the engine."""

    @classmethod
    def footprint(cls, num_gpus: int, precision: str) -> Footprint:
        """See Engine."""
        return torch_stepped(Sharding(1, 1, 1), precision)

    def build(
        self, blueprint: Blueprint, device: torch.device, *, is_student: bool
    ) -> tuple[RadladsForCausalLM, Counter]:
        """See Engine. On the device, whole."""
        return blueprint.build(dtype=own_dtype(self.train), device=device)

    @contextmanager
    def placed(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, device: torch.device, precision: str
    ) -> Iterator[RadladsForCausalLM | None]:
        """See Engine."""
        home, teachers_home = student.device, None if teacher is None else teacher.device
        try:
            student.to(device, self._dtype_of(student, precision))  # type: ignore[arg-type]
            yield None if teacher is None else self._working(teacher, device, precision)
        finally:
            if teacher is not None:
                teacher.to(teachers_home)  # type: ignore[arg-type]
            student.to(home)  # type: ignore[arg-type]

    def _working(self, teacher: RadladsForCausalLM, device: torch.device, precision: str) -> RadladsForCausalLM:
        """The teacher on the device, or its copy in 8 bits if train.teacher_precision asks for one."""
        dtype = self._dtype_of(teacher, precision)
        if self.train.teacher_precision == "fp8":
            return fp8_copy(teacher, device, dtype)
        return teacher.to(device, dtype)  # type: ignore[arg-type]

    def _dtype_of(self, model: RadladsForCausalLM, precision: str) -> torch.dtype:
        """bf16 under bf16-true, else fp32; in mixed precision a teacher stays what it is."""
        if self.train.precision == "bf16-true":
            return torch.bfloat16
        trains = any(parameter.requires_grad for parameter in model.parameters())
        return torch.float32 if trains or precision == "32-true" else model.dtype

    def own_parts_of(self, trained: dict[str, torch.nn.Parameter]) -> Mapping[str, torch.nn.Parameter]:
        """See TorchStepped. All of each."""
        return trained

    def checkpoint_state(self, optimizers) -> CheckpointState:
        """See Engine."""
        moments, groups = optimizer_state(optimizers, self.own_parts)
        return CheckpointState(ModelWeights(self.student), HeldTensors(moments), groups)

    def save(self, student: RadladsForCausalLM, folder: Path) -> None:
        """See Engine."""
        if self.processes.is_first:
            save_model(student, folder)
