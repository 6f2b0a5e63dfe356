"""States in slots with torch alone, as on CPUs, against the oracles. interpreted_packed.py does the same by kernels."""

import pytest
import torch
from packed_cases import assert_sequences_in_slots, assert_steps_in_slots, integers, padded_states, tokens
from tolerances import RECURRENCE

from radlads.model import gla_triton, rwkv7_triton
from radlads.model.sequences import CHUNK_TOKENS, Slots, sequences_of
from radlads.model.state_slots import run_in_slots, step_in_slots

kinds = pytest.mark.parametrize("kind", ["rwkv7", "gla"])


@kinds
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sequences_begin_and_end_in_slots(kind, backend):
    assert_sequences_in_slots(kind, backend, RECURRENCE)


@kinds
def test_steps_are_in_slots(kind):
    assert_steps_in_slots(kind, "auto", RECURRENCE)


def test_the_table_of_chunks_covers_every_token_once():
    found = sequences_of((5, 70, 32), "cpu")
    assert found.ranges.tolist() == [[1, 5, 70, 1, 3], [2, 75, 32, 4, 1], [0, 0, 5, 0, 1]]
    assert found.chunks.tolist() == [[0, 5], [5, 32], [37, 32], [69, 6], [75, 32]]
    assert found.bounds.tolist() == [[0, 5, 75], [4, 74, 106]]


def test_all_kernels_have_the_chunk_of_the_table():
    for module in (rwkv7_triton, gla_triton):
        assert module.BFLOAT16.chunk == module.FLOAT32.chunk == CHUNK_TOKENS


def test_the_token_before_is_the_sequences_own():
    x = torch.arange(1.0, 7.0)[None, :, None]
    before, last = sequences_of((2, 1, 3), "cpu").tokens_before(x, torch.tensor([[-1.0], [-2.0], [-3.0]]))
    assert before.flatten().tolist() == [-1, 1, -2, -3, 4, 5]
    assert last.flatten().tolist() == [2, 3, 6]


@pytest.mark.parametrize("lengths", [(), (3, 0), (-1,)])
def test_empty_sequences_are_refused(lengths):
    with pytest.raises(ValueError, match="each sequence needs one token at least"):
        sequences_of(lengths, "cpu")


def test_what_does_not_fit_is_refused():
    states, _ = padded_states(2, 2, 16)
    slots, three = Slots(states, integers([0]), integers([0])), tokens("gla", 3, 2, 16)
    with pytest.raises(ValueError, match="have 4 tokens, but the tensors 3"):
        run_in_slots("gla", three, sequences_of([4], "cpu"), slots)
    for wrong in (states.double(), states.mT, states[:, :1]):
        with pytest.raises(ValueError, match=r"must be fp32 \[slots, 2, 16, 16\], each slot contiguous"):
            step_in_slots("gla", tokens("gla", 1, 2, 16), slots._replace(states=wrong))
    with pytest.raises(ValueError, match="triton backend needs a CUDA GPU"):
        step_in_slots("gla", tokens("gla", 1, 2, 16), slots, "triton")
