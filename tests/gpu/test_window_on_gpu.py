"""The softmax window's kernels against the fp32 oracle, and training of students that have one.

Shape letters: B batch, T tokens, H query heads, K key/value heads, N head size.
"""

import os
from itertools import pairwise, product

import pytest
import torch
from gpu_comparison import DEVICE, DRY_RUN, Comparison, Rounding, assert_within_bounds, require, rounded
from test_training import Graphed, Training, assert_same_curve
from tolerances import relative_error

from radlads.model import window_attention, window_triton
from radlads.model.packed_rows import texts_that_start_at
from radlads.model.recurrence_reference import window_reference
from radlads.model.window import WindowSettings

pytestmark = pytest.mark.gpu

NAMES = ("q", "k", "v")
# By what they round to: fp16 has as many significant bits as TF32
DTYPES = {"exact": torch.float32, "bf16": torch.bfloat16, "tf32": torch.float16}
# (W, S), (H, K), N: blocks of 32 in fp32 and of 64, windows of one token and beyond several blocks, sinks beyond the
# window and in two tiles, groups of 1, 3 and 7
SHAPES = [
    ((64, 4), (7, 1), 128),
    ((1, 0), (2, 2), 64),
    ((5, 20), (6, 2), 32),
    ((300, 4), (3, 1), 64),
    ((64, 1), (2, 1), 16),
]
LENGTHS = (7, 65) if DRY_RUN else (2, 7, 63, 64, 65, 130, 1000)
SETTINGS = {"window_tokens": 16, "sink_tokens": 2}

dtypes = pytest.mark.parametrize("precision", ["exact"] if DRY_RUN else DTYPES)  # the interpreter has no bf16 products
needs_gpu = pytest.mark.skipif(DRY_RUN, reason="says nothing without a GPU")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The window runs on its kernels, in a dry run too; a list that grows with every launch.

    Counted inside the operator: torch.compile would make another graph whenever a list that it traces has grown.
    """
    require("triton")
    launches, of_queries = [], window_triton.Call.of_queries
    monkeypatch.setattr(window_triton.Call, "of_queries", lambda *a, **k: launches.append(1) or of_queries(*a, **k))
    if DRY_RUN and os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(window_attention, "has_kernels", lambda v: True)
    return launches


def inputs(T, heads, N, precision, rows=2):
    """q, k and v, fp32, rounded as the kernels' inputs, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1000 * T + N)
    H, K = heads
    tensors = [torch.randn(rows, T, num_heads, N, generator=generator).to(DEVICE) for num_heads in (H, K, K, H)]
    return [rounded(x, precision) for x in tensors]


def results(run, tensors, d_out, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    out = run(*leaves)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, leaves, d_out.to(dtype))
    return {"out": out.detach()} | {f"d {name}": x for name, x in zip(NAMES, gradients, strict=True)}


def on_kernels(window, *boundaries):
    """The window's attention, to be called with q, k and v: in pieces, with the state carried."""

    def run(*tensors):
        outs, held = [], None
        for start, stop in pairwise((0, *boundaries, tensors[0].shape[1])):
            piece = [x[:, start:stop] for x in tensors]
            out, held = window_attention.window_attention(
                *piece, held, WindowSettings(*window), token_mask=None, texts=None
            )
            outs.append(out)
        return torch.cat(outs, dim=1)

    return run


def by_oracle(window, precision):
    def run(*tensors):
        return Rounding.apply(window_reference(*tensors, *window), precision)

    return run


def assert_close(run, window, T, heads, N, precision):
    *tensors, d_out = inputs(T, heads, N, precision)
    exact = results(by_oracle(window, "exact"), tensors, d_out, torch.float32)
    by_rounding = results(by_oracle(window, precision), tensors, d_out, torch.float32)
    by_rounding = {name: rounded(x, precision) for name, x in by_rounding.items()}
    found = results(run, tensors, d_out, DTYPES[precision])
    errors = {name: [relative_error(x[name], exact[name], 1.0) for x in (found, by_rounding)] for name in exact}
    rounding = max(by_rounding for _, by_rounding in errors.values())
    where = f"T {T}, W and S {window}, H and K {heads}, N {N}"
    assert_within_bounds(
        [
            Comparison("KERNEL", f"window, {precision}", f"{name}, {where}", precision, error, rounding)
            for name, (error, _) in errors.items()
        ]
    )


@dtypes
@pytest.mark.parametrize(("T", "shape"), list(product(LENGTHS, SHAPES)), ids=str)
def test_kernels_are_the_oracle(T, shape, precision, kernels):
    window, heads, N = shape
    assert_close(on_kernels(window), window, T, heads, N, precision)
    assert kernels


@needs_gpu
@dtypes
def test_kernels_are_the_oracle_at_7b_shape(precision):
    assert_close(on_kernels((64, 4)), (64, 4), 600, (28, 4), 128, precision)


@dtypes
@pytest.mark.parametrize("boundaries", [(2, 66), (40, 50), (70,)], ids=str)
@pytest.mark.parametrize("window", [(64, 4), (5, 20)], ids=str)
def test_pieces_with_carried_state_are_the_oracle(window, boundaries, precision):
    """Gradients through the state as well."""
    T, heads, N = 90, (3, 1), 64
    assert_close(on_kernels(window, *boundaries), window, T, heads, N, precision)


@dtypes
def test_padding_and_packed_rows_change_nothing(precision):
    dtype, window = DTYPES[precision], (16, 4)
    *tensors, _ = (x.to(dtype) for x in inputs(90, (3, 1), 64, precision))
    real = torch.ones(2, 90, dtype=torch.bool, device=DEVICE)
    real[0, :41] = real[1, 5:20] = False
    starts = torch.zeros_like(real)
    starts[0, 30] = starts[1, 41] = True
    alone = on_kernels(window)

    def attend(**how):
        return window_attention.window_attention(*tensors, None, WindowSettings(*window), **how)[0]

    padded, packed = attend(token_mask=real, texts=None), attend(token_mask=None, texts=texts_that_start_at(starts))
    for row, start in enumerate((30, 41)):
        expected = alone(*(x[row : row + 1, real[row]] for x in tensors))
        assert torch.equal(padded[row, real[row]], expected[0])
        for piece in (slice(start), slice(start, None)):
            expected = alone(*(x[row : row + 1, piece] for x in tensors))
            assert torch.equal(packed[row, piece], expected[0])


@dtypes
def test_every_run_is_bit_equal(precision):
    *tensors, d_out = inputs(90 if DRY_RUN else 2048, (7, 1), 128, precision, rows=1)
    first, second = (results(on_kernels((64, 4)), tensors, d_out, DTYPES[precision]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_gpu
def test_compiling_changes_nothing(device, kernels):
    compiled = torch.compile(on_kernels((64, 4), 100), fullgraph=True)
    for T in (300, 401):
        *tensors, d_out = inputs(T, (7, 1), 128, "bf16")
        expected = results(on_kernels((64, 4), 100), tensors, d_out, torch.bfloat16)
        launched = len(kernels)
        found = results(compiled, tensors, d_out, torch.bfloat16)
        assert len(kernels) > launched, "compiled code has left the kernels"
        assert torch.equal(found["out"], expected["out"])
        for (
            name
        ) in found:  # keys and values of both pieces have two gradients, which the compiler adds before it rounds
            assert relative_error(found[name], expected[name], 1.0) < 2**-8, name


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["rad_rwkv7", "rad_rwkv6"])
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_kernels_train_as_blocks_of_torch_do(device, monkeypatch, kernels, stage, mixer, dtype):
    found = Training(stage, device, dtype, mixer=mixer, window=SETTINGS).curve()
    assert kernels
    monkeypatch.setattr(window_attention, "has_kernels", lambda v: False)
    expected = Training(stage, device, dtype, mixer=mixer, window=SETTINGS).curve()
    assert_same_curve(found, expected, dtype)


@needs_gpu
@pytest.mark.parametrize(
    ("stage", "checkpointing", "graphed"),
    [
        ("align", "none", False),
        ("align", "none", True),
        ("distill", "none", True),
        ("distill", "selective", True),
        ("extend", "selective", False),
        ("extend", "full", False),
    ],
)
def test_compiled_recomputed_and_recorded_students_learn_alike(device, stage, checkpointing, graphed):
    torch.compiler.reset()
    dtype = torch.bfloat16
    expected = Graphed(device, dtype, stage, graphed=False, window=SETTINGS).curve()
    found = Graphed(
        device, dtype, stage, graphed=graphed, compiled=True, checkpointing=checkpointing, window=SETTINGS
    ).curve()
    assert_same_curve(found, expected, dtype)


@needs_gpu
@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_step_with_a_window_never_waits_for_the_gpu(device, stage):
    training = Training(stage, device, torch.bfloat16, window=SETTINGS)
    for number in range(3):
        training.step(number)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step(3)
    finally:
        torch.cuda.set_sync_debug_mode(before)
