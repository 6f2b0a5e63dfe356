"""Models of which every process holds its rows, in fp32: what a stage on DeepSpeed begins and ends with.

They cannot run. zero.py makes DeepSpeed's parameters of them, one after another, and rows again at the end, so that no
process has a whole model in its host's memory, but for one with a user's own mixer as it is built.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from radlads.checkpoint.model_folder import save_model, take_part_in_saving, unplaced_model
from radlads.checkpoint.safetensors_writer import SHARD_BYTES
from radlads.checkpoint.weights import own_part, rows_of
from radlads.convert.blueprint import Blueprint
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.processes.group import Processes


def build_in_rows(blueprint: Blueprint, mesh: DeviceMesh, device: torch.device) -> tuple[RadladsForCausalLM, Counter]:
    """The blueprint's model with its rows on `device`, spread over `mesh`, and what the blueprint's fill returned."""
    model = unplaced_model(blueprint.config, torch.float32)
    model.tie_weights()

    def unfilled(_: str, parameter: nn.Parameter) -> nn.Parameter:
        own = rows_of(parameter, mesh) if parameter.ndim else parameter
        return in_rows(torch.empty_like(own, device=device), parameter.shape, mesh)

    replace_parameters(model, unfilled)
    return model, blueprint.fill(model)


def in_rows(own: torch.Tensor, shape: torch.Size, mesh: DeviceMesh) -> nn.Parameter:
    """The parameter [shape] of which these are the process's rows; a single number is whole in every process."""
    if not shape:
        return nn.Parameter(own)
    stride = torch.empty(shape, device="meta").stride()
    return nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride))


def is_in_rows(model: nn.Module) -> bool:
    """Whether parameters of the model are in rows, or in FSDP2's shards, which are rows too."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@torch.no_grad()
def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """All rows of a parameter; all processes have to call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def save_by_all(student: RadladsForCausalLM, folder: Path, processes: Processes) -> None:
    """Write the folder of a model in rows, or in FSDP2's shards, in the first process; all gather for it."""
    if processes.is_first:
        save_model(student, folder, shard_bytes=SHARD_BYTES)
    else:
        take_part_in_saving(student)


class HostRows:
    """A parameter's rows, aside in the memory of their process's host."""

    def __init__(self, parameter: torch.Tensor):
        self.shape, self._device = parameter.shape, parameter.device
        self._mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        self._own = own_part(parameter).cpu()

    def gathered(self) -> torch.Tensor:
        """All rows, on the device they came from; all processes have to call it."""
        own = self._own.to(self._device)
        return own if self._mesh is None else gathered(in_rows(own, self.shape, self._mesh))


def replace_parameters(model: nn.Module, make: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put make(name, parameter) in the place of each parameter, one after another. It trains or not as that did, and is
    shared by the same modules."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    for name in [name for name, _ in model.named_parameters()]:
        parameter = model.get_parameter(name)
        made = make(name, parameter).requires_grad_(parameter.requires_grad)
        for module, attribute in owners[id(parameter)]:
            setattr(module, attribute, made)
