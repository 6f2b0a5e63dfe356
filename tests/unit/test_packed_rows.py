"""Rows of several texts: each is read as if it stood alone, by every mixer, forward, backward and into a cache."""

import pytest
import torch
from accelerate.utils import send_to_device
from test_generation import STACKS, logits_of, perturbed_model, random_tokens
from tolerances import PADDING, RECOMPUTE, relative_error

from radlads.model import block
from radlads.model.cache import RadladsCache
from radlads.model.rad_rwkv6 import RadRwkv6
from radlads.model.rad_rwkv7 import RadRwkv7
from radlads.model.registry import TIME_MIXERS

# Two rows of 41 tokens: a text of one token, two next to each other, lengths that make several runs
LENGTHS = ((13, 1, 1, 9, 17), (2, 39))
NORMED = {"balance_state": False, "groupnorm_att": True}
RWKV6 = {"gate_rank_type": 1, "use_rope": False}
VARIANTS = [(stack, {}) for stack in STACKS] + [
    ("rwkv7", NORMED),
    ("rwkv6", RWKV6),
    ("rwkv6", {"use_tokenshift": False}),
]


class OwnRwkv6(RadRwkv6):
    """A mixer of the user's own, which knows nothing of packed rows."""


class OwnRwkv7(RadRwkv7):
    """Another, which hands on v_first."""


@pytest.fixture(params=VARIANTS, ids=str)
def model(request):
    stack, changes = request.param
    return perturbed_model(stack, **changes)


@pytest.fixture
def ids():
    return random_tokens(2, 41)


def texts_of(rows):
    return [text for row, lengths in zip(rows, LENGTHS, strict=True) for text in row.split(lengths)]


def positions():
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])


def numbers():
    return torch.stack([torch.repeat_interleave(torch.tensor(lengths)) for lengths in LENGTHS]).int()


WAYS = {
    "position_ids": lambda: {"position_ids": positions()},
    "seq_idx": lambda: {"seq_idx": numbers()},
    "cu_seq_lens": lambda: {"cu_seq_lens_q": torch.tensor([0, *sum(LENGTHS, ())]).cumsum(0).int()},
}


def assert_texts_stand_alone(model, ids, logits, bound=PADDING):
    for text, actual in zip(texts_of(ids), texts_of(logits), strict=True):
        assert relative_error(actual, logits_of(model, text[None], use_cache=False)[0]) < bound


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_each_text_is_read_as_if_alone(model, ids, way, use_cache):
    assert_texts_stand_alone(model, ids, logits_of(model, ids, **WAYS[way](), use_cache=use_cache))


def test_a_mixer_of_ones_own_is_run_text_by_text(ids, monkeypatch):
    monkeypatch.setitem(TIME_MIXERS, "rad_rwkv6", OwnRwkv6)
    monkeypatch.setitem(TIME_MIXERS, "rad_rwkv7", OwnRwkv7)
    model = perturbed_model("mixed")
    monkeypatch.undo()
    assert {type(block.self_attn) for block in model.model.layers} >= {OwnRwkv6, OwnRwkv7}
    logits = logits_of(model, ids, position_ids=positions(), past_key_values=(cache := RadladsCache(model.config)))
    assert_texts_stand_alone(model, ids, logits)
    assert cache.layers[1].state.wkv.shape[0] == 2


def gradients(model, batches):
    model.zero_grad()
    for batch in batches:
        logits = model(**batch, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_the_sums_of_those_of_the_texts(model, ids, recomputed):
    expected = gradients(model.train(), [{"input_ids": text[None]} for text in texts_of(ids)])
    if recomputed:
        model.gradient_checkpointing_enable()
    actual = gradients(model, [{"input_ids": ids, "position_ids": positions()}])
    for packed, alone in zip(actual, expected, strict=True):
        assert relative_error(packed, alone, floor=1e-3) < 1e-4


def test_a_cache_goes_on_with_each_rows_last_text(model, ids):
    cache, more = RadladsCache(model.config), random_tokens(2, 5)
    logits_of(model, ids, position_ids=positions(), past_key_values=cache)
    continued = logits_of(model, more, past_key_values=cache)
    for row, lengths, end, actual in zip(ids, LENGTHS, more, continued, strict=True):
        alone = torch.cat([row[-lengths[-1] :], end])
        assert relative_error(actual, logits_of(model, alone[None])[0, -5:]) < PADDING


def test_a_mask_of_all_tokens_does_not_bring_back_the_texts_before_the_last(ids):
    """As generate gives it with every new token."""
    model, more, steps = perturbed_model("mixed"), random_tokens(2, 5), []
    for mask in (None, torch.ones(2, 41 + 5)):
        cache = RadladsCache(model.config)
        logits_of(model, ids, position_ids=positions(), past_key_values=cache)
        steps.append(logits_of(model, more, attention_mask=mask, past_key_values=cache))
    assert torch.equal(*steps)


def test_padding_between_texts_belongs_to_none(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 10:13] = mask[0, -4:] = mask[1, :1] = mask[1, 2:4] = 0
    logits = logits_of(model, ids, attention_mask=mask, position_ids=positions())
    for text, real, actual in zip(*map(texts_of, (ids, mask.bool(), logits)), strict=True):
        if real.all():
            assert relative_error(actual, logits_of(model, text[None])[0]) < PADDING
        elif real[0]:
            length = int(real.sum())
            assert relative_error(actual[:length], logits_of(model, text[None, :length])[0]) < PADDING


ORDINARY = {
    "from 0": torch.arange(41)[None],
    "from 7": torch.arange(7, 48)[None].expand(2, -1),
    "with gaps": 3 * torch.arange(41)[None],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_positions_that_only_rise_are_one_text(ids, name):
    model = perturbed_model("mixed")
    shared = model.model.shared_inputs(model.model.embed_tokens(ids), None, ORDINARY[name], None)
    assert shared.texts is None and shared.attention_mask is None


def test_left_padding_and_a_filled_cache_are_no_packed_rows(ids):
    model = perturbed_model("mixed")
    embedded = model.model.embed_tokens(ids)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    padded = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as transformers' generate numbers them
    assert model.model.shared_inputs(embedded, mask, padded, None).texts is None
    cache = RadladsCache(model.config)
    logits_of(model, ids, past_key_values=cache)
    assert model.model.shared_inputs(embedded, None, positions(), cache).texts is None
    with pytest.raises(ValueError, match="packed rows, which need an empty cache"):
        model(ids, seq_idx=numbers(), past_key_values=cache)


def test_accelerate_moves_what_layers_share_to_another_device(ids):
    """It moves tensors, containers and what has to()."""
    model = perturbed_model("mixed")
    shared = model.model.shared_inputs(model.model.embed_tokens(ids), torch.ones_like(ids), positions(), None)
    moved = send_to_device(shared, "meta")
    tensors = moved.cos, moved.sin, moved.attention_mask, moved.texts.starts, moved.texts.numbers
    assert {x.device.type for x in tensors} == {"meta"} and moved.token_mask is None


@pytest.mark.parametrize("stack", ["rwkv7", "windowed", "qwen2"])
def test_compiled_blocks_read_packed_rows_of_any_texts_in_the_same_graphs(ids, stack):
    model = perturbed_model(stack)
    batches = [{"seq_idx": numbers()}, {"seq_idx": (torch.arange(41, dtype=torch.int32) // 7).repeat(2, 1)}]
    expected = [logits_of(model, ids, **batch, use_cache=False) for batch in batches]
    model.compile_blocks(backend="eager")
    for number, batch in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert relative_error(logits_of(model, ids, **batch, use_cache=False), expected[number]) < RECOMPUTE


def test_texts_that_are_run_one_by_one_are_not_compiled(ids, monkeypatch):
    asked = []
    monkeypatch.setattr(block, "_compiled", lambda function, backend: asked.append(function.__name__) or function)
    monkeypatch.setitem(TIME_MIXERS, "rad_rwkv7", OwnRwkv7)
    model = perturbed_model("rwkv7")
    model.compile_blocks(backend="eager")
    logits_of(model, ids, position_ids=positions(), use_cache=False)
    assert set(asked) == {"feed"}


def test_a_compiled_model_reads_packed_rows(ids):
    model = perturbed_model("mixed")
    expected = logits_of(model, ids, position_ids=positions(), use_cache=False)
    compiled = torch.compile(model, backend="eager")
    actual = logits_of(compiled, ids, position_ids=positions(), use_cache=False)
    assert relative_error(actual, expected) < RECOMPUTE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seq_idx": torch.zeros(1, 41)}, r"seq_idx must be \[2, 41\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 41])}, "cu_seq_lens_q must go from 0 to the 82 tokens"),
        ({"cu_seq_lens_q": torch.tensor([3, 82])}, "cu_seq_lens_q must go from 0"),
    ],
)
def test_boundaries_of_other_rows_are_refused(ids, wrong, message):
    with pytest.raises(ValueError, match=message):
        perturbed_model("rwkv7")(ids, **wrong)
