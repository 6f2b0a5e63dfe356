"""DeepSpeed's ZeRO: every process computes with the whole student, and holds and updates its part of the optimiser.

Stage 1 shares out fp32 weights and moments, stage 2 the gradients too; stage 3 is train/partitions.py's. Under bf16 the
engine's students are bf16 whole and its fp32 weights are the ones that count, in checkpoints as in the finished folder.
DeepSpeed's own checkpoints, which are pickles, are not used. These two modules are the only doors to `deepspeed`, which
is imported when an engine is made.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.distributed.device_mesh import init_device_mesh

from radlads.checkpoint.weights import PrefixedWeights, StoredWeights, TensorInfo, rows_of
from radlads.config.schema import TrainConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import whole_shape
from radlads.train.checkpoints.snapshots import Held
from radlads.train.engines.rows import HostRows, gathered, in_rows, is_in_rows, replace_parameters
from radlads.train.engines.updates import trained_parameters
from radlads.train.optimizers.step import GradientNorms
from radlads.train.processes.group import Processes

OPTIMIZERS = ("adamw", "dsfusedadamw")


def uses_engine(train: TrainConfig, processes: Processes) -> bool:
    """Whether the stage runs on DeepSpeed; one process has nothing to share out."""
    return train.strategy.startswith("deepspeed_") and processes.size > 1


def is_partitioned(train: TrainConfig, processes: Processes) -> bool:
    """Whether ZeRO-3 has both models in parts."""
    return uses_engine(train, processes) and train.strategy == "deepspeed_stage_3"


def check_engine(train: TrainConfig, processes: Processes) -> None:
    """Raise ValueError for what DeepSpeed cannot do, and where it is not installed or there is no GPU."""
    assert processes.device is not None
    check_device(train, processes.device)
    fp8 = is_partitioned(train, processes) and train.teacher_precision == "fp8"
    refused = {
        "train.reset_state_at_eos 1": (train.reset_state_at_eos, "cuts rows into more sequences on some", "ddp"),
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


def check_device(train: TrainConfig, device: torch.device) -> None:
    """Raise ValueError unless the device is a CUDA GPU."""
    if device.type != "cuda":
        raise ValueError(f"train.strategy {train.strategy} needs CUDA GPUs: set ddp or fsdp, which run on a CPU too")


def engine_dtype(lightning_precision: str) -> torch.dtype:
    """What the student computes in: DeepSpeed casts the whole of it where others cast for each product."""
    return torch.bfloat16 if lightning_precision == "bf16-mixed" else torch.float32


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeedStrategy for a StageModule, whose loss comes in parts and is a sum.

    Each part has its backward, so the engine is told that it is its caller who knows when a window ends. Gradients are
    added up over micro-batches and processes, in fp32 where stage 2 or 3 keeps them, and divided by the count in the
    step.
    """

    def __init__(self, train: TrainConfig):
        stage = int(train.strategy[-1])
        numbers = train.ds_bucket_mb * 10**6
        super().__init__(
            logging_level=logging.ERROR,
            config={
                "train_micro_batch_size_per_gpu": train.micro_bsz,
                "managed_gradient_accumulation": False,
                "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # stage 3 knows no other
                "communication_data_type": "fp32",
                "gradient_clipping": train.gradient_clip_val,
                "data_types": {"grad_accum_dtype": "fp32" if stage >= 2 else None},
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": numbers,
                    "allgather_bucket_size": numbers,
                    "overlap_comm": False,
                    "stage3_param_persistence_threshold": 0,
                },
            },
        )

    def init_deepspeed(self) -> None:
        """Make the engine of a student in rows, which is whole from then on, as its teacher is."""
        module = self.lightning_module
        assert module is not None
        student: RadladsForCausalLM = module.student  # type: ignore[assignment]
        assert is_in_rows(student), "placement.build_models has not made it"
        parameters = dict(student.named_parameters())
        rows = {name: each for name, each in parameters.items() if each.requires_grad}
        frozen = {name: HostRows(each) for name, each in parameters.items() if not each.requires_grad}
        del parameters
        for model in (student, module.teacher):
            if model is not None and is_in_rows(model):  # type: ignore[arg-type]  # not a teacher in 8 bits
                self.place(model, engine_dtype(self.precision_plugin.precision))  # type: ignore[arg-type]
        super().init_deepspeed()
        updates: DeepSpeedUpdates = module.updates  # type: ignore[assignment]
        updates.begin(self.deepspeed_engine, rows, frozen)

    def place(self, model: RadladsForCausalLM, dtype: torch.dtype) -> None:
        """Make the engine's parameters of a model's rows, on the device and in `dtype`."""
        replace_parameters(model, lambda _, parameter: torch.nn.Parameter(gathered(parameter).to(dtype)))
        model.to(self.root_device, dtype)  # type: ignore[arg-type]  # its buffers

    def training_step(self, *args: Any, **kwargs: Any) -> None:
        """The module's own: engine.forward would follow one output through one backward pass."""
        module = self.lightning_module
        assert isinstance(module, LightningModule)
        with self.precision_plugin.train_step_context():
            module.training_step(*args, **kwargs)


class DeepSpeedUpdates:
    """The updates (see Updates) of a student that DeepSpeed holds."""

    def __init__(self, student: RadladsForCausalLM):
        self._student = student
        self.own_parts: Mapping[str, torch.nn.Parameter] = trained_parameters(student)
        self._frozen: dict[str, HostRows] = {}
        self._engine: Any = None

    def begin(self, engine: Any, rows: dict[str, torch.nn.Parameter], frozen: dict[str, HostRows]) -> None:
        """Take the engine, which has made its fp32 weights of rounded ones, and give it those of `rows`, the student's
        before; and keep those that do not train."""
        self._engine, self._frozen = engine, frozen
        for name, parameter in self.own_parts.items():
            self.set_weight(parameter, gathered(rows.pop(name)))

    def begin_last(self) -> None:
        """See Updates."""

    def add_up(self) -> None:
        """See Updates. The engine does, in its hooks and as it steps."""

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Updates. Clips to what the engine was made with."""
        assert leave_out is None
        zero = self._engine.optimizer
        # Dividing by the scale of the loss is the step's first act, so this is how sums become means
        zero.override_loss_scale(max(1.0, float(count)) / self.gradients_are_divided_by())
        self._engine.step()
        zero.override_loss_scale(1.0)
        return GradientNorms(torch.as_tensor(self._engine.get_global_grad_norm(), device=count.device).float(), {})

    def let_go(self) -> None:
        """See Updates. Hooks of the engine, and its memory, would stay with the parameters."""
        self._engine.optimizer.destroy()

    def finish(self, optimizers) -> None:
        """See Updates. The student is in rows again, of the fp32 weights, and the engine gone."""
        weights = FullWeights(self._student, self.own_parts, self._frozen)
        device = self._student.device
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))

        def rows(name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
            whole = weights.gathered(name)
            own = rows_of(whole, mesh) if whole.ndim else whole
            return in_rows(own.to(device, copy=True), whole.shape, mesh)

        replace_parameters(self._student, rows)
        self.let_go()
        self._engine.optimizer.optimizer.state.clear()

    def held(self) -> Held:
        """What a checkpoint takes, the same as of a student that was updated without DeepSpeed."""
        base = self._engine.optimizer.optimizer
        self.link_states()
        states = [(names, base.state[partition]) for names, partition in self._partitions()]
        # As the steps of DeepSpeed's own Adam
        numbers = {
            name: {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
            for names, state in states
            for name in names
        }
        groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
        weights = FullWeights(self._student, self.own_parts, self._frozen)
        held = [{"groups": groups, "state": {name: own for name, own in numbers.items() if own}}]
        return Held(weights, Moments(self.own_parts, states), held, gathered=True)

    def restore_moments(self, stored: StoredWeights, optimizers: Sequence[Mapping[str, Any]]) -> None:
        """Give the optimiser its state of a checkpoint, by whatever processes that was written."""
        base = self._engine.optimizer.optimizer
        for group, held in zip(base.param_groups, optimizers[0]["groups"], strict=True):
            group.update({key: tuple(each) if isinstance(each, list) else each for key, each in held.items()})
        # DeepSpeed's own Adam alone counts in numbers, and without an engine only the steps of a group's last parameter
        counted = [own["step"] for own in optimizers[0]["state"].values() if "step" in own]
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
        """What the engine divides sums over the processes by."""
        return 1

    def groups(self) -> list[tuple[list[torch.nn.Parameter], torch.Tensor]]:
        """Parameters, and the tensor that is this process's part of them all and that the optimiser updates."""
        zero = self._engine.optimizer
        parts = [group["params"][0] for group in zero.optimizer.param_groups]
        return list(zip(zero.bit16_groups, parts, strict=True))

    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """Give the engine a parameter's fp32 weight."""
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, whole.to(parameter.device))

    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        """Give the engine's optimiser what it keeps of a parameter by the name `key`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, whole.to(parameter.device), key)

    def link_states(self) -> None:
        """Let the engine's parameters find their state. It sees to that itself once the first of its groups has made
        its first step, when the others have none yet."""
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()


class FullWeights(StoredWeights):
    """A student's fp32 weights by name, on the CPU; all processes have to ask for each, in the same order."""

    def __init__(
        self, student: RadladsForCausalLM, own: Mapping[str, torch.nn.Parameter], frozen: Mapping[str, HostRows]
    ):
        self._names = [name for name, _ in student.named_parameters()]
        self._own, self._frozen = own, frozen

    def gathered(self, name: str) -> torch.Tensor:
        """The weight where the engine has it, or on the device."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._frozen[name].gathered() if name in self._frozen else safe_get_full_fp32_param(self._own[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.gathered(name).cpu()

    def info(self, name: str) -> TensorInfo:
        shape = self._frozen[name].shape if name in self._frozen else whole_shape(self._own[name])
        return TensorInfo(tuple(shape), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Moments(StoredWeights):
    """The state of DeepSpeed's optimiser by the names that each parameter's would have, as FullWeights are read.

    states: names of parameters, and the state that is one of a part of them all.
    """

    def __init__(self, own: Mapping[str, torch.nn.Parameter], states: list[tuple[list[str], Mapping[str, Any]]]):
        self._own = own
        self._keys: dict[str, tuple[str, str, torch.Tensor]] = {}
        for names, state in states:
            tensors = {key: each for key, each in state.items() if isinstance(each, torch.Tensor)}
            for key, tensor in tensors.items():
                kept = torch.empty(0) if tensor.ndim else tensor
                self._keys |= {f"optimizer_0.{name}:{key}": (name, key, kept) for name in names}

    def __getitem__(self, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter, key, scalar = self._keys[name]
        found = safe_get_full_optimizer_state(self._own[parameter], key) if scalar.ndim else scalar
        return found.detach().cpu()

    def info(self, name: str) -> TensorInfo:
        parameter, _, scalar = self._keys[name]
        return TensorInfo(tuple(whole_shape(self._own[parameter] if scalar.ndim else scalar)), torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
