"""Whole stacks with a cache: generation, padding, chunked prefill, checkpointing, saving, and what is refused."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import PADDING, RECOMPUTE, SPLIT, relative_error
from transformers import DynamicCache

from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM

VOCAB = 97
STACKS = {
    "rwkv7": ["rad_rwkv7"] * 3,
    "rwkv6": ["rad_rwkv6"] * 3,
    "mixed": ["qwen2", "rad_rwkv6", "rad_rwkv7"],
    "mixed-softmax-last": ["rad_rwkv7", "rad_rwkv6", "qwen2"],
    "qwen2": ["qwen2"] * 3,
    "windowed": ["rad_rwkv7", "rad_rwkv6", "rad_rwkv7"],
}
RECURRENT = ("rwkv7", "rwkv6", "windowed")
WINDOWS = {"rad_rwkv7": {"window_tokens": 6, "sink_tokens": 2}, "rad_rwkv6": {"window_tokens": 4}}


@pytest.fixture(params=STACKS)
def stack(request):
    return request.param


@pytest.fixture
def model(stack):
    return perturbed_model(stack)


def perturbed_model(stack, **changes):
    """A model whose every parameter is moved: no mixer is silent, no low-rank factor zero, logits are of order 1."""
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    windows = {"mixer_settings": WINDOWS} if stack == "windowed" else {}
    config = RadladsConfig(**sizes, **heads, time_mixers=STACKS[stack], pad_token_id=0, **windows, **changes)
    model = RadladsForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_tokens(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(2))


def logits_of(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def greedy_by_hand(model, ids, num_tokens):
    for _ in range(num_tokens):
        ids = torch.cat([ids, logits_of(model, ids, use_cache=False)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def left_padded(rows):
    """Token rows of unequal length as one batch with its attention mask."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def recurrent_tensors(cache):
    layers = [layer.state for layer in cache.layers if hasattr(layer, "state")]
    return [x for state in layers for x in state if x is not None]


def test_greedy_with_and_without_cache_is_the_naive_loop(model):
    prompt = random_tokens(2, 7)
    expected = greedy_by_hand(model, prompt, 12)
    for use_cache in (True, False):
        actual = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache)
        assert torch.equal(actual, expected)
    assert len(set(expected[0, 7:].tolist())) > 2


def test_sampling_with_and_without_cache_draws_the_same_tokens(model):
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        draws.append(model.generate(random_tokens(2, 5), max_new_tokens=12, do_sample=True, use_cache=use_cache))
    assert torch.equal(*draws)


def test_beam_search_with_and_without_cache_finds_the_same_beams(model):
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    found = [model.generate(random_tokens(2, 5), use_cache=use_cache, **beams) for use_cache in (True, False)]
    assert found[0].shape == (4, 13)
    assert torch.equal(*found)


def test_several_return_sequences_draw_as_without_cache(model):
    draws = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        draws.append(
            model.generate(
                random_tokens(2, 5), max_new_tokens=6, do_sample=True, num_return_sequences=3, use_cache=use_cache
            )
        )
    assert draws[0].shape == (6, 11)
    assert torch.equal(*draws)


def test_left_padded_rows_are_the_unpadded_rows(model):
    rows = [random_tokens(length) for length in (3, 8, 11)]
    logits = logits_of(model, **left_padded(rows))
    for row, actual in zip(rows, logits, strict=True):
        assert relative_error(actual[-len(row) :], logits_of(model, row[None])[0]) < PADDING


def test_left_padded_rows_generate_as_unpadded_rows(model):
    rows = [random_tokens(length) for length in (3, 8, 11)]
    together = model.generate(**left_padded(rows), max_new_tokens=8, do_sample=False)
    for row, actual in zip(rows, together, strict=True):
        assert torch.equal(actual[11:], greedy_by_hand(model, row[None], 8)[0, len(row) :])


@pytest.mark.parametrize("lengths", [(13, 13), (2, 13)], ids=["even", "left-padded"])
def test_generate_with_chunked_prefill(model, lengths):
    batch = left_padded([random_tokens(length) for length in lengths])
    seen = []
    model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    seen.clear()
    actual = model.generate(**batch, max_new_tokens=6, do_sample=False, prefill_chunk_size=4)
    assert seen[:4] == [4, 4, 4, 1]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("boundaries", [(1,), (4, 5), (3, 9, 12)])
def test_prefill_in_pieces_by_hand(model, boundaries):
    ids = random_tokens(2, 15)
    cache = RadladsCache(model.config)
    pieces = [logits_of(model, ids[:, i:j], past_key_values=cache) for i, j in pairwise((0, *boundaries, 15))]
    assert relative_error(torch.cat(pieces, dim=1), logits_of(model, ids, use_cache=False)) < SPLIT
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("mask", ["all tokens", "new tokens"])
def test_left_padded_prefill_in_pieces(model, mask):
    """The first piece of the short row is all padding."""
    rows = [random_tokens(2), random_tokens(11)]
    ids, attention_mask = left_padded(rows).values()
    cache, pieces = RadladsCache(model.config), []
    for i, j in pairwise((0, 4, 5, 10, 11)):
        given = attention_mask[:, :j] if mask == "all tokens" else attention_mask[:, i:j]
        pieces.append(logits_of(model, ids[:, i:j], attention_mask=given, past_key_values=cache))
    logits = torch.cat(pieces, dim=1)
    for row, actual in zip(rows, logits, strict=True):
        assert relative_error(actual[-len(row) :], logits_of(model, row[None])[0]) < PADDING
    assert cache.next_positions.tolist() == [2, 11]


def test_continuing_a_returned_cache(model):
    start = model.generate(random_tokens(2, 5), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([start.sequences, random_tokens(2, 3)], dim=1)
    batch = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    actual = model.generate(**batch, past_key_values=start.past_key_values, max_new_tokens=6, do_sample=False)
    assert torch.equal(actual, greedy_by_hand(model, longer, 6))


def test_continuing_a_left_padded_cache_without_a_mask(model):
    rows, more = [random_tokens(3), random_tokens(9)], random_tokens(2, 4)
    cache = RadladsCache(model.config)
    logits_of(model, **left_padded(rows), past_key_values=cache)
    continued = logits_of(model, more, past_key_values=cache)
    for row, end, actual in zip(rows, more, continued, strict=True):
        assert relative_error(actual, logits_of(model, torch.cat([row, end])[None])[0, -4:]) < PADDING


def test_padding_in_the_middle_changes_nothing_around_it(model):
    first, second = random_tokens(2, 5), random_tokens(2, 4)
    ids = torch.cat([first, torch.zeros(2, 3, dtype=torch.long), second], dim=1)
    logits = logits_of(model, ids, attention_mask=(ids != 0).long())
    expected = logits_of(model, torch.cat([first, second], dim=1))
    assert relative_error(logits[:, [0, 1, 2, 3, 4, 8, 9, 10, 11]], expected) < PADDING


def test_a_run_of_padding_in_a_carried_sequence_leaves_the_state_bit_equal(model):
    first, second = random_tokens(2, 5), random_tokens(2, 4)
    cache = RadladsCache(model.config)
    logits_of(model, first, past_key_values=cache)
    before = [x.clone() for x in recurrent_tensors(cache)]
    logits_of(model, first[:, :3], past_key_values=cache, attention_mask=torch.tensor([[1] * 5 + [0] * 3] * 2))
    assert all(map(torch.equal, recurrent_tensors(cache), before))
    assert cache.next_positions.tolist() == [5, 5]

    mask = torch.tensor([[1] * 5 + [0] * 3 + [1] * 4] * 2)
    continued = logits_of(model, second, past_key_values=cache, attention_mask=mask)
    assert relative_error(continued, logits_of(model, torch.cat([first, second], dim=1))[:, -4:]) < PADDING


def test_right_padding_then_continuing(model):
    rows, more = [random_tokens(3), random_tokens(7)], random_tokens(2, 4)
    ids = torch.stack([torch.cat([row, row.new_zeros(7 - len(row))]) for row in rows])
    mask = (ids != 0).long()
    cache = RadladsCache(model.config)
    logits_of(model, ids, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    continued = logits_of(model, more, attention_mask=mask, past_key_values=cache)
    for row, end, actual in zip(rows, more, continued, strict=True):
        assert relative_error(actual, logits_of(model, torch.cat([row, end])[None])[0, -4:]) < PADDING


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(logits_to_keep):
    model, ids = perturbed_model("mixed"), random_tokens(2, 6)
    positions = logits_to_keep if torch.is_tensor(logits_to_keep) else torch.arange(6 - logits_to_keep, 6)
    kept = logits_of(model, ids, logits_to_keep=logits_to_keep)
    assert relative_error(kept, logits_of(model, ids)[:, positions]) < SPLIT


def test_attention_taps_are_what_the_stack_computes(model):
    ids = random_tokens(2, 9)
    captured = []
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda _, args, out: captured.append((args[0], out[0])))
    logits_of(model, ids, use_cache=False)
    expected = captured.copy()
    with torch.no_grad():
        for tap, (x, y) in zip(model.model.attention_taps(ids), expected, strict=True):
            assert torch.equal(tap.x, x)
            assert torch.equal(tap.y, y)


def test_loss_is_the_mean_over_next_tokens_that_are_not_ignored(model):
    ids = random_tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        outputs = model(ids, labels=labels)
    log_p = outputs.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert outputs.loss.item() == pytest.approx(-log_p[labels[:, 1:] != -100].mean().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model):
    ids, calls, results = random_tokens(2, 21), [], []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.train().zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(calls) == 3, "checkpointing must have run the mixer again"
    for plain, recomputed in zip(*results, strict=True):
        assert relative_error(recomputed, plain) < RECOMPUTE


def test_cache_selects_repeats_and_reorders_rows(model):
    ids, more = random_tokens(2, 6), random_tokens(3, 4)
    cache = RadladsCache(model.config)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    logits_of(model, ids, attention_mask=mask, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    mask = torch.cat([mask[[1, 0, 0]], torch.ones_like(more)], dim=1)
    continued = logits_of(model, more, attention_mask=mask, past_key_values=cache)
    whole = torch.cat([ids[[1, 0, 0]], more], dim=1)
    assert relative_error(continued, logits_of(model, whole, attention_mask=mask)[:, -4:]) < PADDING


def test_a_reset_cache_is_a_new_one(model):
    ids = random_tokens(2, 6)
    cache = RadladsCache(model.config)
    logits_of(model, ids.flip(1), attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]] * 2), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_of(model, ids, past_key_values=cache), logits_of(model, ids))


def test_state_bytes_are_those_the_configuration_predicts(model, stack):
    held = []
    for num_tokens in (1, 10, 40):
        cache = RadladsCache(model.config)
        logits_of(model, random_tokens(2, num_tokens), past_key_values=cache)
        held.append(cache.state_bytes())
        assert held[-1] == 2 * state_bytes(model.config, num_tokens, bytes_per_value=4)
    assert (len(set(held)) == 1) == (stack in RECURRENT)


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_is_bit_equal(tmp_path, stack, tied):
    model = perturbed_model(stack, tie_word_embeddings=tied, groupnorm_att=True, balance_state=False)
    model.save_pretrained(tmp_path)
    loaded = RadladsForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert torch.equal(logits_of(loaded.eval(), random_tokens(2, 6)), logits_of(model, random_tokens(2, 6)))


@pytest.mark.parametrize(
    ("stack", "missing"), [("rwkv7", "g1"), ("rwkv7", "a1"), ("rwkv6", "time_decay_w1"), ("rwkv6", "time_maa_w1")]
)
def test_loading_without_one_tensor_keeps_the_others(tmp_path, stack, missing):
    model = perturbed_model(stack)
    model.save_pretrained(tmp_path)
    name = f"model.layers.1.self_attn.{missing}"
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = RadladsForCausalLM.from_pretrained(tmp_path).state_dict()
    assert not loaded.pop(name).any(), "the missing tensor has its initial value"
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.items())


def test_empty_sequence_is_refused(model):
    with pytest.raises(ValueError, match="sequence is empty"):
        model(torch.zeros(2, 0, dtype=torch.long))


def test_foreign_cache_is_refused(model):
    with pytest.raises(ValueError, match=r"must be a RadladsCache .* not DynamicCache"):
        model(random_tokens(2, 3), past_key_values=DynamicCache())


def test_cache_of_another_batch_size_is_refused(model):
    cache = model(random_tokens(2, 3)).past_key_values
    with pytest.raises(ValueError, match="the cache holds 2 sequences but the input has 3"):
        model(random_tokens(3, 1), past_key_values=cache)


@pytest.mark.parametrize(("shape", "message"), [((2, 4), "covers 4 tokens.*0 cached and 5 new"), ((1, 5), r"\(1, 5\)")])
def test_mask_of_the_wrong_size_is_refused(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(random_tokens(2, 5), attention_mask=torch.ones(shape, dtype=torch.long))


def test_ids_and_embeddings_together_or_neither_are_refused(model):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(random_tokens(1, 2), inputs_embeds=torch.zeros(1, 2, 64))


def test_static_cache_is_refused(model):
    with pytest.raises(ValueError, match="cache_implementation 'static' does not fit a recurrent model"):
        model.generate(random_tokens(1, 3), max_new_tokens=2, cache_implementation="static")


def test_assisted_decoding_is_refused(model):
    with pytest.raises(ValueError, match="stateful"):
        model.generate(random_tokens(1, 3), max_new_tokens=2, assistant_model=perturbed_model("qwen2"))


def test_cropping_a_recurrent_state_is_refused():
    cache = perturbed_model("rwkv7")(random_tokens(1, 3)).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
