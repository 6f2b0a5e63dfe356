"""The server as OpenAI's own client library sees it, over loopback."""

import http.client
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from local_server import STOP_S, serving

from radlads.checkpoint.model_folder import load_model
from radlads.cli import main
from radlads.inference import serve
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.generate import Sampling, generate_tokens
from radlads.model.modeling import RadladsForCausalLM

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}[a] {% endif %}"
)
NAME = "tiny"
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_PROMPT_TOKENS = 5000
OPTIONS = ("--name", NAME, "--max-prompt-tokens", str(MAX_PROMPT_TOKENS), "--max-tokens", str(10**6))


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    return tiny.endless_export(teacher, tmp_path_factory.mktemp("serve"), TEMPLATE)


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder, *OPTIONS) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(folder):
    """The greedy text that generate() of ours gives for a prompt, or for a user's message."""
    model, template = load_model(folder), ChatTemplate(folder, tiny.VOCAB)

    def text(prompt, num_tokens, *, chat=False):
        messages = [{"role": "user", "content": prompt}]
        ids = template.token_ids(messages) if chat else template.tokenizer(prompt)["input_ids"]
        sampling = Sampling(temperature=0, max_tokens=num_tokens, num_ids=257)
        (tokens,) = generate_tokens(model, [ids], sampling, template.stop_ids())
        return template.tokenizer.decode(tokens, skip_special_tokens=True)

    return text


def complete(client, prompt, num_tokens, **keys):
    return client.completions.create(model=NAME, prompt=prompt, max_tokens=num_tokens, temperature=0, **keys)


def chat(client, text, num_tokens, **keys):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=num_tokens, temperature=0, **keys
    )


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other")


def test_sixteen_clients_at_once_each_get_their_own_text(client, expected):
    def ask(number):
        prompt, length = f"prompt {number * number}", 10 + number
        if number % 4 == 0:
            answer = complete(client, prompt, length)
            assert answer.usage.completion_tokens == length and answer.choices[0].finish_reason == "length"
            return answer.choices[0].text
        if number % 4 == 1:
            return "".join(chunk.choices[0].text for chunk in complete(client, prompt, length, stream=True))
        if number % 4 == 2:
            return chat(client, prompt, length).choices[0].message.content
        chunks = chat(client, prompt, length, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(16)))
    texts = [expected(f"prompt {n * n}", 10 + n, chat=n % 4 > 1) for n in range(16)]
    assert answers == texts and len(set(texts)) == 16


def test_a_completion_is_what_generate_gives_for_a_tokenizer_with_a_bos(folder, tmp_path, capsys):
    with_bos = shutil.copytree(folder, tmp_path / "hf")
    tiny.put_bos_first(with_bos)
    argv = ["--prompt", "Who are you?", "--temperature", "0", "--max-tokens", "12", "--device", "cpu"]
    texts = []
    for each in (folder, with_bos):
        assert main(["generate", str(each), *argv]) == 0
        texts.append(capsys.readouterr().out.rstrip("\n"))
    with (
        serving(with_bos, *OPTIONS) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = complete(client, "Who are you?", 12).choices[0].text
    assert answer == texts[1] != texts[0]


def test_requests_whose_client_leaves_are_stopped(client, expected):
    stream = complete(client, "a long story", 10**6, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.5), "a long story", 10**6)
    with pytest.raises(openai.APITimeoutError):
        chat(client.with_options(timeout=0.5), "a long story", 10**6)
    assert complete(client, "then", 12).choices[0].text == expected("then", 12)


def test_a_prompt_as_long_as_is_allowed_is_read_in_pieces(client, expected):
    prompt = "x" * MAX_PROMPT_TOKENS
    answer = complete(client, prompt, 5)
    assert answer.choices[0].text == expected(prompt, 5)
    assert answer.usage.prompt_tokens == MAX_PROMPT_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_an_over_long_prompt_is_refused(client, stream):
    with pytest.raises(openai.BadRequestError, match="at most 5000 are read"):
        complete(client, "x" * (MAX_PROMPT_TOKENS + 1), 5, stream=stream)
    with pytest.raises(openai.BadRequestError, match="at most 5000 are read"):
        chat(client, "x" * 100_000, 5, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_told_to_end_leaves_a_long_prompt_unread(folder, monkeypatch, stream):
    """SIGTERM sets should_exit as serving() does; the prompt would take minutes."""
    is_read, num_read = threading.Event(), []

    def note(self, *arguments, **keys):
        is_read.set()
        num_read.append(None)
        return forward(self, *arguments, **keys)

    forward = RadladsForCausalLM.forward
    monkeypatch.setattr(RadladsForCausalLM, "forward", note)
    monkeypatch.setattr(serve, "SHUTDOWN_S", 0.2)
    slowly = "--max-prompt-tokens", "1000000", "--prefill-piece", "2"
    prompt = json.dumps({"prompt": "x" * 400_000, "stream": stream}).encode()
    with ThreadPoolExecutor(1) as threads, serving(folder, *OPTIONS, *slowly) as url:
        is_read.clear()  # of the first token, before it serves
        sent = urllib.request.Request(url + COMPLETIONS, prompt, {"Content-Type": "application/json"})
        answer = threads.submit(lambda: urllib.request.urlopen(sent, timeout=STOP_S).read())
        assert is_read.wait(STOP_S)
        num_read.clear()
    with pytest.raises(http.client.IncompleteRead if stream else urllib.error.HTTPError):
        answer.result(STOP_S)
    assert len(num_read) < 100_000


def test_a_temperature_draws_and_a_stop_text_ends(client, expected):
    warm = [client.completions.create(model=NAME, prompt="x", max_tokens=20, temperature=1.0, seed=s) for s in (1, 2)]
    assert warm[0].choices[0].text != warm[1].choices[0].text
    text = expected("then", 40)
    stop = next(character for character in text if character.isascii() and character.isprintable())
    assert complete(client, "then", 40, stop=stop).choices[0].text == text[: text.index(stop) + 1]


def test_a_clean_up_of_spaces_that_a_tokenizer_asks_for_does_not_part_streams_from_texts(folder, tmp_path):
    cleaning = shutil.copytree(folder, tmp_path / "hf")
    path = cleaning / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True}))
    with (
        serving(cleaning, *OPTIONS) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        bias = {str(number): -100 for number in range(260) if number not in (220, 13, 0)}  # " ", "." and "!"
        keys = {"seed": 1, "logit_bias": bias}
        whole = client.completions.create(model=NAME, prompt="x", max_tokens=20, temperature=1, **keys)
        pieces = client.completions.create(model=NAME, prompt="x", max_tokens=20, temperature=1, stream=True, **keys)
        assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
        assert " ." in whole.choices[0].text or " !" in whole.choices[0].text


def posted(url, path, content):
    request = urllib.request.Request(url + path, content, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    return refused.value.code, json.load(refused.value)["error"]["message"]


def said(content, role="user", **keys):
    return json.dumps({"messages": [{"role": role, "content": content}]} | keys).encode()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (CHATS, b"{", "not JSON"),
        (CHATS, b"\xff\x00", "not"),
        (CHATS, b"[]", "should be an object"),
        (CHATS, b"{}", "messages"),
        (CHATS, b'{"messages": []}', "messages"),
        (CHATS, b'{"messages": [{"content": "Hi"}]}', "messages.0.role"),
        (CHATS, said([{"type": "image_url"}]), "messages.0.content"),
        (CHATS, said("Hi", role="tool"), "no tools"),
        (CHATS, said("\ud800"), "not JSON"),
        (CHATS, said("Hi", model="gpt-5"), "only 'tiny'"),
        (COMPLETIONS, b'{"prompt": ""}', "prompt"),
        (COMPLETIONS, b'{"prompt": ["a", "b"]}', "prompt"),
        (COMPLETIONS, b'{"prompt": "a", "temperature": -1}', "temperature"),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (COMPLETIONS, b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (COMPLETIONS, b'{"prompt": "a", "n": 2}', "n: "),
        (COMPLETIONS, b'{"prompt": "a", "colour": "red"}', "colour"),
    ],
)
def test_a_malformed_request_is_a_sentence(url, path, content, message):
    code, found = posted(url, path, content)
    assert code == 400 and message in found


def test_a_port_in_use_is_a_sentence(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"port {port} at 127.0.0.1 is in use: choose another --port" in error and error.count("\n") == 1


def test_a_port_that_another_process_takes_while_the_model_loads_is_a_sentence(folder, capsys, monkeypatch):
    with serve.listening("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(serve, "build_server", lambda *arguments: other.listen())
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    assert f"port {port} at 127.0.0.1 is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--host", "no.such.host.invalid"],
        ["--max-prompt-tokens", "0"],
        ["--max-tokens", "0"],
        ["--max-concurrent", "0"],
        ["--max-queue", "-1"],
        ["--prefill-piece", "0"],
        ["--state-memory", "0"],
        ["--state-memory", "1e-6"],
        ["--state-memory", "0.001", "--max-concurrent", "64"],
        ["--grace-seconds", "nan"],
        ["--api-key", ""],
    ],
)
def test_options_out_of_range_are_a_sentence(folder, capsys, options):
    assert main(["serve", str(folder), *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def status_of(call):
    try:
        call()
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def test_a_server_with_a_key_and_a_name_wants_both(folder, monkeypatch):
    monkeypatch.setenv("RADLADS_API_KEY", "secret")
    with serving(folder, *OPTIONS, "--allowed-host", "box.lan") as url:
        for key, host, code in (("secret", "box.lan", 200), ("secret", "evil.com", 403), ("none", "localhost", 401)):
            headers = {"Authorization": f"Bearer {key}", "Host": host}
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, default_headers=headers, max_retries=0) as client:
                assert status_of(client.models.list) == code


def test_missing_packages_are_a_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr(serve, "PACKAGES", ("openai", "no_such_package"))
    assert main(["serve", str(folder), "--port", "0"]) == 2
    assert capsys.readouterr().err == "radlads: serving needs no_such_package: pip install 'radlads[serve]'\n"


def test_what_is_no_model_is_a_sentence(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "no config.json" in capsys.readouterr().err
