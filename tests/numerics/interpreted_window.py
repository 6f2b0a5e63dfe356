"""The softmax window's Triton kernels in the interpreter, in fp32, against the oracle. Run by test_triton_kernels.py.

Shape letters: B batch, T tokens, H query heads, K key/value heads, N head size.
"""

import functools
from itertools import pairwise

import pytest
import tiny
import torch
from interpreter import runtime_loops  # noqa: F401
from tolerances import RECURRENCE, SPLIT, relative_error
from torch.utils.checkpoint import checkpoint

from radlads.model import window_attention, window_triton
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.packed_rows import texts_that_start_at
from radlads.model.recurrence_reference import window_reference
from radlads.model.window import WindowSettings

NAMES = ("q", "k", "v")
# T, (W, S), (H, K), N: odd lengths, windows of one token and beyond a block, sinks beyond the window and in two tiles,
# groups of 1, 3 and 7
CASES = [
    (1, (64, 4), (3, 1), 16),
    (7, (5, 1), (3, 3), 16),
    (63, (16, 4), (7, 1), 16),
    (64, (64, 0), (2, 2), 64),
    (65, (64, 4), (6, 2), 16),
    (130, (100, 4), (3, 1), 16),
    (130, (1, 1), (2, 2), 16),
    (70, (5, 20), (3, 1), 16),
    (300, (16, 4), (1, 1), 16),
    (80, (33, 4), (3, 1), 128),
]

pytestmark = pytest.mark.usefixtures("runtime_loops")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The window runs on its kernels; how often."""
    calls = []
    kernels = window_attention.attend_by_kernels
    monkeypatch.setattr(window_attention, "attend_by_kernels", lambda *a, **k: calls.append(1) or kernels(*a, **k))
    monkeypatch.setattr(window_attention, "has_kernels", lambda v: True)
    return calls


def inputs(T, heads=(3, 1), N=16, rows=2):
    torch.manual_seed(0)
    H, K = heads
    return [torch.randn(rows, T, num_heads, N, requires_grad=True) for num_heads in (H, K, K)]


def attend(tensors, window, held=None, token_mask=None, texts=None):
    settings = WindowSettings(*window)
    return window_attention.window_attention(*tensors, held, settings, token_mask=token_mask, texts=texts)


def gradients(out, tensors):
    """Of a fixed function of the output."""
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), tensors)


def assert_same(out, expected, tensors):
    assert relative_error(out, expected) < RECURRENCE
    pairs = zip(NAMES, gradients(out, tensors), gradients(expected, tensors), strict=True)
    for name, found, wanted in pairs:
        assert relative_error(found, wanted, floor=0.1) < RECURRENCE, name


@pytest.mark.parametrize(("T", "window", "heads", "N"), CASES)
def test_kernels_are_the_oracle(T, window, heads, N, calls):
    tensors = inputs(T, heads, N)
    settings = WindowSettings(*window)
    out = window_attention._by_kernels(*tensors, None, settings)
    assert_same(out, window_reference(*tensors, *window), tensors)
    assert calls


@pytest.mark.parametrize(
    ("window", "boundaries"),
    [((16, 4), (2, 3, 40)), ((5, 20), (9, 60)), ((70, 2), (66, 68)), ((1, 0), (40,))],
    ids=str,
)
def test_splitting_changes_nothing(window, boundaries, calls):
    """The state carried, and gradients through it."""
    tensors, outs, held = inputs(90, rows=1), [], None
    for start, stop in pairwise((0, *boundaries, 90)):
        out, held = attend([x[:, start:stop] for x in tensors], window, held)
        outs.append(out)
    _, last = attend(tensors, window)
    assert len(calls) >= len(boundaries)
    assert_same(torch.cat(outs, dim=1), window_reference(*tensors, *window), tensors)
    for ours, theirs in zip(held, last, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("split", [None, 7, 25])
def test_padding_changes_nothing(split):
    """Rows padded on the left, in the middle, and everywhere before the split: one has seen 0 tokens, one 7."""
    real = torch.ones(3, 50, dtype=torch.bool)
    real[0, :25] = real[1, 5:20] = real[2, -10:] = False
    tensors, window, outs, held = inputs(50, rows=3), (16, 4), [], None
    for start, stop in pairwise((0, 50) if split is None else (0, split, 50)):
        out, held = attend([x[:, start:stop] for x in tensors], window, held, real[:, start:stop])
        outs.append(out)
    out, expected = torch.cat(outs, dim=1)[real], []
    for row, mask in enumerate(real):
        expected.append(window_reference(*(x[row : row + 1, mask] for x in tensors), *window)[0])
    assert_same(out, torch.cat(expected), tensors)


def test_packed_texts_stand_alone():
    tensors, starts = inputs(60), torch.zeros(2, 60, dtype=torch.bool)
    starts[0, [1, 2, 30]] = starts[1, [59]] = True
    out, _ = attend(tensors, (16, 4), texts=texts_that_start_at(starts))
    rows = []
    for row, bounds in enumerate([(0, 1, 2, 30, 60), (0, 59, 60)]):
        texts = [[x[row : row + 1, start:stop] for x in tensors] for start, stop in pairwise(bounds)]
        rows.append(torch.cat([window_reference(*text, 16, 4) for text in texts], dim=1))
    assert_same(out, torch.cat(rows), tensors)


def test_every_run_is_bit_equal_with_checkpointing_too():
    tensors, settings = inputs(70), WindowSettings(16, 4)
    run = functools.partial(window_attention._by_kernels, held=None, window=settings)
    expected = run(*tensors)
    wanted = gradients(expected, tensors)
    for again in (run, functools.partial(checkpoint, run, use_reentrant=False)):
        out = again(*tensors)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, gradients(out, tensors), wanted))


def test_compiling_changes_nothing():
    """With a state, whose gradients are outputs of the operator, and at two lengths."""
    run = lambda tensors, held: attend(tensors, (5, 2), held)  # noqa: E731
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for T in (20, 30):
        found = []
        for each in (run, compiled):
            tensors = inputs(T)
            _, held = attend([x[:, :10] for x in tensors], (5, 2))
            out, held = each([x[:, 10:] for x in tensors], held)
            found.append([out, *held, *gradients(out, tensors)])
        assert all(map(torch.equal, *found))


def test_a_student_learns_as_by_blocks_and_recomputed(monkeypatch, calls):
    torch.manual_seed(0)
    settings = {"rad_rwkv7": {"window_tokens": 5, "sink_tokens": 2}}
    model = RadladsForCausalLM(RadladsConfig(**tiny.SIZES, time_mixers=["rad_rwkv7"] * 3, mixer_settings=settings))
    tokens, found = torch.randint(256, (2, 12)), {}
    for path in ("kernels", "selective", "blocks"):
        monkeypatch.setattr(window_attention, "has_kernels", lambda v, on=path != "blocks": on)
        model.train().set_activation_checkpointing("selective" if path == "selective" else "none")
        loss = model(tokens, labels=tokens, use_cache=False).loss
        found[path] = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert len(calls) == 3 + 2 * 3
    for ours, again, torchs in zip(*found.values(), strict=True):
        assert (ours is None) == (torchs is None)
        assert ours is None or (torch.equal(ours, again) and relative_error(ours, torchs, floor=1e-3) < SPLIT)


def test_only_what_is_needed_is_kept():
    """q, k, v, the output and a number for each query: no blocks of keys, no masks."""
    sizes = []
    tensors = inputs(70)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        out = window_attention._by_kernels(*tensors, None, WindowSettings(16, 4))
    assert sum(sizes) == sum(x.numel() for x in (*tensors, out)) + out[..., 0].numel()


def test_other_heads_and_devices_take_the_path_of_torch(monkeypatch):
    monkeypatch.undo()
    assert not window_attention.has_kernels(torch.empty(1, 2, 1, 64))
    assert set(window_triton.HEAD_SIZES) >= {64, 128}


def test_half_precision_is_close():
    """fp16, since the interpreter has no products of bf16 numbers: the blocks of 64 that both have."""
    tensors = [x.detach().half().requires_grad_() for x in inputs(70)]
    out = window_attention._by_kernels(*tensors, None, WindowSettings(16, 4))
    expected = window_reference(*tensors, 16, 4)
    assert out.dtype == torch.float16 and relative_error(out, expected) < 2e-3
    for found, wanted in zip(gradients(out.float(), tensors), gradients(expected, tensors), strict=True):
        assert relative_error(found, wanted) < 5e-3
