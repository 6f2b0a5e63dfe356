"""Models in shards (FSDP2): every process holds its rows of every parameter, and a block is whole while it runs.

Which parameters are gathered together, and how such a model is built without anyone holding all of it. Leaves to
model/whole_parameters.py how code reads them.
"""

import warnings
from collections import Counter
from copy import deepcopy

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from radlads.convert.blueprint import Blueprint
from radlads.model.block import Block
from radlads.model.modeling import RadladsForCausalLM


def build_sharded(
    blueprint: Blueprint, mesh: DeviceMesh, device: torch.device, *, dtype: torch.dtype, mixers_run_alone: bool
) -> tuple[RadladsForCausalLM, Counter]:
    """The blueprint's model in `dtype`, its rows spread over `mesh`, and what the blueprint's fill returned.

    No process ever holds more of it than its rows and one tensor. mixers_run_alone: whether the recurrent mixers run
    without their blocks. All processes have to call it. Raises ValueError for mixers that hold more than parameters.
    """
    config = deepcopy(blueprint.config)
    config.tie_word_embeddings = False  # head and embedding are gathered at different times
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    if buffers := [name for name, _ in model.named_buffers()]:
        raise ValueError(f"train.strategy fsdp shards parameters alone, and {buffers[0]} is a buffer: set ddp")
    model.to(dtype)  # type: ignore[arg-type]
    _shard(model, mesh, mixers_run_alone=mixers_run_alone)
    model.to_empty(device=device)
    return model, blueprint.fill(model)


# Of v_first, a view of the value projection's output, which nothing writes to
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _shard(model: RadladsForCausalLM, mesh: DeviceMesh, *, mixers_run_alone: bool) -> None:
    for layer, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        if mixers_run_alone and layer in model.config.recurrent_layers:
            fully_shard(block.self_attn, mesh=mesh)
        fully_shard(block, mesh=mesh)
    # Both are roots, whose parameters FSDP2 would leave whole after a forward pass that no backward pass follows
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model.model, mesh=mesh, reshard_after_forward=True)
    if mixers_run_alone:
        _gather_the_next_ones(model)
        # One reduction may still run while the next part of the loss is computed. Older versions wait for none anyway
        if hasattr(model.model, "set_reduce_scatter_max_input_buffers"):
            model.model.set_reduce_scatter_max_input_buffers(2)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients of sums are added up, and divided once by the count of all processes
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _gather_the_next_ones(model: RadladsForCausalLM) -> None:
    """Have each mixer that runs alone be gathered while the one before it has its backward pass."""
    layers = model.config.recurrent_layers
    for layer, following in zip(layers, [*layers[1:], *layers[-1:]], strict=True):
        # Itself, which is whole, means none: by itself FSDP2 would gather the one before. The first values' mixer has
        # its backward pass after all others
        target = layer if layer == model.config.first_value_layer else following
        mixer, other = (model.model.layers[number].self_attn for number in (layer, target))
        mixer.set_modules_to_backward_prefetch([other])


def is_sharded(model: RadladsForCausalLM) -> bool:
    """Whether build_sharded made the model."""
    return isinstance(model.model, FSDPModule)


@torch.no_grad()
def settle(model: RadladsForCausalLM) -> None:
    """Run one token through a sharded model, whose parts FSDP2 only then knows to be one; all processes have to.

    Call once it is decided which parameters train, and before anything else runs it.
    """
    if is_sharded(model):
        device = next(model.parameters()).device
        model(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
