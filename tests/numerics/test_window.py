"""A mixer's softmax window against the plain masked softmax: lengths, splits, padding, packed rows, gradients.

Shape letters: B batch, T tokens, H query heads, K key/value heads, N head size.
"""

from itertools import pairwise

import pytest
import torch
from tolerances import BFLOAT16, SPLIT, relative_error

from radlads.model.packed_rows import texts_that_start_at
from radlads.model.recurrence_reference import window_reference
from radlads.model.window import WindowSettings
from radlads.model.window_attention import window_attention

H, N = 4, 8
# Window and sinks: none, one token, sinks beyond the window, blocks longer than LEAST_BLOCK, longer than every text
WINDOWS = [(1, 0), (1, 3), (5, 0), (5, 2), (3, 7), (70, 4), (300, 4)]
windows = pytest.mark.parametrize("window", WINDOWS, ids=str)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(num_tokens, *, rows=2, key_heads=2, dtype=torch.float32):
    shapes = [(rows, num_tokens, heads, N) for heads in (H, key_heads, key_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attend(tensors, window, held=None, token_mask=None, texts=None):
    return window_attention(*tensors, held, WindowSettings(*window), token_mask=token_mask, texts=texts)


def in_pieces(tensors, window, boundaries):
    outs, held = [], None
    for start, stop in pairwise((0, *boundaries, tensors[0].shape[1])):
        out, held = attend([x[:, start:stop] for x in tensors], window, held)
        outs.append(out)
    return torch.cat(outs, dim=1), held


def assert_equal_gradients(actual, expected, tensors):
    weight = torch.randn_like(expected)
    found = torch.autograd.grad((actual * weight).sum(), tensors)
    for ours, oracles in zip(found, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        assert relative_error(ours, oracles, floor=0.1) < SPLIT


@windows
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 63, 64, 65, 149])
def test_outputs_and_gradients_are_the_oracles(window, key_heads, num_tokens):
    tensors = inputs(num_tokens, key_heads=key_heads)
    out, _ = attend(tensors, window)
    expected = window_reference(*tensors, *window)
    assert relative_error(out, expected) < SPLIT
    assert_equal_gradients(out, expected, tensors)


@windows
@pytest.mark.parametrize(
    "boundaries",
    [(1,), (2, 3, 4), (148,), (6,), (7, 80), (75, 140), (100,), tuple(range(1, 149)), tuple(range(10, 149, 10))],
    ids=lambda each: f"{len(each)} from {each[0]}",
)
def test_splitting_changes_nothing(window, boundaries):
    tensors = inputs(149)
    whole, last = attend(tensors, window)
    pieces, held = in_pieces(tensors, window, boundaries)
    assert relative_error(pieces, whole) < SPLIT
    for ours, theirs in zip(held, last, strict=True):
        assert torch.equal(ours, theirs)
    assert_equal_gradients(pieces, whole, tensors)


@windows
def test_what_is_held_has_one_size(window):
    tensors, held = inputs(90), None
    for start, stop in pairwise((0, 1, 2, 20, 21, 90)):
        _, held = attend([x[:, start:stop] for x in tensors], window, held)
        assert held.keys.shape == held.values.shape == (2, 2, sum(window), N)
        assert held.seen.tolist() == [stop, stop]


@windows
@pytest.mark.parametrize("split", [None, 1, 7, 60])
def test_padding_changes_nothing(window, split):
    """Rows padded on the left, on the right, in the middle, and everywhere before the split."""
    real = torch.ones(4, 97, dtype=torch.bool)
    real[0, :41] = real[1, -30:] = real[2, 5:20] = real[3, :61] = False
    tensors = inputs(97, rows=4)
    if split is None:
        out, held = attend(tensors, window, token_mask=real)
    else:
        first, held = attend([x[:, :split] for x in tensors], window, token_mask=real[:, :split])
        rest, held = attend([x[:, split:] for x in tensors], window, held, token_mask=real[:, split:])
        out = torch.cat([first, rest], dim=1)
    assert out.isfinite().all()
    for row, mask in enumerate(real):
        alone = [x[row : row + 1, mask] for x in tensors]
        expected, last = attend(alone, window)
        assert relative_error(out[row, mask], expected[0]) < SPLIT
        for ours, theirs in zip(held, last, strict=True):
            assert torch.equal(ours[row], theirs[0])


@windows
def test_single_padded_tokens_change_nothing(window):
    """Decoding a batch whose rows begin at other steps."""
    tensors, held, outs = inputs(12), None, []
    real = torch.tensor([[False, True] * 6, [False] * 5 + [True] * 7])
    for step in range(12):
        out, held = attend([x[:, step : step + 1] for x in tensors], window, held, real[:, step : step + 1])
        outs.append(out)
    out = torch.cat(outs, dim=1)
    assert out.isfinite().all()
    for row, mask in enumerate(real):
        expected = window_reference(*(x[row : row + 1, mask] for x in tensors), *window)
        assert relative_error(out[row, mask], expected[0]) < SPLIT


@windows
def test_packed_texts_stand_alone(window):
    tensors, starts = inputs(90), torch.zeros(2, 90, dtype=torch.bool)
    starts[0, [1, 2, 30]] = starts[1, [89]] = True
    out, held = attend(tensors, window, texts=texts_that_start_at(starts))
    for row, bounds in enumerate([(0, 1, 2, 30, 90), (0, 89, 90)]):
        for start, stop in pairwise(bounds):
            expected, last = attend([x[row : row + 1, start:stop] for x in tensors], window)
            assert relative_error(out[row, start:stop], expected[0]) < SPLIT
        for ours, theirs in zip(held, last, strict=True):
            assert torch.equal(ours[row], theirs[0])


@windows
def test_bf16_is_close_to_the_oracle(window):
    tensors = inputs(149, dtype=torch.bfloat16)
    out, held = in_pieces(tensors, window, (80, 81))
    assert out.dtype == held.keys.dtype == torch.bfloat16
    assert relative_error(out, window_reference(*tensors, *window)) < BFLOAT16


def test_the_oracle_is_full_attention_once_the_window_covers_the_text():
    q, k, v = (x.transpose(1, 2) for x in inputs(9, key_heads=4))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    for window in ((9, 0), (1, 8), (4, 5)):
        out = window_reference(*(x.transpose(1, 2) for x in (q, k, v)), *window)
        assert relative_error(out, expected) < SPLIT


def test_nothing_kept_for_the_backward_pass_grows_with_the_square_of_the_length():
    def kept(num_tokens):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            attend(inputs(num_tokens), (64, 4))
        return sum(sizes)

    assert kept(2048) < 2.2 * kept(1024)


@pytest.mark.parametrize("given", [{"window_tokens": -1}, {"window_tokens": 4, "sink_tokens": -1}, {"sink_tokens": 4}])
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=f"^{list(given)[-1]} "):
        WindowSettings(**given)
