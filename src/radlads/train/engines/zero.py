"""DeepSpeed's ZeRO 1 and 2: every process computes with the whole student, and updates its part of the optimiser.

Stage 1 shares out fp32 weights and moments, stage 2 the gradients too; stage 3 is zero3.py's. Under bf16 DeepSpeed's
students are bf16 whole and its fp32 weights are the ones that count, in checkpoints as in the finished folder. Its own
checkpoints, which are pickles, are not used. The engines are the only doors to `deepspeed`, which is imported when a
trainer is set up.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from radlads.checkpoint.weights import PrefixedWeights, StoredWeights, rows_of
from radlads.config.schema import TrainConfig
from radlads.convert.blueprint import Blueprint
from radlads.distill.fp8_teacher import fp8_copy
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.engines.engine import CheckpointState, Engine
from radlads.train.engines.footprint import Footprint, ParameterBytes, Sharding
from radlads.train.engines.rows import (
    HostRows,
    build_in_rows,
    gathered,
    in_rows,
    is_in_rows,
    replace_parameters,
    save_by_all,
)
from radlads.train.engines.torch_stepped import trained_parameters
from radlads.train.engines.zero_state import FullWeights, Moments
from radlads.train.optimizers.step import GradientNorms

OPTIMIZERS = ("adamw", "dsfusedadamw")
NOTE = "deepspeed: bf16 weights and gradients, and fp32 weights and moments in its optimiser"
"""The part of `plan_note` that holds for all stages."""


class Zero(Engine):
    """What the three stages have in common; ZeroStrategy calls `spread_out`, sets DeepSpeed up, and calls `attach`."""

    stage: ClassVar[int]
    supports_bf16_true = False
    student: RadladsForCausalLM
    teacher: RadladsForCausalLM | None

    def __init__(self, train, processes):
        super().__init__(train, processes)
        self._rows: dict[str, torch.nn.Parameter] = {}
        self._frozen: dict[str, HostRows] = {}
        self._deepspeed: Any = None  # DeepSpeed's

    def check(self, student: RadladsConfig) -> None:
        """See Engine. And where DeepSpeed is not installed or there is no GPU."""
        train = self.train
        assert self.processes.device is not None
        check_device(train, self.processes.device)
        fp8 = not self.supports_fp8_teacher and train.teacher_precision == "fp8"
        refused = {
            "train.precision bf16-true": (train.precision == "bf16-true", "keeps bf16 weights alone", "fsdp"),
            "train.spike_factor": (train.spike_factor, "leaves steps out", "ddp or fsdp"),
            "train.teacher_precision fp8": (fp8, "needs whole matrices to round", "deepspeed_stage_2"),
            f"train.optimizer {train.optimizer}": (train.optimizer not in OPTIMIZERS, "is none of AdamW's kind", "ddp"),
        }
        for setting, (is_set, why, instead) in refused.items():
            if is_set:
                raise ValueError(f"{setting} {why}, which train.strategy {train.strategy} does not: set {instead}")
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"train.strategy {train.strategy} needs DeepSpeed, which is not installed: pip install "
                "'radlads[deepspeed]', or set ddp or fsdp"
            )

    def build(
        self, blueprint: Blueprint, device: torch.device, *, is_student: bool
    ) -> tuple[RadladsForCausalLM, Counter]:
        """See Engine. In rows, of which `spread_out` makes DeepSpeed's parameters."""
        return build_in_rows(blueprint, init_device_mesh(device.type, (self.processes.size,)), device)

    @contextmanager
    def placed(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, device: torch.device, precision: str
    ) -> Iterator[RadladsForCausalLM | None]:
        """See Engine. They are there, in rows, but for a teacher that is to be copied in 8 bits; it is of no further
        use in rows, nor DeepSpeed's."""
        self.student, self.teacher = student, teacher
        if teacher is not None and self.train.teacher_precision == "fp8":
            self.teacher = fp8_copy(teacher, device, engine_dtype(precision))
        try:
            yield self.teacher
        finally:
            self.teacher = None  # or the copy would take memory while the student is saved

    def save(self, student: RadladsForCausalLM, folder: Path) -> None:
        """See Engine."""
        save_by_all(student, folder, self.processes)

    def remedies_for_steps(self, recompute: list[str]) -> list[str]:
        """See Engine. It refuses bf16-true, as fsdp does fp8."""
        teacher = ["train.teacher_precision same"] if self.train.teacher_precision == "fp8" else []
        return [" and ".join(["train.strategy fsdp", "train.precision bf16-true", *recompute, *teacher])]

    def lightning_strategy(self) -> Any:
        """See Engine."""
        from radlads.train.engines.strategies import ZeroStrategy

        return ZeroStrategy(self)

    # From rows to DeepSpeed's parameters, and back

    def spread_out(self, device: torch.device, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
        """Make DeepSpeed's parameters, on the device and in `dtype`, of student and teacher in rows."""
        assert is_in_rows(self.student), "placement.build_models has not made it"
        parameters = dict(self.student.named_parameters())
        self._rows = {name: each for name, each in parameters.items() if each.requires_grad}
        self._frozen = {name: HostRows(each) for name, each in parameters.items() if not each.requires_grad}
        del parameters
        for model in (self.student, self.teacher):
            if model is not None and is_in_rows(model):  # not a teacher in 8 bits
                self.place(model, device, dtype, config)

    def place(
        self, model: RadladsForCausalLM, device: torch.device, dtype: torch.dtype, config: Mapping[str, Any]
    ) -> None:
        """Make DeepSpeed's parameters of one model in rows; they are whole."""
        replace_parameters(model, lambda _, parameter: torch.nn.Parameter(gathered(parameter).to(dtype)))
        model.to(device, dtype)  # type: ignore[arg-type]  # its buffers

    def attach(self, engine: Any) -> None:
        """Take DeepSpeed's engine, which has made its fp32 weights of rounded ones, and give it those of the rows."""
        self._deepspeed = engine
        for name, parameter in self.own_parts.items():
            self.set_weight(parameter, gathered(self._rows.pop(name)))

    def finish(self, optimizers) -> None:
        """See Engine. The student is in rows again, of the fp32 weights, and DeepSpeed's engine gone."""
        weights = FullWeights(self.student, self.own_parts, self._frozen)
        device = self.student.device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))

        def rows(name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
            whole = weights.gathered(name)
            own = rows_of(whole, mesh) if whole.ndim else whole
            return in_rows(own.to(device, copy=True), whole.shape, mesh)

        replace_parameters(self.student, rows)
        self.release_hooks()
        self._deepspeed.optimizer.optimizer.state.clear()

    # A step

    def begin(self, student: RadladsForCausalLM) -> None:
        """See Engine. All of each parameter: DeepSpeed shares them out by itself."""
        self.own_parts = trained_parameters(student)

    def reduce_gradients(self) -> None:
        """See Engine. DeepSpeed does, in its hooks and as it steps."""

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Engine. Clips to what DeepSpeed's engine was made with."""
        assert leave_out is None
        zero = self._deepspeed.optimizer
        # Dividing by the scale of the loss is the step's first act, so this is how sums become means
        zero.override_loss_scale(max(1.0, float(count)) / self.gradients_are_divided_by())
        self._deepspeed.step()
        zero.override_loss_scale(1.0)
        return GradientNorms(torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=count.device).float(), {})

    def release_hooks(self) -> None:
        """See Engine. Hooks of DeepSpeed's engine, and its memory, would stay with the parameters."""
        self._deepspeed.optimizer.destroy()

    # Checkpoints

    def checkpoint_state(self, optimizers) -> CheckpointState:
        """See Engine. All gather each tensor."""
        base = self._deepspeed.optimizer.optimizer
        self.link_states()
        states = [(names, base.state[partition]) for names, partition in self._partitions()]
        # As the steps of DeepSpeed's own Adam
        numbers = {
            name: {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
            for names, state in states
            for name in names
        }
        groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
        weights = FullWeights(self.student, self.own_parts, self._frozen)
        held = [{"groups": groups, "state": {name: own for name, own in numbers.items() if own}}]
        return CheckpointState(weights, Moments(self.own_parts, states), held, by="all")

    def restore_optimizers(
        self, stored: StoredWeights, groups: list[dict[str, Any]], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """See Engine."""
        base = self._deepspeed.optimizer.optimizer
        for group, held in zip(base.param_groups, groups[0]["groups"], strict=True):
            group.update({key: tuple(each) if isinstance(each, list) else each for key, each in held.items()})
        # DeepSpeed's own Adam alone counts in numbers, and without an engine only the steps of a group's last parameter
        counted = [own["step"] for own in groups[0]["state"].values() if "step" in own]
        for names, partition in self._partitions():
            state: dict[str, Any] = {"step": max(counted)} if counted else {}
            for key, tensor in PrefixedWeights(stored, f"optimizer_0.{names[0]}:").items():
                state[key] = torch.zeros_like(partition) if tensor.ndim else tensor.to(partition.device).clone()
            base.state[partition].update(state)
        self.link_states()
        for name, parameter in self.own_parts.items():
            for key, tensor in PrefixedWeights(stored, f"optimizer_0.{name}:").items():
                if tensor.ndim:
                    self.set_moment(parameter, key, tensor)

    def _partitions(self) -> list[tuple[list[str], torch.Tensor]]:
        """What the optimiser updates in this process, and the names of the parameters of which each is a part."""
        name_of = {id(parameter): name for name, parameter in self.own_parts.items()}
        return [([name_of[id(each)] for each in group], partition) for group, partition in self.groups()]

    # What stage 3 does otherwise

    def gradients_are_divided_by(self) -> int:
        """What DeepSpeed divides sums over the processes by."""
        return 1

    def groups(self) -> list[tuple[list[torch.nn.Parameter], torch.Tensor]]:
        """Parameters, and the tensor that is this process's part of them all and that the optimiser updates."""
        zero = self._deepspeed.optimizer
        parts = [group["params"][0] for group in zero.optimizer.param_groups]
        return list(zip(zero.bit16_groups, parts, strict=True))

    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """Give DeepSpeed a parameter's fp32 weight."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, whole.to(parameter.device))

    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        """Give DeepSpeed's optimiser what it keeps of a parameter by the name `key`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, whole.to(parameter.device), key)

    def link_states(self) -> None:
        """Let DeepSpeed's parameters find their state. It sees to that itself once the first of its groups has made
        its first step, when the others have none yet."""
        self._deepspeed.optimizer._hp_optimizer_states_linked = False
        self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


class Zero1(Zero):
    """The engine that train.strategy deepspeed_stage_1 names."""

    stage = 1
    plan_note = f"{NOTE}, which is sharded; not measured"

    @classmethod
    def footprint(cls, num_gpus: int, precision: str) -> Footprint:
        """See Engine. DeepSpeed trains bf16 weights whatever the precision, and its optimiser has fp32 ones of its
        own."""
        return Footprint(shared=Sharding(1, 1, num_gpus), size=ParameterBytes(2, 2, 12), frozen_on_host=True)


class Zero2(Zero):
    """The engine that train.strategy deepspeed_stage_2 names."""

    stage = 2
    plan_note = f"{NOTE}; optimiser and gradients are sharded; two GPUs: within 2 %"

    @classmethod
    def footprint(cls, num_gpus: int, precision: str) -> Footprint:
        """See Engine. As stage 1's, and gradients are added up in fp32."""
        return Footprint(shared=Sharding(1, num_gpus, num_gpus), size=ParameterBytes(2, 4, 12), frozen_on_host=True)


def check_device(train: TrainConfig, device: torch.device) -> None:
    """Raise ValueError unless the device is a CUDA GPU."""
    if device.type != "cuda":
        raise ValueError(f"train.strategy {train.strategy} needs CUDA GPUs: set ddp or fsdp, which run on a CPU too")


def engine_dtype(lightning_precision: str) -> torch.dtype:
    """What the student computes in: DeepSpeed casts the whole of it where others cast for each product."""
    return torch.bfloat16 if lightning_precision == "bf16-mixed" else torch.float32
