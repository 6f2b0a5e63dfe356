"""Packed rows in our Triton kernels, in the interpreter, in fp32, against the oracles text by text.

Run by test_triton_kernels.py. Shape letters: B batch, T tokens, H heads, N head size, S sequences.
"""

import pytest
import torch
from interpreted_recurrence import KERNELS, NAMES, ORACLES, inputs, results
from interpreter import runtime_loops  # noqa: F401
from packed_cases import assert_sequences_in_slots, assert_steps_in_slots, numbers_of, text_by_text
from tolerances import BFLOAT16, DECAY_GRADIENT, RECURRENCE, relative_error

from radlads.model import recurrence

pytestmark = pytest.mark.usefixtures("runtime_loops")
kinds = pytest.mark.parametrize("kind", KERNELS)

# Of two rows, by chunks of 32: five texts in a chunk, two of one token; ends at the end of a chunk and of the row; a
# text over three chunks, and a row of one text
TEXTS = {"many": ((5, 1, 1, 13, 12, 32, 6), (1, 69)), "few": ((70,), (33, 37))}


@kinds
@pytest.mark.parametrize(("texts", "decay"), [("many", None), ("few", 1.0)])
def test_texts_of_a_row_are_as_if_each_were_alone(kind, texts, decay):
    lengths = TEXTS[texts]
    packed = lambda *tensors: KERNELS[kind](*tensors, numbers_of(lengths))  # noqa: E731
    expected = results(kind, text_by_text(ORACLES[kind], lengths), inputs(kind, 70, 64, decay=decay))
    found = results(kind, packed, inputs(kind, 70, 64, decay=decay))
    for name in ("out", "last", *NAMES[kind]):
        bound = DECAY_GRADIENT if name == "log_w" else RECURRENCE
        assert relative_error(found[name], expected[name]) < bound, name


@kinds
def test_texts_in_bf16(kind):
    """A text that ends inside a chunk: the chunk's decay is then found anew from sums in bf16."""
    lengths = ((20, 13), (33,))
    halved = lambda tensors: [x if i in (1, len(tensors) - 1) else x.bfloat16() for i, x in enumerate(tensors)]  # noqa: E731
    packed = lambda *tensors: KERNELS[kind](*halved(tensors), numbers_of(lengths))  # noqa: E731
    expected = results(kind, text_by_text(ORACLES[kind], lengths), inputs(kind, 33, 64))
    for name, found in results(kind, packed, inputs(kind, 33, 64)).items():
        assert relative_error(found, expected[name]) < BFLOAT16, name


def test_compiling_packed_rows_changes_nothing():
    numbers = numbers_of(((20, 13), (33,)))
    packed = lambda *tensors: KERNELS["gla"](*tensors, numbers)  # noqa: E731
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    expected = results("gla", packed, inputs("gla", 33, 64))
    for name, found in results("gla", compiled, inputs("gla", 33, 64)).items():
        assert torch.equal(found, expected[name]), name


@pytest.fixture
def on_cpus(monkeypatch):
    monkeypatch.setattr(recurrence, "missing", lambda backend, v: None)


@kinds
@pytest.mark.usefixtures("on_cpus")
def test_sequences_begin_and_end_in_slots(kind):
    assert_sequences_in_slots(kind, "triton", RECURRENCE)


@kinds
@pytest.mark.usefixtures("on_cpus")
def test_steps_are_in_slots(kind):
    assert_steps_in_slots(kind, "triton", RECURRENCE)
