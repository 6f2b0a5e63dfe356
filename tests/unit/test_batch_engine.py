"""The engine without HTTP: many texts at a time, each what it is alone, and none at the others' cost."""

import asyncio
import math
import threading
from contextlib import contextmanager

import pytest
import tiny
import torch
from transformers import GenerationConfig

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model
from radlads.convert.hf_source import open_teacher, open_tokenizer
from radlads.convert.student import build_student
from radlads.inference.batching.answers import AnswerText, Job, Stopped
from radlads.inference.batching.engine import Engine
from radlads.inference.batching.scheduler import TooLarge
from radlads.inference.finite import NotFinite
from radlads.inference.generate import Sampling, generate_tokens

ENOUGH_S = 30
BAD_TOKEN = 255
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 7, 7, 7, 160, 300, 4]
PROMPTS = [[(11 * number + 5 * place) % 80 for place in range(length)] for number, length in enumerate(LENGTHS)]
MAX_TOKENS = [5 + 3 * number % 40 for number in range(16)]


def model_of(teacher, folder, **overrides):
    torch.manual_seed(0)
    student, _ = build_student(open_teacher(teacher), tiny.stage_config(folder, "align", **overrides).model)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    student.lm_head.weight.data[256] = 0
    export(student, teacher, folder / "hf")
    model = load_model(folder / "hf")
    model.model.embed_tokens.weight.data[BAD_TOKEN] = math.nan
    model.generation_config = GenerationConfig(eos_token_id=256, suppress_tokens=[*range(BAD_TOKEN, tiny.VOCAB)])
    return model, open_tokenizer(folder / "hf", tiny.VOCAB)


STACKS = {
    "recurrent": {},
    "windows": {"model.mixer.window_tokens": 9, "model.mixer.sink_tokens": 3},
    "softmax": {"model.softmax_layers": "last:1"},
}


@pytest.fixture(scope="module", params=STACKS)
def stack(request, teacher, tmp_path_factory):
    return model_of(teacher, tmp_path_factory.mktemp("engine"), **STACKS[request.param])


@pytest.fixture(scope="module")
def recurrent(teacher, tmp_path_factory):
    return model_of(teacher, tmp_path_factory.mktemp("recurrent"))


@contextmanager
def engine_of(model, **options):
    engine = Engine(*model, **({"max_concurrent": 16, "piece_tokens": 32, "state_bytes": 10**9} | options))
    try:
        yield engine
    finally:
        engine.close()


def job(tokens, num_tokens, **keys):
    seed = keys.pop("seed", None)
    config = GenerationConfig(eos_token_id=256, max_new_tokens=num_tokens, **keys)
    return Job(tokens, config, seed)


async def text_of(generation):
    return "".join([text async for text in generation.texts()])


def answers(engine, jobs):
    """The texts of jobs that come at the same time, or what they raise."""

    async def go():
        generations = [engine.submit(each) for each in jobs]
        return await asyncio.gather(*map(text_of, generations), return_exceptions=True)

    return asyncio.run(asyncio.wait_for(go(), ENOUGH_S))


def greedy(model, prompt, num_tokens):
    """The text that the decoder gives for a prompt by itself."""
    sampling = Sampling(temperature=0, max_tokens=num_tokens, num_ids=BAD_TOKEN)
    (tokens,) = generate_tokens(model[0], [prompt], sampling)
    return model[1].decode(tokens, skip_special_tokens=True)


def test_sixteen_texts_together_are_each_what_they_are_alone(stack):
    with engine_of(stack) as engine:
        found = answers(engine, [job(*each) for each in zip(PROMPTS, MAX_TOKENS, strict=True)])
    assert found == [greedy(stack, *each) for each in zip(PROMPTS, MAX_TOKENS, strict=True)]
    assert len(set(found)) > 12


def test_texts_that_find_no_row_wait_for_one(recurrent):
    with engine_of(recurrent, max_concurrent=3) as engine:
        found = answers(engine, [job(*each) for each in zip(PROMPTS, MAX_TOKENS, strict=True)])
    assert found == [greedy(recurrent, *each) for each in zip(PROMPTS, MAX_TOKENS, strict=True)]


def test_seeds_repeat_texts_whoever_else_is_answered(recurrent):
    kinds = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1, "repetition_penalty": 1.3}]
    jobs = [job(PROMPTS[9], 30, do_sample=True, seed=number, **keys) for number, keys in enumerate(kinds)]
    with engine_of(recurrent) as engine:
        alone = [answers(engine, [each])[0] for each in jobs]
        others = [job(prompt, 20, do_sample=True) for prompt in PROMPTS[:8]]
        assert answers(engine, [*others, *jobs])[8:] == alone
    assert len(set(alone)) == 4


@pytest.mark.parametrize("bad", [[3, BAD_TOKEN, 4], [3] * 40 + [BAD_TOKEN] + [3] * 40])
def test_a_row_that_is_not_finite_ends_alone(stack, bad):
    with engine_of(stack) as engine:
        broken, *found = answers(engine, [job(bad, 20), *(job(prompt, 20) for prompt in PROMPTS[4:7])])
        assert engine.metrics.requests["error"] == 1 and engine.metrics.requests["length"] == 3
    assert isinstance(broken, NotFinite) and f"within the first {len(bad)} tokens" in str(broken)
    assert found == [greedy(stack, prompt, 20) for prompt in PROMPTS[4:7]]


def test_logits_that_are_not_finite_within_a_prompt_are_not_forgotten_at_its_end(recurrent, monkeypatch):
    model, forward = recurrent[0], recurrent[0].forward

    def overflowing(tokens, *arguments, **keys):
        outputs = forward(tokens, *arguments, **keys)
        if 77 in tokens:
            outputs.logits.fill_(math.inf)
        return outputs

    monkeypatch.setattr(model, "forward", overflowing)
    with engine_of(recurrent, piece_tokens=8) as engine:
        (error,) = answers(engine, [job([3] * 5 + [77] + [3] * 30, 10)])
    assert isinstance(error, NotFinite)


def test_an_error_while_a_prompt_is_read_is_that_request_s_alone(recurrent, monkeypatch):
    model, forward = recurrent[0], recurrent[0].forward

    def short_of_memory(tokens, *arguments, **keys):
        if 77 in tokens:
            raise torch.OutOfMemoryError
        return forward(tokens, *arguments, **keys)

    monkeypatch.setattr(model, "forward", short_of_memory)
    with engine_of(recurrent, piece_tokens=8) as engine:
        failed, found = answers(engine, [job([77] * 12, 10), job(PROMPTS[5], 10)])
    monkeypatch.undo()
    assert isinstance(failed, torch.OutOfMemoryError) and found == greedy(recurrent, PROMPTS[5], 10)


def test_between_two_pieces_of_a_long_prompt_the_others_take_a_step_and_short_ones_begin(recurrent):
    with engine_of(recurrent, piece_tokens=16) as engine:
        events, begun, steps, read = [], threading.Event(), engine._slots.step, engine._read_together

        def step(tokens):
            events.append("step")
            begun.set()
            return steps(tokens)

        def note_read(group):
            events.append("long" if len(group[0].name.job.tokens) > 300 else "short")
            read(group)

        engine._slots.step, engine._read_together = step, note_read

        async def go():
            decoding = asyncio.ensure_future(text_of(engine.submit(job(PROMPTS[3], 120))))
            assert await asyncio.to_thread(begun.wait, ENOUGH_S)
            long = asyncio.ensure_future(text_of(engine.submit(job([5] * 640, 2))))
            short = await text_of(engine.submit(job(PROMPTS[6], 2)))
            assert not long.done()
            return short, await long, await decoding

        short, _, _ = asyncio.run(asyncio.wait_for(go(), ENOUGH_S))
    assert short == greedy(recurrent, PROMPTS[6], 2)
    first = events.index("long")
    last = len(events) - 1 - events[::-1].index("long")
    assert events.count("long") >= 40 and "short" in events[first : first + 8]
    assert all("step" in events[place : place + 3] for place in range(first, last - 2))


def test_cancelled_texts_give_their_rows_back_wherever_they_are(recurrent):
    with engine_of(recurrent, max_concurrent=2, piece_tokens=4) as engine:

        async def go():
            decoded, read, waits = (engine.submit(job(tokens, 10**6)) for tokens in ([5], [5] * 10**5, [6]))
            await anext(decoded.texts())
            for each in (waits, read, decoded):
                each.cancel()
            errors = await asyncio.gather(*map(text_of, (decoded, read, waits)), return_exceptions=True)
            assert [type(error) for error in errors] == [Stopped] * 3
            return await text_of(engine.submit(job(PROMPTS[4], 9)))

        assert asyncio.run(asyncio.wait_for(go(), ENOUGH_S)) == greedy(recurrent, PROMPTS[4], 9)
        assert engine.num_unfinished == 0 and engine.scheduler.names() == []
        assert engine.metrics.requests["cancelled"] == 3 and engine.metrics.num_prompt_tokens < 10**5


def test_softmax_states_wait_for_memory_and_are_refused_if_they_never_fit(teacher, tmp_path):
    model = model_of(teacher, tmp_path, **STACKS["softmax"])
    with engine_of(model, state_bytes=100_000) as engine:
        running, most = [], engine.scheduler.admit

        def admit():
            admitted = most()
            running.append(engine.scheduler.num_running)
            return admitted

        engine.scheduler.admit = admit
        found = answers(engine, [job(prompt, 60) for prompt in PROMPTS[:6]])
        assert found == [greedy(model, prompt, 60) for prompt in PROMPTS[:6]]
        assert 1 <= max(running) < 6
        with pytest.raises(TooLarge, match="--state-memory"):
            engine.check_fits(10**5)


def test_states_that_do_not_fit_are_refused_with_a_remedy_and_the_default_is_what_fits(recurrent):
    with pytest.raises(ValueError, match=r"one request needs .* GB of state.*give a larger --state-memory"):
        Engine(*recurrent, state_bytes=10)
    with pytest.raises(ValueError, match=r"40 requests need .* or a smaller --max-concurrent"):
        Engine(*recurrent, state_bytes=2 * 10**5, max_concurrent=40)
    assert 1 <= Engine(*recurrent, state_bytes=2 * 10**5).scheduler.max_rows < 16


@pytest.mark.parametrize("stops", [["cd"], ["zz", "d", "cd"], ["bcd", "e"]])
def test_a_text_ends_right_after_the_first_stop_text_however_tokens_fall(recurrent, stops):
    text = AnswerText(recurrent[1]._tokenizer, keeps_special=False, stops=stops)
    pieces = [text.step(recurrent[1].convert_tokens_to_ids(character)) for character in "abc"]
    assert not text.has_stopped
    pieces.append(text._until_stop("def"))  # a token of three characters
    assert "".join([*pieces, text.rest()]) == "abcd" and text.has_stopped
