"""The server's routes in this process: mistakes of clients, bounds, streams; without any socket."""

import asyncio
import itertools
import json
import math
import threading
import time
from dataclasses import replace

import pytest
import tiny

from radlads.checkpoint.model_folder import load_model
from radlads.convert.hf_source import open_tokenizer

httpx = pytest.importorskip("httpx")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

from radlads.inference import openai_api, serve  # noqa: E402
from radlads.inference.batching import answers  # noqa: E402
from radlads.inference.batching.answers import Job, Stopped  # noqa: E402
from radlads.inference.batching.engine import Engine  # noqa: E402
from radlads.inference.openai_api import Desk, Limits, ServedModel, build_app  # noqa: E402

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{% endfor %}{{ tools }}"
LIMITS = Limits(prompt_tokens=3000, answer_tokens=400, waiting=2, max_concurrent=2, state_bytes=10**9)
BAD_TOKEN = ord("~") - 33  # of the byte-level alphabet
ENOUGH_S = 30


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    return tiny.endless_export(teacher, tmp_path_factory.mktemp("api"), TEMPLATE)


@pytest.fixture(scope="module")
def served(folder):
    model = load_model(folder)
    model.model.embed_tokens.weight.data[BAD_TOKEN] = math.nan
    tokenizer = open_tokenizer(folder, tiny.VOCAB)
    assert tokenizer("~")["input_ids"] == [BAD_TOKEN]
    model.generation_config = serve.generation_config(folder, model, tokenizer)
    model.generation_config.suppress_tokens.append(BAD_TOKEN)
    return ServedModel("tiny", model, tokenizer, LIMITS)


@pytest.fixture(scope="module")
def config_of(served):
    """The generation config of a completion with these keys."""
    return lambda **keys: openai_api.read_completion(body(**keys)).generation_config(
        served.model.generation_config, LIMITS.answer_tokens, tiny.VOCAB
    )


@pytest.fixture(scope="module")
def app(served):
    return build_app(Desk(served))


def asked(app, *requests):
    """The responses to requests (method, path, content, headers), which come at the same time."""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=ENOUGH_S) as client:
            sent = [client.request(way, path, content=c, headers=h) for way, path, c, h in requests]
            return await asyncio.gather(*sent)

    return asyncio.run(ask())


def posted(app, path, content):
    (response,) = asked(app, ("POST", path, content, {}))
    return response


def body(**keys):
    return json.dumps({"prompt": "Hi", "max_tokens": 1} | keys).encode()


def error_of(response):
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert response.json().keys() == {"error"} and error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["message"].count("\n") == 0
    return error


NO_NUMBER = ["true", '"1"', "[]", "{}", "NaN", "Infinity", "1e400", "-1e308"]
NO_COUNT = [*NO_NUMBER, "1.5", "-1", "1e308", "0"]
NO_TEXT = ["5", "true", "[]", "{}", '"\\ud800"']
NO_FLAG = ["5", '"yes"', "[]", "{}"]
NO_OBJECT = ["5", "true", '"x"', "[]"]
BOTH = {
    "temperature": [*NO_NUMBER, "1e308", "1e-320", "-1", "1e7", "1e-7"],
    "top_p": [*NO_NUMBER, "0", "1.1"],
    "max_tokens": NO_COUNT,
    "n": [*NO_COUNT, "2"],
    "seed": [*NO_NUMBER, "1e19", "1.5"],
    "stop": ["5", "{}", '""', "[5]", '[""]', "[null]", json.dumps(["a"] * 17), json.dumps("a" * 257)],
    "frequency_penalty": [*NO_NUMBER, "-1", "3"],
    "presence_penalty": [*NO_NUMBER, "3"],
    "logit_bias": [*NO_OBJECT, '{"a": 1}', '{"-1": 1}', '{"260": 1}', '{"5": 101}', '{"5": "x"}', '{"5": NaN}'],
    "model": [*NO_TEXT, '"gpt-5"'],
    "stream": NO_FLAG,
    "stream_options": NO_OBJECT,
    "user": NO_TEXT,
    "generation_config": ["5", '"{}"', '"x"', '{"eos_token_id": 5}', "null"],
    "colour": ["1"],
}
OF_COMPLETIONS = {
    "prompt": [*NO_TEXT, '""', "null", '["a"]', "[1]"],
    "suffix": [*NO_TEXT, '"end"'],
    "logprobs": ["true", '"x"', "6", "-1"],
    "best_of": ["0", '"x"', "1.5"],
    "echo": NO_FLAG,
    "messages": ["[]"],
}
FUNCTION = {"name": "f", "arguments": "{}"}
OF_CHATS = {
    "messages": [
        *NO_OBJECT,
        "null",
        "[5]",
        "[{}]",
        '[{"role": 5}]',
        '[{"role": "user", "content": 5}]',
        '[{"role": "user", "content": [{"type": "image_url"}]}]',
        '[{"role": "user", "content": ["x"]}]',
        '[{"role": "user", "tool_calls": 5}]',
        '[{"role": "user", "tool_calls": [5]}]',
        '[{"role": "user", "tool_calls": [{"function": {"name": "f"}}]}]',
        '[{"role": "user", "tool_call_id": 5}]',
        '[{"role": "user", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]',
    ],
    "tools": ["5", "{}", "[5]", "[{}]", '[{"type": "function"}]', '[{"type": "function", "function": {"name": 5}}]'],
    "chat_template_kwargs": [
        *NO_OBJECT,
        '{"chat_template": "{{ 1 }}"}',
        '{"tokenize": false}',
        '{"messages": 5}',
        '{"conversation": []}',
        '{"add_generation_prompt": 1}',
        '{"padding": "longest"}',
        '{"return_tensors": "x"}',
    ],
    "max_completion_tokens": NO_COUNT,
    "logprobs": ["5", '"x"'],
    "top_logprobs": ["21", "-1", '"x"'],
    "parallel_tool_calls": NO_FLAG,
    "prompt": ['"Hi"'],
}


def wrong_requests():
    for path, fields in ((COMPLETIONS, OF_COMPLETIONS), (CHATS, OF_CHATS)):
        sound = {"prompt": '"Hi"'} if path == COMPLETIONS else {"messages": '[{"role": "user", "content": "Hi"}]'}
        for field, values in {**BOTH, **fields}.items():
            for value in values:
                parts = {"max_tokens": "1"} | sound | {field: value}
                yield path, field, "{" + ", ".join(f'"{key}": {each}' for key, each in parts.items()) + "}"


def test_every_mistake_of_a_client_is_a_400_that_names_the_field(app):
    requests = list(wrong_requests())
    assert len(requests) > 300
    for path, field, content in requests:
        response = posted(app, path, content.encode())
        assert response.status_code == 400, (path, content, response.text)
        error = error_of(response)
        is_json = "is not JSON" not in error["message"]
        names = error["param"] == field and (field in error["message"] or field == "model")
        assert error["type"] == "invalid_request_error" and (names or not is_json), (content, error)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\x00", b"[]", b"5", b"null", b"[" * 10**5, b'{"a":' * 10**4, b"9" * 10**5]
)
@pytest.mark.parametrize("path", [CHATS, COMPLETIONS])
def test_what_is_no_object_is_a_400(app, path, content):
    response = posted(app, path, content)
    assert response.status_code == 400 and error_of(response)["param"] is None


@pytest.mark.parametrize(
    "keys",
    [
        {"temperature": 0, "top_p": 1, "n": 1, "seed": 7},
        {"temperature": 1e-6, "seed": -5},
        {"temperature": 2, "top_p": 1e-320, "max_tokens": 2.0},
        {"stop": [], "logit_bias": {}, "user": "me", "stream_options": {"include_usage": True}},
        {"stop": ["a", "b"], "logit_bias": {"5": -100}, "frequency_penalty": -0.9, "presence_penalty": 2},
        {"model": "tiny", "n": None, "stop": None, "suffix": None, "stream": False, "logprobs": 5, "echo": True},
    ],
)
def test_what_openai_knows_is_taken(app, keys):
    response = posted(app, COMPLETIONS, body(**keys))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        ({"content": "Hi"}, {"chat_template_kwargs": {"enable_thinking": False}, "service_tier": "auto"}),
        ({"content": [{"type": "text", "text": "a"}]}, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ({"tool_calls": [{"id": "1", "function": FUNCTION}], "name": "me"}, {"logprobs": True, "top_logprobs": 3}),
        ({"content": "Hi"}, {"max_completion_tokens": 2, "response_format": {"type": "text"}, "metadata": None}),
    ],
)
def test_chats_of_every_kind_are_taken(app, message, keys):
    content = {"messages": [{"role": "user"} | message], "max_tokens": 1} | keys
    response = posted(app, CHATS, json.dumps(content).encode())
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == keys.get("max_completion_tokens", 1)


def test_tools_reach_the_template_as_they_were_sent(served):
    tool = {"function": {"zeta": 1, "name": "f"}, "type": "function", "more": None}
    content = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    ids = openai_api.read_chat(json.dumps(content).encode()).token_ids(served.tokenizer)
    assert served.tokenizer.decode(ids) == f"[user] Hi{[tool]}"


@pytest.mark.parametrize(
    ("way", "path", "status"), [("GET", "/nowhere", 404), ("GET", CHATS, 405), ("GET", "/v1/models/x", 404)]
)
def test_an_address_that_is_none_is_an_error_of_openais_form(app, way, path, status):
    (response,) = asked(app, (way, path, b"", {}))
    assert response.status_code == status and error_of(response)


def test_what_is_our_fault_is_a_500_of_openais_form(app, served, monkeypatch):
    def breaks(**keys):
        raise ZeroDivisionError

    monkeypatch.setattr(served.model, "forward", breaks)
    response = posted(app, COMPLETIONS, body())
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"


def test_longer_texts_answers_and_bodies_than_allowed_are_told_their_bound(app):
    texts = {400: body(prompt="x" * 3001), 413: body(prompt="x" * (LIMITS.body_bytes() + 1))}
    for status, content in texts.items():
        response = posted(app, COMPLETIONS, content)
        assert response.status_code == status and "shorten it" in error_of(response)["message"]
    assert posted(app, COMPLETIONS, body(prompt="x" * 3000)).status_code == 200
    response = posted(app, COMPLETIONS, body(max_tokens=401))
    assert response.status_code == 400 and "at most 400 tokens are generated" in error_of(response)["message"]


def test_an_answer_without_max_tokens_has_as_many_as_are_allowed(app):
    response = posted(app, COMPLETIONS, b'{"prompt": "Hi", "temperature": 0}')
    assert response.json()["usage"]["completion_tokens"] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_more_requests_than_allowed_are_told_to_wait_and_places_come_back(app, stream):
    for _ in range(2):
        request = ("POST", COMPLETIONS, body(max_tokens=20, stream=stream), {})
        responses = asked(app, *[request] * 9)
        codes = sorted(response.status_code for response in responses)
        assert codes == [200] * 4 + [503] * 5
        refused = next(response for response in responses if response.status_code == 503)
        assert "try again later" in error_of(refused)["message"] and refused.headers["Retry-After"] == "1"


def test_a_client_that_leaves_within_its_request_is_no_error_of_the_server(served):
    app, sent = build_app(Desk(replace(served, limits=replace(LIMITS, waiting=0, max_concurrent=1)))), []
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == openai_api.CLIENT_CLOSED_REQUEST
    assert posted(app, COMPLETIONS, body()).status_code == 200


def test_an_answer_that_is_there_while_its_client_leaves_is_handed_on(monkeypatch):
    """A stream that is not run would never stop its generation."""
    monkeypatch.setattr(openai_api, "DISCONNECT_POLL_S", 0)
    left, answered = asyncio.Event(), asyncio.Event()

    async def answer():
        await left.wait()
        answered.set()
        return "a stream"

    class Leaving:
        async def is_disconnected(self):
            left.set()
            return await answered.wait()

    async def go():
        return await openai_api._while_connected(Leaving(), answer())

    assert asyncio.run(go()) == "a stream"


def test_an_answer_that_is_being_generated_takes_one_place(served):
    app = build_app(Desk(replace(served, limits=replace(LIMITS, waiting=1, max_concurrent=1))))
    is_generating = threading.Event()

    async def go():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=ENOUGH_S) as client:
            first = asyncio.ensure_future(client.post(COMPLETIONS, content=body(max_tokens=100)))
            assert await asyncio.to_thread(is_generating.wait, ENOUGH_S)
            second = await client.post(COMPLETIONS, content=body())
            return second.status_code, (await first).status_code

    with Watched(served.model, is_generating.set):
        assert asyncio.run(go()) == (200, 200)


def events_of(response):
    lines = response.text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]], lines[-2]


@pytest.mark.parametrize("prompt", ["then", "one", "fox", "Hi", "a long story"])
@pytest.mark.parametrize("num_tokens", [6, 7, 8])
def test_a_streamed_text_is_the_same_text_not_streamed(app, served, prompt, num_tokens):
    keys = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 1, "seed": 3}
    whole = posted(app, COMPLETIONS, body(**keys)).json()
    chunks, last = events_of(posted(app, COMPLETIONS, body(**keys, stream=True)))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"] == whole["usage"] and last == "data: [DONE]"


def test_a_seed_repeats_a_text_whatever_is_answered_besides(app):
    seeded, other = body(max_tokens=20, temperature=1, seed=4), body(max_tokens=20, temperature=1)
    responses = asked(app, *[("POST", COMPLETIONS, content, {}) for content in (seeded, other, seeded)])
    texts = [response.json()["choices"][0]["text"] for response in responses]
    assert texts[0] == texts[2] != texts[1]
    assert posted(app, COMPLETIONS, other).json()["choices"][0]["text"] != texts[1]


def test_numbers_that_are_not_finite_are_a_422_which_clients_do_not_repeat(app):
    response = posted(app, COMPLETIONS, body(prompt="Hi~", temperature=1))
    assert response.status_code == 422 and error_of(response)["code"] == "not_finite"
    assert "within the first 3 tokens" in error_of(response)["message"]
    response = posted(app, COMPLETIONS, body(prompt="Hi~", temperature=1, stream=True))
    assert response.status_code == 200 and '"code": "not_finite"' in response.text and "[DONE]" not in response.text
    assert posted(app, COMPLETIONS, body()).status_code == 200


class Watched:
    """Counts the model's calls, and does something at the first."""

    def __init__(self, model, at_first=lambda: None):
        self.calls = 0
        self._at_first = at_first
        self._hook = model.register_forward_pre_hook(self._note)

    def _note(self, *call):
        self.calls += 1
        if self.calls == 1:
            self._at_first()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._hook.remove()


def test_closing_ends_a_long_prompt_before_its_next_layer_and_what_waits(served, config_of):
    runner = Engine(served.model, served.tokenizer)
    closing = threading.Thread(target=runner.close)
    job = Job([5] * 100_000, config_of())

    async def go():
        generations = [runner.submit(job), runner.submit(job)]
        reading = [anext(each.texts()) for each in generations]
        return await asyncio.gather(*reading, return_exceptions=True)

    def close():
        closing.start()
        assert runner._is_closed.wait(ENOUGH_S)

    with Watched(served.model, close) as watched:
        errors = asyncio.run(asyncio.wait_for(go(), ENOUGH_S))
    assert [type(error) for error in errors] == [Stopped] * 2
    closing.join(ENOUGH_S)
    assert watched.calls == 1 and not closing.is_alive() and runner.num_unfinished == 0


def test_a_reader_that_takes_nothing_is_dropped_and_the_next_one_answered(served, monkeypatch):
    monkeypatch.setattr(answers, "MAX_BUFFERED_CHARACTERS", 50)
    app, sent = build_app(Desk(served)), []
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b"", "headers": []}
    messages = iter([{"type": "http.request", "body": body(max_tokens=400, temperature=0, stream=True)}])

    async def receive():
        return next(messages, None) or await asyncio.Event().wait()

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    asyncio.run(asyncio.wait_for(app(scope, receive, send), ENOUGH_S))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    with Watched(served.model) as watched:
        assert posted(app, COMPLETIONS, body()).status_code == 200
    assert watched.calls < 100  # what was dropped goes on for no more than a token


def test_a_slow_reader_within_the_bound_gets_all(served, config_of):
    runner = Engine(served.model, served.tokenizer)

    async def go():
        generation = runner.submit(Job([5, 6], config_of(max_tokens=60, temperature=0)))
        while runner.num_unfinished:
            await asyncio.sleep(0)
        return [text async for text in generation.texts()], generation.num_tokens

    (text,), num_tokens = asyncio.run(asyncio.wait_for(go(), ENOUGH_S))
    assert num_tokens == 60 and len(text) >= 15
    runner.close()


def test_a_text_that_is_being_tokenised_does_not_hold_the_others(served, monkeypatch):
    is_reading, may_go_on = threading.Event(), threading.Event()

    def slow(self, tokenizer):
        is_reading.set()
        assert may_go_on.wait(ENOUGH_S)
        return [5]

    monkeypatch.setattr(openai_api.read_completion.__globals__["CompletionBody"], "token_ids", slow)
    app = build_app(Desk(served))

    async def go():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            reading = asyncio.ensure_future(client.post(COMPLETIONS, content=body()))
            assert await asyncio.to_thread(is_reading.wait, ENOUGH_S)
            assert (await client.get("/health")).status_code == 200 and not reading.done()
            may_go_on.set()
            return await reading

    assert asyncio.run(asyncio.wait_for(go(), ENOUGH_S)).status_code == 200


def test_a_text_of_a_megabyte_holds_health_for_less_than_a_second(served):
    app = build_app(Desk(replace(served, limits=replace(LIMITS, prompt_tokens=10**5))))
    times = []

    async def go():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            reading = asyncio.ensure_future(client.post(COMPLETIONS, content=body(prompt="some words " * 95_000)))
            while not reading.done():
                times.append(time.perf_counter())
                assert (await client.get("/health")).status_code == 200
                await asyncio.sleep(0)
            return reading.result()

    response = asyncio.run(asyncio.wait_for(go(), ENOUGH_S))
    assert "the prompt has 1045000 tokens" in error_of(response)["message"]
    assert max(after - before for before, after in itertools.pairwise(times)) < 1
