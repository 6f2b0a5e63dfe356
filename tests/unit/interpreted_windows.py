"""The fused decoding step's softmax windows in Triton's interpreter, against the model's own forward. Run by
test_decoder.py."""

import dataclasses

import pytest
import torch
from interpreted_kernels import BALANCED, GROUP_NORMED
from interpreted_kernels import launches as small_launches
from interpreter import runtime_loops  # noqa: F401
from test_decoder import VOCAB, full_logits, logits_after, perturbed
from tolerances import SPLIT, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from radlads.inference.decode_steps import can_be_fused
from radlads.inference.fused_step import FusedStep
from radlads.inference.prefill import left_padded, prefill
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.registry import TIME_MIXERS

PRODUCTS = ("inputs", "output", "gate_up", "down", "head")
pytestmark = pytest.mark.usefixtures("runtime_loops")


def launches(rows, slots=128):
    """As few programs as there can be; windows are read `slots` at a time."""
    small = small_launches(rows)
    large = {name: dataclasses.replace(getattr(small, name), block_n=128, block_k=64) for name in PRODUCTS}
    return dataclasses.replace(small, **large, low_rank_columns=256, window_slots=slots)


def windowed(window, sinks, variant=BALANCED, *, groups=2, heads=2, layers=1):
    settings = {"rad_rwkv7": {"window_tokens": window, "sink_tokens": sinks}}
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads // groups, "mixer_settings": settings}
    return perturbed(["rad_rwkv7"] * layers, **variant, **sizes)


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def error_of(model, prompts, steps, slots):
    """The step's error over `steps` tokens."""
    rows = len(prompts)
    continuation = torch.randint(VOCAB, (steps, rows))
    step = FusedStep(model, rows, launches(rows, slots))
    return relative_error(logits_after(step, model, prompts, continuation), full_logits(model, prompts, continuation))


# Prompts shorter and longer than window and sinks; steps for two rounds through the slots; all at once and in tiles
@pytest.mark.parametrize(
    ("window", "prompts", "variant", "heads", "steps", "slots"),
    [
        ((3, 0), (7,), BALANCED, {"groups": 1, "layers": 2}, 7, 128),
        ((3, 2), (9, 1, 4), GROUP_NORMED, {"groups": 2, "layers": 2}, 7, 4),
        ((3, 4), (3, 12), {**BALANCED, "use_rope": False}, {"groups": 7, "heads": 7}, 8, 4),
        ((16, 4), (2,), GROUP_NORMED, {"groups": 2}, 36, 128),
        ((16, 0), (25, 1, 5), BALANCED, {"groups": 1, "heads": 1}, 33, 8),
        ((16, 2), (30,), {**GROUP_NORMED, "use_rope": False}, {"groups": 2}, 32, 4),
    ],
    ids=str,
)
def test_a_windowed_step_is_the_models_forward(window, prompts, variant, heads, steps, slots):
    model = windowed(*window, variant, **heads)
    assert can_be_fused(model, len(prompts))
    assert error_of(model, prompts_of(*prompts), steps, slots) < SPLIT


class Other(RadRwkv7):
    """Another kind, so that it may have another window."""

    made_for = frozenset({"fused decode"})


def test_layers_of_one_stack_may_have_different_windows_or_none(monkeypatch):
    monkeypatch.setitem(TIME_MIXERS, "other", Other)
    monkeypatch.setitem(TIME_MIXERS, "third", Other)
    settings = {"rad_rwkv7": {"window_tokens": 3, "sink_tokens": 1}, "other": {"window_tokens": 5}}
    model = perturbed(["third", "rad_rwkv7", "other"], **BALANCED, mixer_settings=settings)
    assert [layer.self_attn.window is None for layer in model.model.layers] == [True, False, False]
    assert can_be_fused(model, 1)
    assert error_of(model, prompts_of(6), 7, 128) < SPLIT


@torch.inference_mode()
def test_a_windowed_step_begins_anew_and_keeps_its_window_in_place():
    """A second text in the same step's memory is as in a fresh one, and the cache stays as prefill left it."""
    model, prompts = windowed(3, 2), prompts_of(8, 2)
    tokens, mask = left_padded(prompts, model.device)
    cache = prefill(model, tokens, mask=mask)[1]
    before = [x.clone() for x in cache.layers[0].state if x is not None]
    step, found, places = FusedStep(model, 2, launches(2)), [], []
    for _ in range(2):
        step.load(cache)
        found.append(torch.stack([step(token).clone() for token in torch.arange(10).view(5, 2)]))
        places.append([x.data_ptr() for x in step.windows[0]])
        assert step.held.counters[1].tolist() == [13, 7]
    assert torch.equal(*found) and places[0] == places[1]
    assert all(map(torch.equal, before, (x for x in cache.layers[0].state if x is not None)))


@torch.inference_mode()
def test_ordinary_kernels_lie_between_the_count_and_the_first_fused_one(monkeypatch):
    """The count is read early, before which a programmatic launch promises nothing of the kernel right before it."""
    step, order = FusedStep(windowed(3, 2), 1, launches(1)), []
    monkeypatch.setattr(step, "_time_mixer", lambda *a: order.append("fused"))

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            order.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    with Recorded():
        step(torch.zeros(1, dtype=torch.int64))
    assert set(order[order.index("add_") + 1 : order.index("fused")]) >= {"cos", "sin"}


def test_what_a_step_holds_is_the_models_own_state():
    """Slot by slot, so that the model could go on from it."""
    model, prompts = windowed(3, 2, layers=2), prompts_of(8, 2)
    continuation = torch.randint(VOCAB, (7, 2))
    step = FusedStep(model, 2, launches(2))
    logits_after(step, model, prompts, continuation)
    texts = [[*prompt, *continuation[:, row].tolist()] for row, prompt in enumerate(prompts)]
    tokens, mask = left_padded(texts, model.device)
    for window, layer in zip(step.windows, prefill(model, tokens, mask=mask)[1].layers, strict=True):
        assert torch.equal(window.seen, layer.state.seen)
        assert relative_error(window.keys, layer.state.keys) < SPLIT
        assert relative_error(window.values, layer.state.values) < SPLIT


def test_rows_that_join_move_and_narrow_are_the_models_forward():
    """Two texts in the first two rows of three, then one in the place of the other, as a server has them."""
    model, prompts = windowed(3, 2, layers=2), prompts_of(8, 2)
    continuation = torch.randint(VOCAB, (4, 2))
    expected = full_logits(model, prompts, torch.cat([continuation, continuation]))
    with torch.inference_mode():
        wide = FusedStep(model, 3, launches(3))
        for row, prompt in enumerate(prompts):
            wide.put(row, prefill(model, torch.tensor([prompt]))[1])
        both, one = (FusedStep(model, rows, launches(rows), wide=wide) for rows in (2, 1))
        found = torch.stack([both(tokens).clone() for tokens in continuation])
        wide.move(1, 0)
        alone = torch.stack([one(tokens[1:]).clone() for tokens in continuation])
    assert relative_error(found, expected[:4]) < SPLIT
    assert relative_error(alone, expected[4:, 1:]) < SPLIT
    assert wide.layers is one.layers and wide.held.counters[:, 0].tolist() == [10, 10]
