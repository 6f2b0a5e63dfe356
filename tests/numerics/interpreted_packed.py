"""Packed rows in our Triton kernels, in the interpreter, in fp32, against the oracles text by text.

Run by test_triton_kernels.py. Shape letters: B batch, T tokens, H heads, N head size, S sequences.
"""

from itertools import pairwise

import pytest
import torch
from interpreted_recurrence import KERNELS, NAMES, ORACLES, inputs, results
from interpreter import runtime_loops  # noqa: F401
from tolerances import DECAY_GRADIENT, RECURRENCE, relative_error

pytestmark = pytest.mark.usefixtures("runtime_loops")
kinds = pytest.mark.parametrize("kind", KERNELS)

# Of two rows, by chunks of 32: three texts and more in a chunk, a text of one token, ends at the end of a chunk and of
# the row, a text over three chunks, and a row of one text
TEXTS = {"short": ((5, 1, 1, 13, 12, 32, 6), (3, 67)), "long": ((1, 69), (70,)), "at chunks": ((32, 32, 6), (64, 6))}


def numbers_of(lengths):
    """int32 [B, T]: which text each token is of."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]).int()


def text_by_text(oracle, lengths):
    """The oracle run on each text of each row by itself, as one function of [B, T, ...] tensors and a first state."""

    def run(*tensors):
        *tokens, state = tensors
        rows = [row_by_row(oracle, [x[b : b + 1] for x in tokens], state[b : b + 1], lengths[b]) for b in range(2)]
        return torch.cat([out for out, _ in rows]), torch.cat([last for _, last in rows])

    return run


def row_by_row(oracle, tokens, state, lengths):
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    outs = []
    for number, (start, end) in enumerate(pairwise(ends)):
        out, last = oracle(*(x[:, start:end] for x in tokens), *([] if number else [state]))
        outs.append(out)
    return torch.cat(outs, dim=1), last


@kinds
@pytest.mark.parametrize("decay", [None, 1.0, 1e-4], ids=str)
@pytest.mark.parametrize("texts", TEXTS)
def test_texts_of_a_row_are_as_if_each_were_alone(kind, texts, decay):
    lengths = TEXTS[texts]
    packed = lambda *tensors: KERNELS[kind](*tensors, numbers_of(lengths))  # noqa: E731
    expected = results(kind, text_by_text(ORACLES[kind], lengths), inputs(kind, 70, 64, decay=decay))
    found = results(kind, packed, inputs(kind, 70, 64, decay=decay))
    for name in ("out", "last", *NAMES[kind]):
        bound = DECAY_GRADIENT if name == "log_w" else RECURRENCE
        assert relative_error(found[name], expected[name]) < bound, name
