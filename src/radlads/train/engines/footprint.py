"""What an engine makes of a step's memory, as planning counts it. No torch."""

from dataclasses import dataclass
from typing import NamedTuple


class Sharding(NamedTuple):
    """How many GPUs share each part; the teacher is shared as the weights are."""

    weights: int
    gradients: int
    optimizer: int


class ParameterBytes(NamedTuple):
    """Bytes per parameter of the student, AdamW's; `optimizer` counts its moments and weights of its own."""

    weight: int
    gradient: int
    optimizer: int


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The memory of a step under an engine.

    wide: whether weights and residual stream are fp32. keeps_all_gradients: whether all gradients have a place, always.
    frozen_on_host: whether rows of the weights that do not train are in each process's host memory, in fp32.
    """

    shared: Sharding
    size: ParameterBytes
    wide: bool = False
    keeps_all_gradients: bool = False
    frozen_on_host: bool = False


def torch_stepped(shared: Sharding, precision: str) -> Footprint:
    """Of an engine whose parameters torch updates: in fp32 under bf16, which is mixed precision, else in bf16."""
    wide = precision == "bf16"
    size = ParameterBytes(4, 4, 8) if wide else ParameterBytes(2, 2, 4)
    return Footprint(shared=shared, size=size, wide=wide)
