"""One model behind OpenAI's HTTP interface: transformers' own handlers of chats and completions, with one model.

Ours are the routes, the checks of a request, and errors in OpenAI's form. Generation is transformers' generate, one
request after another on one thread: its continuous batching pages keys and values, which a recurrent model has none of.
Import only where fastapi, openai and uvicorn are installed.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from radlads.inference.generate import check_memory
from radlads.model.modeling import RadladsForCausalLM

DISCONNECT_POLL_S = 0.2
CLIENT_CLOSED_REQUEST = 499


def _encodable(text: str) -> str:
    text.encode("utf-8")  # JSON may hold half a character, and pydantic lets it pass
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class TextPart(BaseModel):
    """A part of a message; images and sounds are refused rather than left out."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Text
    content: Text | list[TextPart] | None = None


class SamplingBody(BaseModel):
    """What chats and completions share. Further fields are passed on, for transformers to accept or to refuse."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    n: Literal[1] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None

    def fields(self) -> dict[str, Any]:
        """The request as transformers' handlers take it."""
        return self.model_dump(exclude_unset=True)


class ChatBody(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def fields(self) -> dict[str, Any]:
        fields = super().fields()
        tokens = fields.pop("max_completion_tokens", None)  # transformers before 5.18 does not know it
        return fields if tokens is None else fields | {"max_tokens": tokens}


class CompletionBody(SamplingBody):
    prompt: Annotated[Text, Field(min_length=1)]


@dataclass(frozen=True)
class ServedModel:
    """A model, its tokenizer and the name that clients know it by. Stands where transformers' ModelManager does."""

    force_model: str
    model: RadladsForCausalLM
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str, **kwargs: Any) -> tuple[RadladsForCausalLM, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    def get_model_modality(self, model: RadladsForCausalLM, processor: PreTrainedTokenizerBase) -> Modality:
        return Modality.LLM

    def description(self) -> dict[str, Any]:
        return {"id": self.force_model, "object": "model", "created": int(time.time()), "owned_by": "radlads"}


class _Cancelled(Exception):
    """Raised inside generate() for a client that has gone."""


class _Watch:
    """A streamer that keeps nothing: it only stops generate() once it is told to."""

    def __init__(self) -> None:
        self.is_cancelled = threading.Event()

    def put(self, tokens: Any) -> None:
        if self.is_cancelled.is_set():
            raise _Cancelled

    def end(self) -> None:
        pass


class _Generation(GenerateManager):
    """transformers' sequential generation, which refuses prompts that are too long and stops for clients that left."""

    def __init__(self, max_prompt_tokens: int):
        super().__init__()
        self.max_prompt_tokens = max_prompt_tokens

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        self._check(model, inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        self._check(model, inputs, gen_config)
        watch = _Watch()

        def generated() -> Any:
            try:
                sequences = model.generate(**inputs, generation_config=gen_config, tokenizer=processor, streamer=watch)
            except _Cancelled:
                return None
            return sequences[0, inputs["input_ids"].shape[-1] :]

        try:  # shielded, since the inference thread sets a result whether or not anybody waits for it
            token_ids = await asyncio.shield(self.async_submit(generated))
        except asyncio.CancelledError:
            watch.is_cancelled.set()
            raise
        return processor.decode(token_ids, skip_special_tokens=True), inputs["input_ids"].shape[-1], token_ids

    def _check(self, model: RadladsForCausalLM, inputs: Any, gen_config: GenerationConfig) -> None:
        num_tokens = inputs["input_ids"].shape[-1]
        if num_tokens == 0:
            raise HTTPException(400, "the prompt has no tokens: give a text to continue")
        if num_tokens > self.max_prompt_tokens:
            raise HTTPException(
                400, f"the prompt has {num_tokens} tokens, but at most {self.max_prompt_tokens} are read: shorten it"
            )
        check_memory(model.config, num_tokens + (gen_config.max_new_tokens or 0), model.device)


class _OneManager(GenerationState):
    """The same generation manager, and so the same thread, for every request."""

    def __init__(self, manager: _Generation):
        super().__init__()
        self.manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> _Generation:
        return self.manager


class _SamplesWhenWarm:
    """A temperature above 0 means sampling, whatever the model's own generation_config.json says."""

    def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> GenerationConfig:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if body.get("temperature"):
            config.do_sample = True
        return config


class _Chats(_SamplesWhenWarm, ChatCompletionHandler):
    pass


class _Completions(_SamplesWhenWarm, CompletionHandler):
    pass


def build_app(served: ServedModel) -> FastAPI:
    """The routes: /v1/chat/completions, /v1/completions, /v1/models and /health."""
    generation = _Generation(served.max_prompt_tokens)
    state = _OneManager(generation)
    chats, completions = _Chats(served, state), _Completions(served, state)  # type: ignore[arg-type]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # The inference thread reports to this loop: let it see that its requests are cancelled before the loop closes
        await generation.async_submit(lambda: None)

    app = FastAPI(title="radlads", lifespan=lifespan)
    _add_errors(app)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        if not served.tokenizer.chat_template:
            raise HTTPException(400, "this model has no chat template: use /v1/completions")
        return await _while_connected(request, chats.handle_request(body.fields(), _request_id()))

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody) -> Response:
        return await _while_connected(request, completions.handle_request(body.fields(), _request_id()))

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.description()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        if name != served.force_model:
            raise HTTPException(404, f"there is no model {name!r} here, only {served.force_model!r}")
        return served.description()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def _request_id() -> str:
    return f"radlads-{uuid.uuid4().hex}"


async def _while_connected(request: Request, answering: Awaitable[Response]) -> Response:
    """The answer, unless the client leaves before it is there: then its generation is stopped."""
    task = asyncio.ensure_future(answering)
    try:
        while not (await asyncio.wait({task}, timeout=DISCONNECT_POLL_S))[0]:
            if await request.is_disconnected():
                task.cancel()
                return Response(status_code=CLIENT_CLOSED_REQUEST)
    except asyncio.CancelledError:
        task.cancel()
        return _error(503, "the server is shutting down")
    return task.result()


def _add_errors(app: FastAPI) -> None:
    """Have errors of a request answered in OpenAI's form, in one sentence."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            return _error(400, "the request is not JSON")
        return _error(400, f"{where}: {first['msg']}" if where else first["msg"])

    @app.exception_handler(ValueError)
    async def impossible(request: Request, error: ValueError) -> Response:
        return _error(400, str(error))

    @app.exception_handler(TemplateError)
    async def unrenderable(request: Request, error: TemplateError) -> Response:
        return _error(400, f"the chat template refuses these messages: {error}")


def _error(status: int, message: str) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
