"""The recurrences for a server: states lie in the slots of a table, and are read and written there.

Owns the choice of Triton's kernels or torch, and the latter. Leaves what a slot is to sequences.py, the kernels to
rwkv7_triton.py, gla_triton.py and step_triton.py. No gradients.

Shape letters: T tokens, S sequences, B rows of one token each, H heads, N head size.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from .gla_triton import GlaChunks
from .recurrence import Backend, gla, runs_on_triton, rwkv7, triton_dtype
from .rwkv7_triton import Rwkv7Chunks
from .sequences import Sequences, Slots
from .step_triton import step

Kind = Literal["rwkv7", "gla"]
_VALUES = 3  # the place of v among a recurrence's inputs
_CHUNKS: dict[Kind, Any] = {"rwkv7": Rwkv7Chunks, "gla": GlaChunks}
_RECURRENCES: dict[Kind, Any] = {"rwkv7": rwkv7, "gla": gla}


@torch.no_grad()
def run_in_slots(
    kind: Kind, tensors: Sequence[torch.Tensor], sequences: Sequences, slots: Slots, backend: Backend = "auto"
) -> torch.Tensor:
    """A recurrence over sequences of any lengths: outputs [T, H, N] in v's dtype.

    tensors: [T, H, N], in the order and the ranges of recurrence.rwkv7 and gla. Each sequence begins with the state in
    its first slot and leaves its last one in its last slot. Raises ValueError if the backend cannot run here, or if
    states are not fp32 with contiguous slots, or if the sequences have not T tokens.
    """
    check_states(slots.states, tensors[_VALUES])
    num_tokens, found = sum(sequences.lengths), tensors[_VALUES].shape[0]
    if num_tokens != found:
        raise ValueError(f"the sequences have {num_tokens} tokens, but the tensors {found}: give as many")
    if runs_on_triton(backend, tensors[_VALUES]):
        out = _CHUNKS[kind].forward_in_slots(_as_kernels_take(tensors), sequences, slots)
        return out.to(tensors[_VALUES].dtype)
    return _run_in_torch(kind, tensors, sequences, slots, backend)


@torch.no_grad()
def step_in_slots(kind: Kind, tensors: Sequence[torch.Tensor], slots: Slots, backend: Backend = "auto") -> torch.Tensor:
    """One token of each of B rows: outputs [B, H, N] in v's dtype; states are changed in place, in slots.last.

    tensors: [B, H, N], as for run_in_slots; first and last slots must be equal. A row of a negative slot has no state,
    and outputs of 0: so a CUDA graph may be recorded for more rows than there are. Errors as run_in_slots.
    """
    check_states(slots.states, tensors[_VALUES])
    if runs_on_triton(backend, tensors[_VALUES]):
        return step(kind, _as_kernels_take(tensors), slots.states, slots.last).to(tensors[_VALUES].dtype)
    run, real = _RECURRENCES[kind], slots.last >= 0
    rows = slots.last.clamp(min=0).long()
    out, after = run(*(x[:, None] for x in tensors), slots.states[rows], backend="reference")
    slots.states[rows[real]] = after[real]
    return torch.where(real[:, None, None], out[:, 0], 0)


def check_states(states: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError for a table of states that does not fit values [..., H, N]."""
    H, N = v.shape[-2:]
    if states.dtype != torch.float32 or states.shape[1:] != (H, N, N) or states.stride()[1:] != (N * N, N, 1):
        raise ValueError(
            f"states in slots must be fp32 [slots, {H}, {N}, {N}], each slot contiguous, not {states.dtype} "
            f"{list(states.shape)} with strides {list(states.stride())}"
        )


def _as_kernels_take(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In one dtype, but log w, the second, in fp32."""
    dtype = triton_dtype(tensors[_VALUES])
    return [x.to(torch.float32 if place == 1 else dtype) for place, x in enumerate(tensors)]


def _run_in_torch(
    kind: Kind, tensors: Sequence[torch.Tensor], sequences: Sequences, slots: Slots, backend: Backend
) -> torch.Tensor:
    """run_in_slots by sequences of similar length, padded with zeros, which leave a state as it is."""
    out, states = torch.zeros_like(tensors[_VALUES]), slots.states
    for numbers, places in sequences.similar():
        numbers, places = numbers.to(out.device), places.to(out.device)
        first, last, is_token = slots.first[numbers].long(), slots.last[numbers].long(), places >= 0
        begin = torch.where((first >= 0)[:, None, None, None], states[first.clamp(min=0)], 0.0)
        rows = [torch.where(is_token[:, :, None, None], x[places.clamp(min=0)], 0) for x in tensors]
        outs, ends = _RECURRENCES[kind](*rows, begin, backend=backend)
        out[places[is_token]] = outs[is_token]
        states[last[last >= 0]] = ends[last >= 0]
    return out
