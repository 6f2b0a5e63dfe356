"""What generates texts for a server: one thread, one text after another, by transformers' generate.

Leaves requests and answers to others: a Job goes in, its Generation hands out text as it comes. Continuous batching of
transformers pages keys and values, which a recurrent model has none of.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from radlads.inference.finite import FiniteWatch
from radlads.inference.generate import TextStream
from radlads.model.modeling import RadladsForCausalLM

MAX_BUFFERED_CHARACTERS = 65536


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
    is set. Belongs to the event loop that makes it; put and end may be called from any thread.
    """

    def __init__(self, on_end: Callable[[], None]):
        self._loop = asyncio.get_running_loop()
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
        """Stop at the model's next layer. Does nothing to a generation that has ended."""
        self.is_cancelled.set()

    def put(self, text: str, num_tokens: int = 1) -> None:
        self._loop.call_soon_threadsafe(self._add, text, num_tokens)

    def end(self, error: BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._end, error)

    def _add(self, text: str, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._waiting.append(text)
        self._num_waiting_characters += len(text)
        self._news.set()
        if self._num_waiting_characters > MAX_BUFFERED_CHARACTERS:
            self.cancel()
            self.was_dropped.set()

    def _end(self, error: BaseException | None) -> None:
        self._has_ended, self._error = True, error
        self._news.set()
        self._on_end()


class Engine:
    """Generates on a thread of its own. num_unfinished: the jobs that wait or run."""

    def __init__(self, model: RadladsForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.num_unfinished = 0
        self._thread = ThreadPoolExecutor(1, "generation")
        self._is_closed = threading.Event()
        self._running: Generation | None = None
        # Layer by layer, since a piece of a prompt takes seconds on a CPU
        self._hooks = [block.register_forward_pre_hook(self._stop_if_cancelled) for block in model.model.layers]

    def submit(self, job: Job) -> Generation:
        """Have a job done after those before it. Call it from the event loop that reads the answer."""
        self.num_unfinished += 1
        generation = Generation(self._note_end)
        self._thread.submit(self._generate, job, generation).add_done_callback(lambda done: _end(generation, done))
        return generation

    def close(self) -> None:
        """Stop what runs at the model's next layer, forget what waits, and wait for the thread to end."""
        self._is_closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        for hook in self._hooks:
            hook.remove()

    def _note_end(self) -> None:
        self.num_unfinished -= 1

    def _generate(self, job: Job, generation: Generation) -> None:
        self._running = generation
        torch.seed() if job.seed is None else torch.manual_seed(job.seed)
        tokens = torch.tensor([job.tokens], device=self.model.device)
        try:
            with FiniteWatch(self.model) as watch:
                self.model.generate(  # type: ignore[misc]
                    input_ids=tokens,
                    attention_mask=torch.ones_like(tokens),
                    generation_config=job.config,
                    tokenizer=self.tokenizer,
                    streamer=_Streamer(self.tokenizer, job, generation, watch),
                )
        finally:
            self._running = None

    def _stop_if_cancelled(self, *call: Any) -> None:
        if self._running is not None and (self._running.is_cancelled.is_set() or self._is_closed.is_set()):
            raise Stopped


class _Streamer(BaseStreamer):
    """What generate() gives each token to, after the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, job: Job, generation: Generation, watch: FiniteWatch):
        self._text = TextStream(tokenizer._tokenizer, skips_special=not job.keeps_special)
        self._generation, self._watch = generation, watch
        self._is_prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._watch.check()
        for token in tokens.tolist():
            self._generation.put(self._text.step(token))

    def end(self) -> None:
        self._generation.put(self._text.rest(), num_tokens=0)


def _end(generation: Generation, done: Future[None]) -> None:
    generation.end(Stopped() if done.cancelled() else done.exception())
