"""What of the trained parameters this process updates: all of each, or its rows of a sharded one.

Optimisers see plain tensors, so that all of them know what to do with shards.
"""

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from radlads.checkpoint.weights import own_part


def own_parts(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """By name, the parameters themselves, or parameters of the same memory as this process's rows of sharded ones."""
    assert len({isinstance(each, DTensor) for each in parameters.values()}) <= 1, "some are gathered for now"
    return {
        name: torch.nn.Parameter(own_part(each)) if isinstance(each, DTensor) else each
        for name, each in parameters.items()
    }


def take_gradients(model: torch.nn.Module, own: Mapping[str, torch.nn.Parameter]) -> None:
    """Hand the gradients of sharded parameters on to this process's own parts."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.grad is not None:
            own[name].grad, parameter.grad = own_part(parameter.grad), None
