"""DeepSpeed's ZeRO-3: every process holds and updates its part of every parameter; a block is whole while it runs.

DeepSpeed's hooks follow one forward and one backward pass through the calls of modules, which is not what stages do. So
DeepSpeed gets a list of parameters, whose calls nobody makes, and Turns decide when they are gathered. What stage 3
has in common with stages 1 and 2 is zero.py's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from radlads.model.block import Block
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.whole_parameters import Turns, turns_of
from radlads.train.engines.footprint import Footprint, ParameterBytes, Sharding
from radlads.train.engines.rows import gathered, replace_parameters
from radlads.train.engines.zero import NOTE, Zero
from radlads.train.optimizers.step import GradientNorms

_LINEAR = F.linear  # _linear takes its place for the whole process


class Zero3(Zero):
    """The engine that train.strategy deepspeed_stage_3 names."""

    stage = 3
    supports_fp8_teacher = False
    plan_note = f"{NOTE}; all is sharded, the teacher too; two GPUs: within 6 %"

    @classmethod
    def footprint(cls, num_gpus: int, precision: str) -> Footprint:
        """See Engine. As stage 2's, and all gradients have a place, always."""
        shared, size = Sharding(num_gpus, num_gpus, num_gpus), ParameterBytes(2, 4, 12)
        return Footprint(shared=shared, size=size, keeps_all_gradients=True, frozen_on_host=True)

    @contextmanager
    def placed(
        self, student: RadladsForCausalLM, teacher: RadladsForCausalLM | None, device: torch.device, precision: str
    ) -> Iterator[RadladsForCausalLM | None]:
        """See Zero. However the training ends, linear layers of this process are torch's again."""
        try:
            with super().placed(student, teacher, device, precision) as working:
                yield working
        finally:
            F.linear = _LINEAR

    def lightning_strategy(self) -> Any:
        """See Engine."""
        from radlads.train.engines.strategies import PartitionedStrategy

        return PartitionedStrategy(self)

    def place(
        self, model: RadladsForCausalLM, device: torch.device, dtype: torch.dtype, config: Mapping[str, Any]
    ) -> None:
        """See Zero. Here they are this process's part of each."""
        partition(model, dtype, config)
        model.to(device, dtype)  # type: ignore[arg-type]  # its buffers

    def attach(self, engine: Any) -> None:
        """See Zero."""
        super().attach(engine)
        self._begin_window()

    def end_teachers_turn(self) -> None:
        """A micro-batch is done: no part of the teacher stays whole beyond it."""
        if self.teacher is not None:
            _turns(self.teacher).end()

    def let_go_of_teacher(self) -> None:
        """The teacher is not run any more."""
        if self.teacher is not None:
            _turns(self.teacher).let_go()

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Engine."""
        _turns(self.student).end()
        norms = super().step(optimizers, count=count, clip_val=clip_val, sums=sums, leave_out=leave_out)
        self._begin_window()
        return norms

    def _begin_window(self) -> None:
        """Have every backward pass add to what is there, zeros: by itself DeepSpeed lets a window's first overwrite it,
        which each part of a loss is for it."""
        zero = self._deepspeed.optimizer
        zero.grad_partitions_flat_buffer.zero_()
        zero.micro_step_id = 1

    def finish(self, optimizers) -> None:
        """See Zero."""
        _turns(self.student).let_go()
        self._deepspeed.optimizer.optimizer.state.clear()  # to have room for the rows
        super().finish(optimizers)

    def own_values(self, parameter: torch.Tensor) -> torch.Tensor:
        """See Engine. DeepSpeed keeps a partitioned parameter's numbers beside it, filled up."""
        if parameter.numel() or not hasattr(parameter, "ds_tensor"):
            return super().own_values(parameter)
        own = parameter.ds_tensor
        return own[: max(0, parameter.ds_numel - dist.get_rank() * own.numel())]  # type: ignore[attr-defined]

    def gradients_are_divided_by(self) -> int:
        """See Zero. It knows no sums."""
        return dist.get_world_size()

    def groups(self) -> list[tuple[list[torch.nn.Parameter], torch.Tensor]]:
        """See Zero."""
        zero = self._deepspeed.optimizer
        return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))

    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """See Zero."""
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, _own_partition(parameter, whole).to(parameter.device))

    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        """See Zero."""
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, _own_partition(parameter, whole).to(parameter.device), key)

    def link_states(self) -> None:
        """See Zero. They are found as they are."""


def partition(model: RadladsForCausalLM, dtype: torch.dtype, config: Mapping[str, Any]) -> None:
    """Make of a model in rows one whose parameters are DeepSpeed's partitioned ones, in `dtype`, gathered in turns.

    One parameter after another is on the device whole. All processes have to call it. From now on linear layers of this
    process are DeepSpeed's (`_linear`). Raises ValueError for a parameter that is a single number.
    """
    from deepspeed import zero

    def part(name: str, rows: torch.nn.Parameter) -> torch.nn.Parameter:
        if not rows.ndim:
            raise ValueError(
                f"train.strategy deepspeed_stage_3 parts every parameter, and {name} is a single number: set "
                "deepspeed_stage_2, or give it a dimension"
            )
        whole = torch.nn.Parameter(gathered(rows).to(dtype), requires_grad=rows.requires_grad)
        zero.Init(module=torch.nn.ParameterList([whole]), config_dict_or_path=config, dtype=dtype)
        return whole

    replace_parameters(model, part)
    F.linear = _linear
    mixers = [block.self_attn for block in model.model.layers if isinstance(block, Block)]
    called = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    Turns(called, mixers, zero.GatheredParameters)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """DeepSpeed's F.linear, which keeps the parameter itself for the backward pass, not a view that would stay whole.

    torch.compile gets torch's own, since its graphs keep parameters anyway, and under torch 2.11 the gradients of
    weights in graphs of DeepSpeed's are zero.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    return _LINEAR(input, weight, bias) if torch.compiler.is_compiling() else zero3_linear_wrap(input, weight, bias)


def _turns(model: RadladsForCausalLM) -> Turns:
    turns = turns_of(model.lm_head)
    assert turns is not None
    return turns


def _own_partition(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a partitioned parameter's values [any shape], as they are laid out: flat, 0 at the end."""
    size = parameter.partition_numel()  # type: ignore[attr-defined]
    found = whole.flatten()[dist.get_rank() * size :][:size]
    return F.pad(found, (0, size - len(found)))
