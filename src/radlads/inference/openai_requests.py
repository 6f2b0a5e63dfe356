"""What clients may ask for: the bodies of chats and completions, and what becomes of them. Needs fastapi and openai.

Every mistake is an ApiError with status 400 that names the field. A field that OpenAI knows and this server has no use
for is taken and ignored; one that nobody knows is a mistake.
"""

import copy
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionParams
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.utils import build_response_parser
from transformers.utils.chat_parsing import ResponseParser

from radlads.inference.chat_template import template_errors_named
from radlads.inference.openai_answers import ApiError
from radlads.inference.sampling import MAX_SEED, TEMPERATURES, is_temperature
from radlads.model.modeling import RadladsForCausalLM

DEFAULT_TOKENS = 1024
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
# Arguments of the call that renders a template; a client's own template would be code to run here
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


def _without_fraction(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _checked(is_right: Callable[[Any], bool], sentence: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError(sentence)
        return value

    return AfterValidator(check)


def _is_tool(tool: dict[str, Any]) -> bool:
    function = tool.get("function")
    return tool.get("type") == "function" and isinstance(function, dict) and isinstance(function.get("name"), str)


def _is_call(call: dict[str, Any]) -> bool:
    function = call.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str) and _is_object(function)


def _is_object(function: dict[str, Any]) -> bool:
    """Whether the arguments are an object, or one as JSON."""
    arguments = function.get("arguments")
    try:
        return isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)
    except (json.JSONDecodeError, RecursionError):
        return False


Body = TypeVar("Body", bound="SamplingBody")
Whole = Annotated[int, BeforeValidator(_without_fraction)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Tokens = Annotated[Whole, Field(ge=1, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[Number, Field(ge=-100, le=100)]
Tool = Annotated[dict[str, Any], _checked(_is_tool, 'give {"type": "function", "function": {"name": ..., ...}}')]
Call = Annotated[
    dict[str, Any],
    _checked(_is_call, 'give {"function": {"name": ..., "arguments": "..."}}, arguments being an object'),
]


class TextPart(BaseModel):
    """A part of a message; images and sounds are refused rather than left out."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class ChatMessage(BaseModel):
    """Further fields are ignored."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As transformers gives messages to templates: a call's arguments as an object, and no text beside calls."""
        if self.tool_calls is None:
            parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
            message: dict[str, Any] = {"role": self.role, "content": " ".join(parts)}
        else:
            message = {"role": self.role, "content": "", "tool_calls": [_with_object(call) for call in self.tool_calls]}
        return message if self.tool_call_id is None else message | {"tool_call_id": self.tool_call_id}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    return call | {
        "function": call["function"] | {"arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}
    }


class SamplingBody(BaseModel):
    """What chats and completions share. The last fields are checked and ignored."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool | None = None
    n: Annotated[Whole, Field(ge=1, le=1)] | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[Number, _checked(is_temperature, f"must be {TEMPERATURES}")] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    frequency_penalty: Annotated[Number, Field(gt=-1, le=2)] | None = None
    logit_bias: dict[str, Bias] | None = None

    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    def bound(self) -> tuple[str, int | None]:
        """The field that bounds the answer, and by how many tokens, if it does."""
        return "max_tokens", self.max_tokens

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens to go on from."""
        raise NotImplementedError

    def parser(
        self, tokenizer: PreTrainedTokenizerBase, model: RadladsForCausalLM, token_ids: list[int]
    ) -> ResponseParser | None:
        """What tells reasoning and calls of tools from text, if the tokenizer says how."""
        return None

    def generation_config(self, base: GenerationConfig, limit: int, vocab_size: int) -> GenerationConfig:
        """The model's own generation_config with what the request changes; at most `limit` tokens."""
        config = copy.deepcopy(base)
        name, wanted = self.bound()
        if wanted is not None and wanted > limit:
            raise ApiError(400, f"{name}: at most {limit} tokens are generated here, not {wanted}", param=name)
        config.max_new_tokens = wanted or min(limit, max(DEFAULT_TOKENS, config.max_new_tokens or 0))
        if self.temperature is not None:
            config.temperature, config.do_sample = self.temperature, self.temperature > 0
        if self.top_p is not None:
            config.top_p = self.top_p
        if self.frequency_penalty is not None:
            config.repetition_penalty = 1.0 + self.frequency_penalty
        if self.stop:
            config.stop_strings = self.stop
        if self.logit_bias:
            config.sequence_bias = {(_token_id(key, vocab_size),): bias for key, bias in self.logit_bias.items()}
        return config


class ChatBody(SamplingBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    parallel_tool_calls: bool | None = None

    def bound(self) -> tuple[str, int | None]:
        new_name = "max_completion_tokens", self.max_completion_tokens
        return super().bound() if self.max_completion_tokens is None else new_name

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Raises ValueError if the template fails."""
        if not tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions")
        keys = self.chat_template_kwargs or {}
        if taken := sorted(_RESERVED & keys.keys()):
            sentence = f"chat_template_kwargs: {taken[0]} is not the template's to take: leave it out"
            raise ApiError(400, sentence, param="chat_template_kwargs")
        messages = [message.for_template() for message in self.messages]
        with template_errors_named("of this model"):
            encoded: Any = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tools=self.tools,  # type: ignore[arg-type]
                return_dict=True,
                **keys,
            )
        return list(encoded["input_ids"])

    def parser(
        self, tokenizer: PreTrainedTokenizerBase, model: RadladsForCausalLM, token_ids: list[int]
    ) -> ResponseParser | None:
        parser: ResponseParser | None = build_response_parser(tokenizer, model, token_ids, tools=self.tools)
        return parser


class CompletionBody(SamplingBody):
    prompt: Annotated[str, Field(min_length=1)]

    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[Whole, Field(ge=1, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return list(tokenizer(self.prompt)["input_ids"])


def read_chat(content: bytes) -> ChatBody:
    """A chat's body, checked. Raises ApiError."""
    return _read(ChatBody, content, frozenset(ChatParams.__annotations__))


def read_completion(content: bytes) -> CompletionBody:
    """A completion's body, checked. Raises ApiError."""
    return _read(CompletionBody, content, frozenset(CompletionParams.__annotations__))


def _read(kind: type[Body], content: bytes, known: frozenset[str]) -> Body:
    try:
        body = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the request is not JSON: {first['msg']}") from error
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        param = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(400, f"{where}: {message}" if where else message, param=param) from error
    if unknown := sorted((body.model_extra or {}).keys() - known):
        raise ApiError(400, f"{unknown[0]}: no such field is taken here: leave it out", param=unknown[0])
    return body


def _token_id(key: str, vocab_size: int) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
        raise ApiError(400, f"logit_bias: {key!r} is no token: give ids below {vocab_size}", param="logit_bias")
    return int(key)
