"""Streaming generation: the same tokens as transformers' generate, sampling rules, refusals."""

import copy
import dataclasses
import math

import pytest
import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from radlads.convert.hf_source import load_tokenizer, open_teacher
from radlads.convert.student import build_student
from radlads.inference import decoder, generate
from radlads.inference.finite import NotFinite, are_finite
from radlads.inference.generate import (
    Sampling,
    choose,
    choose_device,
    decode_ms,
    decoded,
    generate_tokens,
    prefill,
    stream_rows,
    stream_text,
    stream_tokens,
)
from radlads.inference.sampling import draw, running_sums

PROMPT = list(b"the quick brown fox")
GREEDY = Sampling(temperature=0, max_tokens=12)


@pytest.fixture(scope="module", params=["rad_rwkv6", "rad_rwkv7", "qwen2"])
def model(request, teacher, tmp_path_factory):
    config = tiny.stage_config(tmp_path_factory.mktemp("none"), "align", **{"model.tmix": request.param})
    torch.manual_seed(0)
    student, _ = build_student(open_teacher(teacher), config.model)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student.eval()


def test_greedy_streaming_is_transformers_generate(model):
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert list(stream_tokens(model, PROMPT, GREEDY)) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_prefill_in_pieces_changes_nothing(model, piece):
    tokens = torch.randint(256, (2, 33))
    whole, _ = prefill(model, tokens, piece=100)
    logits, cache = prefill(model, tokens, piece=piece)
    torch.testing.assert_close(logits, whole, atol=2e-4, rtol=0)
    assert cache.get_seq_length() == 33


def test_a_seed_repeats_and_another_differs(model):
    def sample(seed):
        return list(stream_tokens(model, PROMPT, Sampling(seed=seed, max_tokens=20)))

    assert sample(1) == sample(1) != sample(2)


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(model):
    tokens = list(stream_tokens(model, PROMPT, GREEDY))
    stop = tokens[5]
    stopped = list(stream_tokens(model, PROMPT, GREEDY, frozenset({stop})))
    assert stopped == tokens[: tokens.index(stop)]


RAGGED = [PROMPT, PROMPT[:3], PROMPT[5:11]]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=4, top_p=0.9, max_tokens=12)])
def test_a_ragged_batch_is_its_rows_one_by_one(model, sampling):
    single = [
        list(stream_tokens(model, prompt, dataclasses.replace(sampling, seed=4 + row)))
        for row, prompt in enumerate(RAGGED)
    ]
    assert generate_tokens(model, RAGGED, dataclasses.replace(sampling, seed=4)) == single
    assert single[0] != single[1] != single[2]


def test_rows_end_at_their_own_stop_tokens(model):
    whole = generate_tokens(model, RAGGED, GREEDY)
    stops = frozenset({whole[0][4], whole[1][2]})
    expected = []
    for row in whole:
        ends = [index for index, token in enumerate(row) if token in stops]
        expected.append(row[: ends[0]] if ends else row)
    assert generate_tokens(model, RAGGED, GREEDY, stops) == expected
    steps = list(stream_rows(model, RAGGED, GREEDY, stops))
    assert len(steps) == max(len(row) for row in expected)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="choose --device cpu"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == (torch.device("cpu"), torch.float32)


def test_no_prompts_give_no_continuations(model):
    assert generate_tokens(model, [], GREEDY) == []


def test_more_tokens_than_are_drawn_at_a_time(model, monkeypatch):
    sampling = Sampling(seed=1, max_tokens=10)
    monkeypatch.setattr(decoder, "DRAWS", 4)
    few = list(stream_tokens(model, PROMPT, sampling))
    assert few == list(stream_tokens(model, PROMPT, sampling))
    monkeypatch.setattr(decoder, "DRAWS", 5)
    assert few == list(stream_tokens(model, PROMPT, sampling))


def test_a_steps_time_is_measured_for_a_batch(model):
    assert 0 < decode_ms(model, torch.randint(256, (2, 5)), steps=3, warmup=1) < 10_000


def test_one_token_of_prompt_is_enough(model):
    assert len(list(stream_tokens(model, PROMPT[:1], GREEDY))) == 12


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        next(stream_tokens(model, [], GREEDY))


def test_a_prompt_longer_than_memory_is_refused(model, monkeypatch):
    monkeypatch.setattr(generate, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="shorten the prompt"):
        next(stream_tokens(model, PROMPT, GREEDY))


def test_streamed_pieces_are_whole_characters(model, teacher):
    tokenizer = load_tokenizer(teacher, tiny.VOCAB)
    pieces = list(stream_text(model, tokenizer, "fox", Sampling(seed=3, max_tokens=40), frozenset()))
    assert pieces
    "".join(pieces).encode()


@pytest.mark.parametrize(
    "content", [b"plain", "caf\u00e9".encode()[:-1], b"\xf0\x9f\x98", b"\xff\xffa\xc3", "a\ufffd".encode(), b""]
)
def test_streamed_pieces_together_are_the_text_of_the_tokens(teacher, content):
    tokenizer = load_tokenizer(teacher, tiny.VOCAB)
    id_of = {character: tokenizer.token_to_id(character) for character in tokenizer.get_vocab()}
    tokens = [id_of[bytes_to_unicode()[byte]] for byte in content]
    pieces = list(decoded(tokenizer, tokens))
    assert "".join(pieces) == content.decode("utf-8", "replace") == tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer as Llama 2's: two words, and bytes by number."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "b"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


@pytest.mark.parametrize(
    "words",
    [
        "<0xC3> <0xA9> b",
        "<0xC3> <0xA9> <0xFF> b",  # the wrong byte takes the whole character before it along
        "\u2581a <0xF0> <0x9F> <0x98> <0x80> <0xF0> <0x9F> \u2581a b",
        "b <0xC3> <s> <0xA9> b",
        "<s> \u2581a <s> <0xC3> <0xA9> <0xC3>",
    ],
)
def test_streamed_bytes_together_are_the_text_of_the_tokens(byte_fallback, words):
    tokens = [byte_fallback.token_to_id(word) for word in words.split()]
    assert "".join(decoded(byte_fallback, tokens)) == byte_fallback.decode(tokens)


@pytest.fixture
def failing(model):
    """The model, a prompt, and how many tokens it reads until its numbers are no longer finite, in the answer."""
    prompt = list(b"The quick brown fox")
    tokens = list(stream_tokens(model, prompt, GREEDY))
    place = next(place for place, token in enumerate(tokens) if place > 1 and token not in prompt + tokens[:place])
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[tokens[place]] = math.nan
    return broken, prompt, tokens[: place + 1]


def test_logits_that_are_not_finite_end_a_text_naming_the_position(failing):
    model, prompt, sound = failing
    said = []
    with pytest.raises(NotFinite, match=f"not finite within the first {len(prompt) + len(sound)} tokens"):
        said.extend(stream_tokens(model, prompt, GREEDY))
    assert said == sound
    with pytest.raises(NotFinite, match=f"within the first {len(prompt) + len(sound)} tokens"):
        generate_tokens(model, [prompt, prompt[3:9]], GREEDY)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_logit_is_enough_and_marks_its_row_alone(bad):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    assert are_finite(logits).all()
    logits[1, 4] = bad
    assert are_finite(logits).tolist() == are_finite(logits.bfloat16()).tolist() == [True, False, True]


def test_a_prompt_whose_logits_are_not_finite_is_refused_naming_the_piece(model):
    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[7] = math.inf
    tokens = torch.full((2, 40), 9)
    prefill(broken, tokens, piece=16)
    tokens[1, 31] = 7
    with pytest.raises(NotFinite, match="within the first 32 tokens"):
        prefill(broken, tokens, piece=16)


def test_a_stop_token_does_not_hide_what_is_not_finite(failing):
    model, prompt, _ = failing
    with pytest.raises(NotFinite):  # NaN chooses 0
        list(stream_tokens(model, prompt, GREEDY, frozenset({0})))


def test_rows_that_ended_before_may_be_anything(failing):
    model, prompt, sound = failing
    assert list(stream_tokens(model, prompt, GREEDY, frozenset({sound[-1]}))) == sound[:-1]


def draws(sampling, logits, count=200):
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return set(choose(torch.tensor([logits] * count), sampling, uniforms).tolist())


LOGITS = [2.0, 1.0, 0.0, -1.0]  # probabilities 0.64, 0.24, 0.09, 0.03


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(temperature=0), {0}),
        (Sampling(top_k=1), {0}),
        (Sampling(top_k=3), {0, 1, 2}),
        (Sampling(top_k=99), {0, 1, 2, 3}),
        (Sampling(top_p=0.1), {0}),
        (Sampling(top_p=0.8), {0, 1}),
        (Sampling(top_p=0.9), {0, 1, 2}),
        (Sampling(temperature=0.05), {0}),
    ],
)
def test_which_tokens_can_be_drawn(sampling, expected):
    assert draws(sampling, LOGITS) == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(temperature=2.0)])
def test_tokens_are_drawn_in_proportion_to_their_probability(sampling):
    uniforms = (torch.arange(100_000) + 0.5) / 100_000
    counts = choose(torch.tensor([LOGITS]).expand(len(uniforms), -1), sampling, uniforms).bincount(minlength=4)
    expected = torch.tensor(LOGITS).div(sampling.temperature).softmax(-1)
    if sampling.top_k or sampling.top_p < 1:
        expected[3] = 0
    torch.testing.assert_close(counts / 100_000, expected / expected.sum(), atol=1e-4, rtol=0)


def test_the_rows_of_a_batch_are_drawn_independently():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    uniforms = torch.tensor([0.0, 0.1, 0.5, 0.9, 1 - 2**-24])
    together = choose(logits, Sampling(top_p=0.95), uniforms)
    alone = [choose(logits[row, None], Sampling(top_p=0.95), uniforms[row, None]) for row in range(5)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_a_token_without_weight_is_never_drawn():
    weights = torch.zeros(3, 1000)
    weights[:, 300] = weights[:, 301] = 0.1
    assert draw(weights, torch.tensor([0.0, 0.75, 1 - 2**-24])).tolist() == [300, 301, 301]


def test_running_sums_are_cumsum():
    weights = torch.rand(3, 1001, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(running_sums(weights), weights.cumsum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e308},
        {"temperature": 1e-320},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_tokens": 0},
    ],
)
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**wrong)
