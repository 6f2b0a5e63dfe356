"""One model behind OpenAI's HTTP interface: the routes, and how a request passes from one station to the next.

A body is read up to a bound, checked and tokenised off the event loop, queued at the engine, and answered.
Import only where fastapi, openai and uvicorn are installed.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from radlads.inference.batching.answers import Generation, Job, Stopped
from radlads.inference.batching.engine import Engine
from radlads.inference.batching.metrics import CONTENT_TYPE
from radlads.inference.finite import NotFinite
from radlads.inference.openai_answers import ApiError, ChatForm, CompletionForm, Form, Reply, collect, events
from radlads.inference.openai_requests import SamplingBody, read_chat, read_completion
from radlads.model.modeling import RadladsForCausalLM

DISCONNECT_POLL_S = 0.2
BODY_S = 60
SHUTTING_DOWN = "the server is shutting down: try again later"
RETRY_S = 1
CLIENT_CLOSED_REQUEST = 499
# A body may have as many bytes as this for each token of the longest prompt, and some more for all else
BYTES_PER_TOKEN, BYTES_BESIDE = 16, 2**20


@dataclass(frozen=True)
class Limits:
    """prompt_tokens, answer_tokens: of one request. waiting: requests beyond those that run. The others: Engine's."""

    prompt_tokens: int = 1_000_000
    answer_tokens: int = 32_768
    waiting: int = 256
    max_concurrent: int | None = None
    piece_tokens: int | None = None
    state_bytes: int | None = None

    def body_bytes(self) -> int:
        return BYTES_BESIDE + BYTES_PER_TOKEN * self.prompt_tokens


@dataclass(frozen=True)
class ServedModel:
    """A model, its tokenizer and the name that clients know it by."""

    name: str
    model: RadladsForCausalLM
    tokenizer: PreTrainedTokenizerBase
    limits: Limits

    def description(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": "radlads"}


def build_app(desk: "Desk") -> FastAPI:
    """The routes: /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics."""
    served = desk.served

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.close)  # the engine's thread reports to this loop until it ends

    app = FastAPI(title="radlads", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await desk.answer(request, read_chat, ChatForm())

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await desk.answer(request, read_completion, CompletionForm())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.description()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise ApiError(404, f"there is no model {name!r} here, only {served.name!r}", code="model_not_found")
        return served.description()

    @app.get("/health")
    async def health() -> Response:
        if desk.is_ending:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(desk.metrics_text(), media_type=CONTENT_TYPE)

    return app


class Desk:
    """Takes requests to their answers. is_ending: takes no more. Raises as Engine."""

    def __init__(self, served: ServedModel):
        self.served, self.limits = served, served.limits
        self.engine = Engine(
            served.model,
            served.tokenizer,
            max_concurrent=self.limits.max_concurrent,
            piece_tokens=self.limits.piece_tokens,
            state_bytes=self.limits.state_bytes,
        )
        self.is_ending = False
        self.num_read = 0  # requests whose body or text is being read
        # One thread: a tokenizer of transformers is not to be used by several
        self._reader = ThreadPoolExecutor(1, "tokenising")

    @property
    def is_idle(self) -> bool:
        """Whether no request is read, waits or runs."""
        return self.num_read == 0 and self.engine.num_unfinished == 0

    def metrics_text(self) -> str:
        scheduler = self.engine.scheduler
        return self.engine.metrics.text(running=scheduler.num_running, waiting=scheduler.num_waiting)

    def close(self) -> None:
        """Stop what is generated, and wait for the threads to end."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

    async def answer(self, request: Request, read: Callable[[bytes], SamplingBody], form: Form) -> Response:
        """The answer to a request. Raises ApiError."""
        with ExitStack() as place:
            place.enter_context(self._place())
            content = await _body(request, self.limits.body_bytes())
            return await _while_connected(request, self._answered(content, read, form, place))

    async def _answered(
        self, content: bytes, read: Callable[[bytes], SamplingBody], form: Form, place: ExitStack
    ) -> Response:
        loop = asyncio.get_running_loop()
        body, job, reply = await loop.run_in_executor(self._reader, self._prepare, content, read)
        generation = self.engine.submit(job)
        place.close()  # from here on the engine counts it
        texts = _texts(generation, reply)
        if body.stream:
            return EventStream(generation, events(form, reply, texts))
        try:
            return JSONResponse(await collect(form, reply, texts))
        finally:
            generation.cancel()

    def _prepare(self, content: bytes, read: Callable[[bytes], SamplingBody]) -> tuple[SamplingBody, Job, Reply]:
        """A request's job. Raises ApiError for one that cannot be done."""
        body, served, model = read(content), self.served, self.served.model
        if body.model not in (None, served.name):
            sentence = f"there is no model {body.model!r} here, only {served.name!r}"
            raise ApiError(400, sentence, param="model", code="model_not_found")
        config = body.generation_config(model.generation_config, self.limits.answer_tokens, model.config.vocab_size)
        with _as_api_errors():
            tokens = body.token_ids(served.tokenizer)
            self._check_length(len(tokens))
            self.engine.check_fits(len(tokens) + config.max_new_tokens)
        parser = body.parser(served.tokenizer, model, tokens)
        reply = Reply(f"radlads-{uuid.uuid4().hex}", served.name, len(tokens), config.max_new_tokens, parser)
        return body, Job(tokens, config, body.seed, keeps_special=parser is not None), reply

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens == 0:
            raise ApiError(400, "the prompt has no tokens: give a text to continue")
        if num_tokens > (most := self.limits.prompt_tokens):
            sentence = f"the prompt has {num_tokens} tokens, but at most {most} are read: shorten it"
            raise ApiError(400, sentence, code="context_length_exceeded")

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the requests that are read, wait or run, for one to be read. ApiError if all are taken."""
        most = self.engine.scheduler.max_rows + self.limits.waiting
        is_full = self.num_read + self.engine.num_unfinished >= most
        if self.is_ending or is_full:
            self.engine.metrics.requests["refused"] += 1
        if self.is_ending:
            raise ApiError(503, SHUTTING_DOWN, code="shutting_down", retry_after_s=RETRY_S)
        if is_full:
            sentence = f"{most} requests are being answered or wait: try again later"
            raise ApiError(503, sentence, code="queue_full", retry_after_s=RETRY_S)
        self.num_read += 1
        try:
            yield
        finally:
            self.num_read -= 1


class EventStream(StreamingResponse):
    """Events sent as they come, until the client leaves or is too slow to take them."""

    def __init__(self, generation: Generation, content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(super().__call__(scope, receive, send))
        dropping = asyncio.ensure_future(self._generation.was_dropped.wait())
        try:
            await asyncio.wait({sending, dropping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._generation.cancel()
            for task in (sending, dropping):
                task.cancel()
            await asyncio.wait({sending, dropping})
        if not sending.cancelled():
            sending.result()


async def _body(request: Request, most_bytes: int) -> bytes:
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                content += part
                if len(content) > most_bytes:
                    raise ApiError(413, f"the request has more than {most_bytes} bytes: shorten it")
    except TimeoutError as error:
        raise ApiError(408, f"the request did not arrive within {BODY_S} seconds: send it again") from error
    return bytes(content)


async def _texts(generation: Generation, reply: Reply) -> AsyncIterator[str]:
    """A generation's text, its tokens counted by the reply. Raises ApiError."""
    with _as_api_errors():
        async for text in generation.texts():
            yield text
            reply.num_tokens = generation.num_tokens
        reply.num_tokens = generation.num_tokens


@contextmanager
def _as_api_errors() -> Iterator[None]:
    """Have what reading and generating raise come out as an answer.

    A model whose logits are not finite answers 422: clients of OpenAI's try again after 500 and above, which would end
    in the same way.
    """
    try:
        yield
    except NotFinite as error:
        raise ApiError(422, str(error), kind="model_error", code="not_finite") from error
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    except Stopped as error:
        raise ApiError(503, SHUTTING_DOWN) from error
    except torch.OutOfMemoryError as error:
        raise ApiError(503, "the GPU's memory is full: shorten the prompt, or try again later") from error


async def _while_connected(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """The answer, unless the client leaves before it is there: then its generation is stopped."""
    task = asyncio.ensure_future(answering)
    try:
        while not (await asyncio.wait({task}, timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected() and task.cancel():  # a finished stream ends by itself
                return Response(status_code=CLIENT_CLOSED_REQUEST)
    except asyncio.CancelledError:
        task.cancel()
        return ApiError(503, SHUTTING_DOWN).response()
    return task.result()


def _add_errors(app: FastAPI) -> None:
    """Have every error answered in OpenAI's form, in one sentence."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed: its log says more").response()
