"""Weights of a RAD-RWKV7 stack side by side, so that one kernel reads what one input is multiplied with.

The large tensors are not held twice: the packed tensor becomes the storage, and the model's parameters become views of
it. Copied are only the low ranks' first factors, which the model holds the other way round, and the biases.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from radlads.model.block import Block
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.swiglu import SwiGLU


@dataclass(frozen=True)
class PackedLayer:
    """One layer. inputs: [rows, C] of q, k, v, the transposed w1, a1, v1, g1 and a full-rank gate, in this order and as
    far as there are any; bias: [rows]. gate_up: [2 F, C]. ranks: of w, a, v, g, 0 where there is none."""

    block: Block
    mixer: RadRwkv7
    inputs: torch.Tensor
    bias: torch.Tensor
    gate_up: torch.Tensor
    ranks: tuple[int, int, int, int]

    @property
    def low_offset(self) -> int:
        """The first row of the low ranks."""
        return sum(projection.out_features for projection in _projections(self.mixer))

    @property
    def gate_offset(self) -> int:
        """The first row of the full-rank gate."""
        return self.low_offset + sum(self.ranks)


def pack(model: RadladsForCausalLM) -> list[PackedLayer]:
    """The model's layers packed; what an earlier call packed is found again in the parameters' storage."""
    # Parameters whose storage was made in inference mode could not be trained afterwards
    with torch.inference_mode(False), torch.no_grad():
        return [_pack_layer(block) for block in model.model.layers if isinstance(block, Block)]


def _pack_layer(block: Block) -> PackedLayer:
    mixer, mlp = block.self_attn, block.mlp
    assert isinstance(mixer, RadRwkv7) and isinstance(mlp, SwiGLU)
    firsts = _first_factors(mixer)
    ranks = tuple(0 if first is None else first.shape[1] for first in firsts)
    low = [first.T for first in firsts if first is not None]
    projections: list[torch.Tensor] = [linear.weight for linear in _projections(mixer)]
    full_gate = [mixer.gate.weight] if mixer.config.gate_rank_type == 1 else []
    inputs = _side_by_side([*projections, *low, *full_gate])
    gate_up = _side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight])
    bias = inputs.new_zeros(inputs.shape[0])
    biases: list[torch.Tensor] = [linear.bias for linear in _projections(mixer) if linear.bias is not None]
    if biases:
        bias[: sum(map(len, biases))] = torch.cat(biases)
    return PackedLayer(block, mixer, inputs, bias, gate_up, ranks)  # type: ignore[arg-type]


def _side_by_side(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The pieces [rows, C] as one tensor, of which parameters among them become views; other pieces are copied."""
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    shape = (ends[-1], pieces[0].shape[1])
    placed = list(zip((end - len(piece) for end, piece in zip(ends, pieces, strict=True)), pieces, strict=True))
    parameters = [(row, piece) for row, piece in placed if isinstance(piece, nn.Parameter)]
    whole = _packed_already(parameters, shape)
    if whole is None:
        whole = torch.cat([piece.data for piece in pieces])
        for row, parameter in parameters:
            parameter.data = whole[row : row + len(parameter)]
    for row, piece in placed:
        if not isinstance(piece, nn.Parameter):
            whole[row : row + len(piece)] = piece
    return whole


def _packed_already(parameters: list[tuple[int, nn.Parameter]], shape: tuple[int, int]) -> torch.Tensor | None:
    """The tensor of `shape` that all parameters are views of, each from its own row on; None if there is none."""
    first = parameters[0][1].data
    storage = first.untyped_storage()
    if storage.nbytes() != shape[0] * shape[1] * first.element_size():
        return None
    for row, parameter in parameters:
        if (
            parameter.untyped_storage().data_ptr() != storage.data_ptr()
            or parameter.storage_offset() != row * shape[1]
            or parameter.dtype != first.dtype
            or not parameter.is_contiguous()
        ):
            return None
    return first.new_empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]


def _projections(mixer: RadRwkv7) -> list[nn.Linear]:
    return [mixer.q_proj, mixer.k_proj, mixer.v_proj]


def _first_factors(mixer: RadRwkv7) -> list[torch.Tensor | None]:
    """w1, a1, v1, g1."""
    return [
        mixer.w1,
        mixer.a1,
        None if mixer.is_first_value_layer else mixer.v1,
        mixer.g1 if mixer.config.gate_rank_type == 2 else None,
    ]
