"""A text that is asked for, and its answer as it comes: from the engine's thread to the coroutines of clients.

Knows nothing of models. Text is delivered in batches: waking an event loop for each token of each row would cost more
time than the tokens.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer
from transformers import GenerationConfig

from radlads.inference.generate import TextStream

MAX_BUFFERED_CHARACTERS = 65536
# Text waits for as long as this for more, unless it is the first or the last of its answer
DELIVERY_S = 0.02


@dataclass(frozen=True)
class Job:
    """A text to go on with. keeps_special: special tokens are part of the answer's text."""

    tokens: list[int]
    config: GenerationConfig
    seed: int | None = None
    keeps_special: bool = False


class Stopped(Exception):
    """The generation was cancelled, or the engine closed."""


class Generation:
    """One answer as it comes: the engine's thread puts text in, the client's coroutine takes it out.

    Text waits for a slow reader up to MAX_BUFFERED_CHARACTERS; beyond that the generation is cancelled and was_dropped
    is set. Belongs to the event loop that makes it, which calls add and end.
    """

    def __init__(self, on_end: Callable[[], None]):
        self.loop = asyncio.get_running_loop()
        self.began_s = time.perf_counter()
        self._on_end = on_end
        self._waiting: list[str] = []
        self._num_waiting_characters = 0
        self._news = asyncio.Event()
        self._has_ended = False
        self._error: BaseException | None = None
        self.is_cancelled = threading.Event()
        self.was_dropped = asyncio.Event()
        self.num_tokens = 0

    async def texts(self) -> AsyncIterator[str]:
        """Yield text as it comes, and raise what generating raised."""
        while True:
            await self._news.wait()
            self._news.clear()
            text, has_ended = "".join(self._waiting), self._has_ended
            self._waiting.clear()
            self._num_waiting_characters = 0
            if text:
                yield text
            if has_ended:
                break
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Stop before the next token, and within a prompt at the model's next layer. No-op after the end."""
        self.is_cancelled.set()

    def add(self, text: str, num_tokens: int) -> None:
        """Take some more text."""
        self.num_tokens += num_tokens
        self._waiting.append(text)
        self._num_waiting_characters += len(text)
        self._news.set()
        if self._num_waiting_characters > MAX_BUFFERED_CHARACTERS:
            self.cancel()
            self.was_dropped.set()

    def end(self, error: BaseException | None) -> None:
        """Take the end; error: why it came before the text was complete."""
        self._has_ended, self._error = True, error
        self._news.set()
        self._on_end()


class _News(NamedTuple):
    generation: Generation
    text: str
    num_tokens: int
    has_ended: bool
    error: BaseException | None


class Deliveries:
    """Carries text to the event loops, many texts at a time."""

    def __init__(self) -> None:
        self._news: list[_News] = []
        self._is_urgent = False
        self._last_s = 0.0

    def add(self, generation: Generation, text: str, *, is_urgent: bool) -> None:
        """Some text of one token."""
        self._news.append(_News(generation, text, 1, False, None))
        self._is_urgent |= is_urgent

    def end(self, generation: Generation, text: str = "", error: BaseException | None = None) -> None:
        """The last text, of no further token, and the end."""
        self._news.append(_News(generation, text, 0, True, error))
        self._is_urgent = True

    def send(self, *, now: bool = False) -> None:
        """Hand over what has come, if something is urgent or the last time is long enough ago."""
        if not self._news or not (now or self._is_urgent or time.perf_counter() - self._last_s > DELIVERY_S):
            return
        for loop in {news.generation.loop for news in self._news}:
            with suppress(RuntimeError):  # a loop that is closed has no readers
                loop.call_soon_threadsafe(_receive, [news for news in self._news if news.generation.loop is loop])
        self._news, self._is_urgent, self._last_s = [], False, time.perf_counter()


def _receive(arrived: Sequence[_News]) -> None:
    for news in arrived:
        news.generation.add(news.text, news.num_tokens)
        if news.has_ended:
            news.generation.end(news.error)


class AnswerText:
    """Tokens to text up to the first of the stop texts, which is part of it; has_stopped: it has come."""

    def __init__(self, tokenizer: Tokenizer, *, keeps_special: bool, stops: Sequence[str]):
        self._stream = TextStream(tokenizer, skips_special=not keeps_special)
        self._stops = stops
        self._tail = ""  # as much as may be the beginning of a stop text
        self.has_stopped = False

    def step(self, token: int) -> str:
        """What a token adds to the text."""
        return self._until_stop(self._stream.step(token))

    def rest(self) -> str:
        """What is missing after the last token."""
        return "" if self.has_stopped else self._until_stop(self._stream.rest())

    def _until_stop(self, piece: str) -> str:
        if not self._stops or not piece:
            return piece
        text = self._tail + piece
        ends = [place + len(stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.has_stopped = True
            return text[len(self._tail) : min(ends)]
        longest = max(map(len, self._stops))
        self._tail = text[-(longest - 1) :] if longest > 1 else ""
        return piece
