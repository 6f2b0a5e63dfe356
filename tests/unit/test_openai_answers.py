"""Answers of more than text: reasoning and calls of tools are told apart alike, streamed and not."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi")
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import ResponseParser

from radlads.inference.openai_answers import ApiError, ChatForm, CompletionForm, Reply, collect, events

QWEN = next(template for names, template in _RESPONSE_TEMPLATE_FALLBACKS.items() if "qwen3" in names)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TEXTS = ["<think>", "wh", "y</think>so", " be it ", CALL[:20], CALL[20:], "<|im_end|>"]


def reply(parser=None):
    return Reply("id", "tiny", num_prompt_tokens=3, max_tokens=5, parser=parser, num_tokens=4)


def parser():
    return ResponseParser(QWEN, prefix="<|im_start|>assistant\n")


async def texts_of(texts):
    for text in texts:
        if isinstance(text, Exception):
            raise text
        yield text


def whole(form, made, texts):
    return asyncio.run(collect(form, made, texts_of(texts)))


def streamed(form, made, texts):
    async def go():
        return [event async for event in events(form, made, texts_of(texts))]

    return [event.removeprefix("data: ").strip() for event in asyncio.run(go())]


def test_reasoning_text_and_calls_are_the_same_streamed_and_not():
    choice = whole(ChatForm(), reply(parser()), TEXTS)["choices"][0]
    *chunks, done = streamed(ChatForm(), reply(parser()), TEXTS)
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    joined = {key: "".join(delta.get(key, "") for delta in deltas) for key in ("content", "reasoning_content")}
    assert joined == {key: choice["message"][key] for key in joined}
    assert joined["reasoning_content"] == "why" and joined["content"].strip() == "so be it"
    (call,) = choice["message"]["tool_calls"]
    (same,) = [each for delta in deltas for each in delta.get("tool_calls", [])]
    assert same == {"index": 0} | call and json.loads(call["function"]["arguments"]) == {"x": 1}
    assert choice["finish_reason"] == json.loads(chunks[-1])["choices"][0]["finish_reason"] == "tool_calls"
    assert done == "[DONE]"


def test_a_text_that_ends_within_a_call_is_an_answer_without_it():
    message = whole(ChatForm(), reply(parser()), TEXTS[:5])["choices"][0]["message"]
    assert "tool_calls" not in message and message["reasoning_content"] == "why"


@pytest.mark.parametrize("form", [ChatForm(), CompletionForm()])
def test_an_error_within_a_stream_is_its_last_event(form):
    error = ApiError(422, 'a "quoted"\nsentence', kind="model_error", code="not_finite")
    last = json.loads(streamed(form, reply(), ["a", error])[-1])
    assert last == error.content and last["error"]["message"] == 'a "quoted"\nsentence'
