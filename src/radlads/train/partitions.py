"""DeepSpeed's ZeRO-3: every process holds and updates its part of every parameter; one block is whole while it runs.

Its own hooks, which follow one forward and one backward pass through the modules' calls, are left out: the engine knows
the parameters alone, and when they are gathered is decided by Turns. What the engine does as stage 2 does, and
everything else about it, is in train/deepspeed_engine.py.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from radlads.model.modeling import Block, RadladsForCausalLM
from radlads.model.whole_parameters import Turns

_LINEAR = F.linear  # zero.Init replaces it, and leaves it so

def partition(model: RadladsForCausalLM, config: Mapping[str, Any]) -> Turns:
    """Leave the process its part of each of the model's parameters, on its device, and gather them in turns.

    One parameter after another comes to the device whole. All processes have to call it. Until let_go(), every linear
    layer of the process keeps for its backward pass the parameter itself, and not a view that would stay whole.
    """
    from deepspeed import zero

    (dtype,) = {parameter.dtype for parameter in model.parameters()}
    zero.Init(module=parameters_alone(model), config_dict_or_path=config, dtype=dtype)
    mixers = [block.self_attn for block in model.model.layers if isinstance(block, Block)]
    called = [model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head]
    return Turns(called, mixers, zero.GatheredParameters)


def partitioned_copy(
    model: RadladsForCausalLM, dtype: torch.dtype, config: Mapping[str, Any]
) -> RadladsForCausalLM:
    """A frozen copy of a model that is on the CPU, in `dtype` and partitioned; the model stays as it is."""
    shared = {id(each): torch.nn.Parameter(each.data.to(dtype), requires_grad=False) for each in model.parameters()}
    copy = deepcopy(model, shared)  # type: ignore[arg-type]
    partition(copy, config)
    return copy


def parameters_alone(model: torch.nn.Module) -> torch.nn.Module:
    """A module of the model's parameters that nothing calls, for DeepSpeed to hook."""
    return torch.nn.ParameterList(model.parameters())


def let_go(turns: Turns) -> None:
    """Gather no more, and have linear layers as torch has them."""
    turns.let_go()
    F.linear = _LINEAR


def own_partition(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a partitioned parameter's values [any shape], as they are laid out: flat, 0 at the end."""
    size = parameter.partition_numel()  # type: ignore[attr-defined]
    found = whole.flatten()[dist.get_rank() * size :][:size]
    return F.pad(found, (0, size - len(found)))
