"""Filling a model with weights: every tensor there, of its shape, finite, and none too many."""

from collections.abc import Mapping
from pathlib import Path

import torch

from radlads.checkpoint.weights import FLOATS, StoredWeights, own_part, own_rows


def load_strict(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], origin: Path | str) -> None:
    """Copy `weights` into every parameter of `model`; each must be there, have its shape and be finite.

    Raises ValueError that names the tensor for one missing, unexpected, wrongly shaped, or with NaN or infinity.
    """
    check_names(model, weights, origin)
    for name, parameter in model.named_parameters():
        copy_checked(parameter, weights[name], name, origin)


def check_fit(model: torch.nn.Module, weights: StoredWeights, origin: Path | str) -> None:
    """load_strict's ValueErrors about names and shapes, without reading a tensor."""
    check_names(model, weights, origin)
    for name, parameter in model.named_parameters():
        _check_shape(parameter, weights.info(name).shape, name, origin)


def check_floats(weights: StoredWeights, origin: Path | str) -> None:
    """Raise ValueError that names the tensor if one holds integers or 8-bit floats. None is read."""
    for name in weights:
        _check_float(weights.info(name).dtype, name, origin)


def check_names(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], origin: Path | str) -> None:
    """Raise ValueError that names the tensor if one of the model's parameters is missing, or one more is there."""
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() - weights.keys()):
        raise ValueError(f"{origin} lacks {_some(missing)}, which the model has: is it the checkpoint of this model?")
    if unexpected := sorted(weights.keys() - parameters.keys()):
        raise ValueError(
            f"{origin} holds {_some(unexpected)}, which the model lacks: is it the checkpoint of this model?"
        )


def copy_checked(parameter: torch.nn.Parameter, tensor: torch.Tensor, name: str, origin: Path | str) -> None:
    """Copy a tensor into a parameter. Raises ValueError for another shape, fewer than 16 bits, NaN or infinity."""
    _check_shape(parameter, tensor.shape, name, origin)
    _check_float(tensor.dtype, name, origin)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} in {origin} holds NaN or infinity: the checkpoint is broken, take an earlier one")
    with torch.no_grad():
        own_part(parameter).copy_(own_rows(parameter, tensor))


def _check_shape(parameter: torch.Tensor, found: tuple[int, ...], name: str, origin: Path | str) -> None:
    if found != parameter.shape:
        raise ValueError(
            f"{name} in {origin} has shape {tuple(found)}, but the model needs {tuple(parameter.shape)}: "
            "is it the checkpoint of this model?"
        )


def _check_float(dtype: torch.dtype, name: str, origin: Path | str) -> None:
    if dtype not in FLOATS:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} in {origin} holds {kind}, as quantised weights do: take the checkpoint in bf16, fp16 or fp32"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
