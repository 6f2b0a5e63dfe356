"""Mixers of radlads whose matrices are vLLM's linear layers, and whose other parameters are one process's share."""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

SUMMED = frozenset({"o_proj", "down_proj"})
"""Projections whose inputs are shared out among the processes, which add up their outputs."""


def build_share(
    kind: Any, whole: Any, share: Any, layer_idx: int, *, rank: int, dtype: torch.dtype, quantisation: Any, prefix: str
) -> Any:
    """A mixer, kind(config, layer_idx), as process `rank` of several serves it: on the present device, not filled.

    whole, share: the model's configuration and checks.own_share of it. A parameter is shared out along the axis where
    the two differ, in the order of heads; others are the same everywhere. Linear layers become vLLM's, so that
    quantised weights fit them.
    """
    with torch.device("meta"):
        model, own = kind(whole, layer_idx), kind(share, layer_idx)
    linears = {name for name, module in own.named_children() if isinstance(module, nn.Linear)}
    for name, parameter in list(own.named_parameters()):
        if name.partition(".")[0] not in linears:
            axis = _axis_shared(model.get_parameter(name).shape, parameter.shape)
            module_name, _, key = name.rpartition(".")
            real = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            real.weight_loader = partial(_load_share, axis=axis, rank=rank)  # type: ignore[attr-defined]
            setattr(own.get_submodule(module_name), key, real)
    for name in linears:
        linear = getattr(model, name)
        layer = RowParallelLinear if name in SUMMED else ColumnParallelLinear
        served = layer(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            params_dtype=dtype,
            quant_config=quantisation,
            prefix=f"{prefix}.{name}",
            return_bias=False,
        )
        setattr(own, name, served)
    return own


def _axis_shared(whole: torch.Size, share: torch.Size) -> int | None:
    axes = [axis for axis, (a, b) in enumerate(zip(whole, share, strict=True)) if a != b]
    assert len(axes) <= 1, "a parameter is shared out along one axis"
    return axes[0] if axes else None


def _load_share(parameter: nn.Parameter, loaded: torch.Tensor, *, axis: int | None, rank: int) -> None:
    """Copy a process's share of a whole tensor into its parameter."""
    if axis is not None:
        size = parameter.shape[axis]
        loaded = loaded.narrow(axis, rank * size, size)
    assert loaded.shape == parameter.shape, f"{tuple(loaded.shape)} does not fit {tuple(parameter.shape)}"
    parameter.data.copy_(loaded)
