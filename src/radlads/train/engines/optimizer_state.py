"""The state of torch's optimisers by the names of their parameters, as checkpoints hold it, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from radlads.checkpoint.weights import PrefixedWeights, StoredWeights, own_rows
from radlads.model.modeling import RadladsForCausalLM


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], own: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """All tensors by name, and of each optimiser the rest: its groups' settings, and state that is no tensor.

    own: the parameters by name, as the optimisers know them.
    """
    tensors: dict[str, torch.Tensor] = {}
    rest = []
    for number, optimizer in enumerate(optimizers):
        content, names = optimizer.state_dict(), _names(optimizer, own)
        numbers: dict[str, dict[str, Any]] = {}
        for index, values in content["state"].items():
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer_{number}.{names[index]}:{key}"] = value
                else:
                    numbers.setdefault(names[index], {})[key] = value
        groups = [{k: v for k, v in group.items() if k != "params"} for group in content["param_groups"]]
        rest.append({"groups": groups, "state": numbers})
    return tensors, rest


def restore_state(
    stored: StoredWeights,
    groups: list[dict[str, Any]],
    student: RadladsForCausalLM,
    own: Mapping[str, torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Give the optimisers, built as the run's were, their state of a checkpoint: what belongs to this process."""
    whole = dict(student.named_parameters())
    for number, (optimizer, held) in enumerate(zip(optimizers, groups, strict=True)):
        names = _names(optimizer, own)
        state: dict[int, dict[str, Any]] = {
            index: dict(held["state"].get(name, {})) for index, name in enumerate(names) if name in held["state"]
        }
        for index, name in enumerate(names):
            for key, tensor in PrefixedWeights(stored, f"optimizer_{number}.{name}:").items():
                rows = own_rows(whole[name], tensor) if tensor.shape == whole[name].shape else tensor
                state.setdefault(index, {})[key] = rows.clone()
        present = optimizer.state_dict()["param_groups"]
        held_groups = [
            {**now, **{key: tuple(value) if isinstance(value, list) else value for key, value in then.items()}}
            for now, then in zip(present, held["groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": held_groups})


def _names(optimizer: torch.optim.Optimizer, own: Mapping[str, torch.nn.Parameter]) -> list[str]:
    """The names of an optimiser's parameters, in its order."""
    name_of = {id(parameter): name for name, parameter in own.items()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
