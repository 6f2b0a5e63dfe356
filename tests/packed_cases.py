"""Texts in rows, and sequences and single tokens on states in slots, against a recurrence run on each by itself.

Shape letters: B rows, T tokens, S sequences, H heads, N head size.
"""

import math

import torch
import torch.nn.functional as F
from tolerances import relative_error

from radlads.model import state_slots
from radlads.model.recurrence_reference import gla_reference, rwkv7_reference
from radlads.model.sequences import Slots, sequences_of

ORACLES = {"rwkv7": rwkv7_reference, "gla": gla_reference}
STRONGEST = {"rwkv7": -math.exp(-0.5), "gla": -5.0}
# A token, a chunk of 32, one more, one less, several; the longest neither first nor last
LENGTHS = (1, 32, 33, 70, 31, 5, 1, 64)
FIRST = (4, -1, 2, 9, -1, 0, 7, 1)
LAST = (4, 3, 2, 8, -1, 0, 10, 1)
NUM_SLOTS = 11


def numbers_of(lengths):
    """int32 [B, T]: which text each token is of."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]).int()


def text_by_text(oracle, lengths):
    """The oracle run on each text of each row by itself, as one function of [B, T, ...] tensors and a first state."""

    def run(*tensors):
        *tokens, state = (x.split(1) for x in tensors)
        rows = zip(zip(*tokens, strict=True), state, lengths, strict=True)
        outs, lasts = zip(*(_row_by_texts(oracle, *row) for row in rows), strict=True)
        return torch.cat(outs), torch.cat(lasts)

    return run


def _row_by_texts(oracle, tokens, state, lengths):
    outs = []
    for piece in zip(*(x.split(lengths, dim=1) for x in tokens), strict=True):
        out, last = oracle(*piece, torch.zeros_like(state) if outs else state)
        outs.append(out)
    return torch.cat(outs, dim=1), last


def tokens(kind, *shape, device="cpu", dtype=torch.float32, seed=0):
    """Inputs [..., H, N] in their ranges, in the recurrence's order."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(shape, generator=generator)  # noqa: E731
    log_w = STRONGEST[kind] * torch.rand(shape, generator=generator)
    drawn = [normal(), log_w, normal(), normal()]
    if kind == "rwkv7":
        drawn += [F.normalize(normal(), dim=-1), torch.rand(shape, generator=generator)]
    return [x.to(device, torch.float32 if place == 1 else dtype) for place, x in enumerate(drawn)]


def padded_states(num_slots, H, N, device="cpu", padding=96):
    """Random states [slots, H, N, N] with a gap between slots, and the memory that they lie in."""
    memory = torch.randn(num_slots, H * N * N + padding, generator=torch.Generator().manual_seed(1)).to(device)
    return memory[:, : H * N * N].unflatten(1, (H, N, N)), memory


def each_alone(kind, tensors, states, lengths, first, last):
    """The oracle, sequence by sequence: outputs and what the table holds after."""
    outs, after = [], states.clone()
    pieces = zip(*(x.split(lengths) for x in tensors), strict=True)
    for piece, begin, end in zip(pieces, first, last, strict=True):
        out, state = ORACLES[kind](*(x[None].float() for x in piece), states[begin : begin + 1] if begin >= 0 else None)
        outs.append(out[0])
        if end >= 0:
            after[end] = state[0]
    return torch.cat(outs), after


def integers(numbers, device="cpu"):
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def assert_sequences_in_slots(kind, backend, bound, H=2, N=64):
    tensors = tokens(kind, sum(LENGTHS), H, N)
    states, memory = padded_states(NUM_SLOTS, H, N)
    expected, after = each_alone(kind, tensors, states, LENGTHS, FIRST, LAST)
    before = memory.clone()
    slots = Slots(states, integers(FIRST), integers(LAST))
    out = state_slots.run_in_slots(kind, tensors, sequences_of(LENGTHS, "cpu"), slots, backend)
    assert relative_error(out, expected) < bound
    assert relative_error(states, after) < bound
    untouched = [slot for slot in range(NUM_SLOTS) if slot not in LAST]
    assert torch.equal(states[untouched], after[untouched])
    assert torch.equal(memory[:, H * N * N :], before[:, H * N * N :])


def assert_steps_in_slots(kind, backend, bound, H=2, N=64):
    tensors, at = tokens(kind, 4, H, N), (5, -1, 0, 2)
    tensors[3][1] = torch.nan  # a row without a state is padding, which may hold anything
    states, memory = padded_states(6, H, N)
    expected, after = each_alone(kind, tensors, states, [1] * 4, at, at)
    before = memory.clone()
    out = state_slots.step_in_slots(kind, tensors, Slots(states, integers(at), integers(at)), backend)
    rows = [0, 2, 3]
    assert relative_error(out[rows], expected[rows]) < bound and not out[1].any()
    assert relative_error(states, after) < bound
    assert torch.equal(states[[1, 3, 4]], after[[1, 3, 4]])
    assert torch.equal(memory[:, H * N * N :], before[:, H * N * N :])
