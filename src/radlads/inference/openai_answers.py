"""What clients get: errors, whole answers and streams in the forms of OpenAI's API. Needs fastapi.

Answers are made of items: text, reasoning, and calls of tools, which transformers' parser tells apart where a tokenizer
brings a response template. A streamed answer and the same one not streamed are made of the same items.
"""

import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks
from transformers.utils.chat_parsing import ResponseParser

Item = str | ReasoningText | ToolCall


class ApiError(Exception):
    """An answer that is an error. param: the field of the request that is to blame. kind: what OpenAI calls type.
    retry_after_s: when to ask again, in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)

    def event(self) -> str:
        """As the last event of a stream, whose status is sent long since."""
        return _event(self.content)


@dataclass
class Reply:
    """One answer while it comes. parser: of texts that are more than text."""

    request_id: str
    model: str
    num_prompt_tokens: int
    max_tokens: int
    parser: ResponseParser | None = None
    num_tokens: int = 0
    items: list[Item] = field(default_factory=list)

    def first(self) -> Iterator[Item]:
        """What the answer holds before its first token: reasoning that the prompt has begun."""
        yield from self._parsed(self.parser.initial_events if self.parser else [])

    def add(self, text: str) -> Iterator[Item]:
        """The items of some more text."""
        yield from self._parsed(self.parser.feed(text)) if self.parser else self._kept([text])

    def last(self) -> Iterator[Item]:
        """The items that only the end completes."""
        try:
            events = self.parser.finalize()[1] if self.parser else []
        except (ValueError, RuntimeError):  # the text ended within a call
            events = []
        yield from self._parsed(events)

    def finish_reason(self) -> str:
        if any(isinstance(item, ToolCall) for item in self.items):
            return "tool_calls"
        return "length" if self.num_tokens >= self.max_tokens else "stop"

    def usage(self) -> dict[str, int]:
        return {
            "completion_tokens": self.num_tokens,
            "prompt_tokens": self.num_prompt_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": int(time.time()), "model": self.model}

    def _parsed(self, events: list[dict[str, Any]]) -> Iterator[Item]:
        return self._kept(response_events_to_chunks(events))

    def _kept(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            self.items.append(item)
            yield item


class CompletionForm:
    """/v1/completions."""

    def whole(self, reply: Reply) -> dict[str, Any]:
        choice = {"text": _text(reply.items, str), "index": 0, "finish_reason": reply.finish_reason()}
        return reply.head("text_completion") | {"choices": [choice], "usage": reply.usage()}

    def opening(self, reply: Reply) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunk(self, reply: Reply, item: Item) -> dict[str, Any]:
        return reply.head("text_completion") | {"choices": [{"text": item, "index": 0}]}

    def closing(self, reply: Reply) -> dict[str, Any]:
        choice = {"text": "", "index": 0, "finish_reason": reply.finish_reason()}
        return reply.head("text_completion") | {"choices": [choice], "usage": reply.usage()}


class ChatForm:
    """/v1/chat/completions."""

    def whole(self, reply: Reply) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _text(reply.items, str)}
        if any(isinstance(item, ReasoningText) for item in reply.items):
            message["reasoning_content"] = _text(reply.items, ReasoningText)
        if calls := [item for item in reply.items if isinstance(item, ToolCall)]:
            message["tool_calls"] = [_call(reply, number, call) for number, call in enumerate(calls)]
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason()}
        return reply.head("chat.completion") | {"choices": [choice], "usage": reply.usage()}

    def opening(self, reply: Reply) -> Iterator[dict[str, Any]]:
        yield self._chunk(reply, {"role": "assistant"})

    def chunk(self, reply: Reply, item: Item) -> dict[str, Any]:
        if isinstance(item, ToolCall):
            number = sum(isinstance(each, ToolCall) for each in reply.items) - 1
            return self._chunk(reply, {"tool_calls": [{"index": number} | _call(reply, number, item)]})
        return self._chunk(reply, {"reasoning_content" if isinstance(item, ReasoningText) else "content": item})

    def closing(self, reply: Reply) -> dict[str, Any]:
        return self._chunk(reply, {}, finish_reason=reply.finish_reason()) | {"usage": reply.usage()}

    def _chunk(self, reply: Reply, delta: dict[str, Any], **keys: str) -> dict[str, Any]:
        choices = [{"delta": delta, "index": 0} | keys]
        return reply.head("chat.completion.chunk") | {"choices": choices, "system_fingerprint": ""}


Form = CompletionForm | ChatForm


async def collect(form: Form, reply: Reply, texts: AsyncIterator[str]) -> dict[str, Any]:
    """The whole answer, once it is there."""
    async for _ in _items(reply, texts):
        pass
    return form.whole(reply)


async def events(form: Form, reply: Reply, texts: AsyncIterator[str]) -> AsyncIterator[str]:
    """The answer as server-sent events, as it comes. An ApiError within becomes the last event."""
    for chunk in form.opening(reply):
        yield _event(chunk)
    try:
        async for item in _items(reply, texts):
            yield _event(form.chunk(reply, item))
    except ApiError as error:
        yield error.event()
        return
    yield _event(form.closing(reply))
    yield "data: [DONE]\n\n"


async def _items(reply: Reply, texts: AsyncIterator[str]) -> AsyncIterator[Item]:
    for item in reply.first():
        yield item
    async for text in texts:
        for item in reply.add(text):
            yield item
    for item in reply.last():
        yield item


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _text(items: list[Item], kind: type[str]) -> str:
    """The text that is of this very kind: reasoning is a str too."""
    return "".join(item for item in items if isinstance(item, str) and type(item) is kind)


def _call(reply: Reply, number: int, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"type": "function", "id": f"{reply.request_id}_tool_call_{number}", "function": function}
