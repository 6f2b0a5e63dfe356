"""Streaming generation: the same tokens as transformers' generate, sampling rules, refusals."""

import pytest
import tiny
import torch

from radlads.convert.hf_source import load_tokenizer, open_teacher
from radlads.convert.student import build_student
from radlads.inference import generate
from radlads.inference.generate import Sampling, choose, prefill, stream_text, stream_tokens

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


def draws(sampling, logits, count=200):
    generator = torch.Generator().manual_seed(0)
    return {choose(torch.tensor(logits), sampling, generator) for _ in range(count)}


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


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_tokens": 0}])
def test_sampling_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**wrong)
