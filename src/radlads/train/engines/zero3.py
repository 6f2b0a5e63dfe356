"""DeepSpeed's ZeRO-3: every process holds and updates its part of every parameter; a block is whole while it runs.

DeepSpeed's hooks follow one forward and one backward pass through the calls of modules, which is not what stages do. So
the engine gets a list of parameters, whose calls nobody makes, and Turns decide when they are gathered. What stage 3
has in common with stages 1 and 2 is train/deepspeed_engine.py's.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from radlads.model.modeling import Block, RadladsForCausalLM
from radlads.model.whole_parameters import Turns, turns_of
from radlads.train.engines.rows import HostRows, gathered, replace_parameters
from radlads.train.engines.zero import DeepSpeedUpdates, ZeroStrategy
from radlads.train.optimizers.step import GradientNorms

_LINEAR = F.linear  # _linear takes its place for the whole process


class PartitionedStrategy(ZeroStrategy):
    """ZeroStrategy for stage 3."""

    def place(self, model: RadladsForCausalLM, dtype: torch.dtype) -> None:
        """See ZeroStrategy. Here they are this process's part of each."""
        assert isinstance(self.config, dict)
        partition(model, dtype, self.config)
        model.to(self.root_device, dtype)  # type: ignore[arg-type]  # its buffers

    def training_step(self, *args: Any, **kwargs: Any) -> None:
        """See ZeroStrategy. No part of the teacher stays whole beyond it."""
        super().training_step(*args, **kwargs)
        if (teacher := self._teacher()) is not None:
            _turns(teacher).end()

    def on_train_end(self) -> None:
        """The teacher is not run any more."""
        super().on_train_end()
        if (teacher := self._teacher()) is not None:
            _turns(teacher).let_go()

    def _teacher(self) -> RadladsForCausalLM | None:
        assert self.lightning_module is not None
        return self.lightning_module.teacher  # type: ignore[return-value]

    def teardown(self) -> None:
        """See Lightning's, which calls it however the training ends."""
        F.linear = _LINEAR
        super().teardown()

    def _setup_model_and_optimizer(self, model: torch.nn.Module, *rest: Any) -> Any:
        return super()._setup_model_and_optimizer(_parameters_alone(model), *rest)


class PartitionedUpdates(DeepSpeedUpdates):
    """DeepSpeedUpdates for stage 3."""

    def begin(self, engine: Any, rows: dict[str, torch.nn.Parameter], frozen: dict[str, HostRows]) -> None:
        """See DeepSpeedUpdates."""
        super().begin(engine, rows, frozen)
        self._begin_window()

    def step(self, optimizers, *, count, clip_val, sums, leave_out) -> GradientNorms:
        """See Updates."""
        _turns(self._student).end()
        norms = super().step(optimizers, count=count, clip_val=clip_val, sums=sums, leave_out=leave_out)
        self._begin_window()
        return norms

    def _begin_window(self) -> None:
        """Have every backward pass add to what is there, zeros: by itself the engine lets a window's first overwrite
        it, which each part of a loss is for the engine."""
        zero = self._engine.optimizer
        zero.grad_partitions_flat_buffer.zero_()
        zero.micro_step_id = 1

    def finish(self, optimizers) -> None:
        """See DeepSpeedUpdates."""
        _turns(self._student).let_go()
        self._engine.optimizer.optimizer.state.clear()  # to have room for the rows
        super().finish(optimizers)

    def gradients_are_divided_by(self) -> int:
        """See DeepSpeedUpdates. It knows no sums."""
        return dist.get_world_size()

    def groups(self) -> list[tuple[list[torch.nn.Parameter], torch.Tensor]]:
        """See DeepSpeedUpdates."""
        zero = self._engine.optimizer
        return list(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True))

    def set_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """See DeepSpeedUpdates."""
        from deepspeed.utils import safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, _own_partition(parameter, whole).to(parameter.device))

    def set_moment(self, parameter: torch.nn.Parameter, key: str, whole: torch.Tensor) -> None:
        """See DeepSpeedUpdates."""
        from deepspeed.utils import safe_set_local_optimizer_state

        safe_set_local_optimizer_state(parameter, _own_partition(parameter, whole).to(parameter.device), key)

    def link_states(self) -> None:
        """See DeepSpeedUpdates. They are found as they are."""


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


def _parameters_alone(model: torch.nn.Module) -> torch.nn.Module:
    """A module of the model's parameters that nothing calls, for DeepSpeed to hook."""
    return torch.nn.ParameterList(model.parameters())


def _turns(model: RadladsForCausalLM) -> Turns:
    turns = turns_of(model.lm_head)
    assert turns is not None
    return turns


def _own_partition(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a partitioned parameter's values [any shape], as they are laid out: flat, 0 at the end."""
    size = parameter.partition_numel()  # type: ignore[attr-defined]
    found = whole.flatten()[dist.get_rank() * size :][:size]
    return F.pad(found, (0, size - len(found)))
