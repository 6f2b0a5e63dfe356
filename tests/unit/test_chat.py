"""Chat: what a turn reads, what replies are, templates that do not fit; and files of prompts."""

import io
import json
import shutil
import signal
from dataclasses import replace

import pytest
import tiny
import torch
from root_scripts import largest_file
from transformers import AutoTokenizer

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.tokenizer_files import read_tokenizer
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.inference.chat import Conversation, converse
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.generate import Sampling, generate_tokens
from radlads.inference.prompts import batches

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Numbers earlier turns from the end, so that every turn changes all of them
CHANGING = "{% for message in messages %}[{{ loop.revindex }}] {{ message['content'] }}\n{% endfor %}>"
GREEDY = Sampling(temperature=0, max_tokens=8)


def exported(teacher, folder, mixer):
    torch.manual_seed(0)
    student, _ = build_student(open_teacher(teacher), tiny.stage_config(folder, "align", **{"model.tmix": mixer}).model)
    for parameter in student.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    export(student, teacher, folder / "hf")
    set_template(folder / "hf", TEMPLATE)
    return folder / "hf"


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """Python's own handling of SIGINT, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    return exported(teacher, tmp_path_factory.mktemp("chat"), "rad_rwkv7")


@pytest.fixture(scope="module")
def softmax_folder(teacher, tmp_path_factory):
    """Its cache grows while it answers."""
    return exported(teacher, tmp_path_factory.mktemp("chat"), "qwen2")


@pytest.fixture(params=["folder", "softmax_folder"])
def either(request):
    return request.getfixturevalue(request.param)


def set_template(folder, template):
    (folder / "chat_template.jinja").write_text(template)


@pytest.fixture
def template(folder):
    yield lambda text: set_template(folder, text)
    set_template(folder, TEMPLATE)


def conversation(folder, sampling=GREEDY, **keys):
    return Conversation(load_model(folder), ChatTemplate(folder, tiny.VOCAB), sampling, **keys)


def tokens_read(talk):
    """The lengths of what the model reads from now on; replies come one token at a time by another way."""
    lengths = []
    talk.model.model.embed_tokens.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    return lengths


def rendered(folder, messages):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_a_turn_reads_its_own_tokens_only_and_answers_as_if_it_had_read_all(either):
    talk, messages, known = conversation(either, system="Be brief."), [{"role": "system", "content": "Be brief."}], 0
    lengths = tokens_read(talk)
    for text in ("Who are you?", "Where do you live?", "Why there?"):
        lengths.clear()
        reply = "".join(talk.reply(text))
        messages.append({"role": "user", "content": text})
        ids = rendered(either, messages)
        assert talk.num_read == len(ids) - known == sum(length for length in lengths if length > 1)
        assert not talk.began_anew
        sampling = replace(GREEDY, num_ids=257)  # the tokenizer's, of the embedding's 260 rows
        (expected,) = generate_tokens(talk.model, [ids], sampling, talk.template.stop_ids())
        assert reply == talk.template.tokenizer.decode(expected, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": reply})
        known = len(ids)
    assert talk.messages == messages


def test_a_template_that_changes_earlier_turns_has_all_of_it_read_again(folder, template):
    template(CHANGING)
    talk, notices, replies = conversation(folder), [], []
    lines = iter(["Who?", "Where?", "Why?", None])
    converse(talk, lambda: next(lines), replies.append, notices.append)
    assert talk.began_anew and talk.num_read == len(rendered(folder, talk.messages[:-1]))
    assert len(notices) == 1 and "read again" in notices[0]


def test_reset_forgets_all_but_the_system_message(folder):
    talk = conversation(folder, system="Be brief.")
    first = "".join(talk.reply("Who are you?"))
    "".join(talk.reply("Where?"))
    talk.reset()
    assert "".join(talk.reply("Who are you?")) == first
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]


def test_an_interrupted_reply_is_part_of_the_conversation_as_far_as_it_went(folder):
    talk = conversation(folder, Sampling(seed=1, max_tokens=60))
    written = []

    def write(text):
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    lines = iter(["Who?", None])
    converse(talk, lambda: next(lines), write, lambda text: None)
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(written[:3])}
    "".join(talk.reply("And?"))
    assert not talk.began_anew and talk.messages[-2]["content"] == "And?"


def test_a_reading_that_is_interrupted_leaves_no_half_read_state(either, monkeypatch):
    talk, undisturbed = conversation(either), conversation(either)
    for each in (talk, undisturbed):
        "".join(each.reply("Who?"))
    block = talk.model.model.layers[1]
    hook = block.register_forward_pre_hook(lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        "".join(talk.reply("Lost?"))
    hook.remove()
    assert len(talk.messages) == 2
    assert "".join(talk.reply("Where?")) == "".join(undisturbed.reply("Where?"))


@pytest.fixture
def ending(folder, tmp_path):
    """A copy of the folder that ends its texts by 5, or by 6 or 7 as generation_config.json has it."""
    copy = shutil.copytree(folder, tmp_path / "ending")
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, value in (("config.json", 5), ("generation_config.json", [6, 7])):
        content = json.loads((copy / name).read_text()) | {"eos_token_id": value}
        (copy / name).write_text(json.dumps(content))
    return copy


def test_a_reply_ends_where_the_model_or_the_template_ends_it(ending):
    assert ChatTemplate(ending, tiny.VOCAB).stop_ids() == {5, 6, 7}  # <|end|> is an ordinary token
    tokenizer = json.loads((ending / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [{"id": 256, "content": "<|end|>", "special": True} | flags]
    (ending / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert ChatTemplate(ending, tiny.VOCAB).stop_ids() == {5, 6, 7, 256}
    set_template(ending, "{% for message in messages %}{{ message['content'] }}\n{% endfor %}>")
    assert ChatTemplate(ending, tiny.VOCAB).stop_ids() == {5, 6, 7}


def test_a_text_ends_where_generation_config_ends_it(folder, tmp_path, monkeypatch, capsys):
    argv = ["--prompt", "Who?", "--temperature", "0", "--max-tokens", "9", "--device", "cpu"]
    _, whole, _ = run(monkeypatch, capsys, ["generate", folder, *argv])
    other = shutil.copytree(folder, tmp_path / "other")
    asked = read_tokenizer(folder).encode("Who?").ids
    first = generate_tokens(load_model(folder), [asked], GREEDY)[0][0]
    content = json.loads((other / "generation_config.json").read_text()) | {"eos_token_id": [256, first]}
    (other / "generation_config.json").write_text(json.dumps(content))
    assert whole != "\n"
    assert run(monkeypatch, capsys, ["generate", other, *argv])[1] == "\n"


def test_marks_that_the_tokenizer_lacks_are_told(folder, template):
    template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|end|>{% endfor %}")
    assert conversation(folder).template.missing_tokens() == ["<|im_start|>"]


def run(monkeypatch, capsys, argv, said=b""):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said)))
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_chat_answers_lines_that_are_piped_in(folder, monkeypatch, capsys):
    argv = ["chat", folder, "--temperature", "0", "--max-tokens", "8", "--device", "cpu"]
    code, out, err = run(monkeypatch, capsys, argv, b"Who?\n\n/reset\nWho?\r\nWhere?")
    talk = conversation(folder)
    first, second = ("".join(talk.reply(text)) for text in ("Who?", "Where?"))
    assert (code, out) == (0, f"{first}\n{first}\n{second}\n")
    assert err == "radlads: the conversation begins anew\n"


PICKY = TEMPLATE.replace("{% for", "{% if 'rude' in messages[-1].content %}{{ 1 / 0 }}{% endif %}{% for", 1)


def test_a_message_that_cannot_be_answered_is_told_and_leaves_no_trace(either):
    set_template(either, PICKY)
    talk, undisturbed = conversation(either), conversation(either)
    notices, replies = [], []
    lines = iter(["Who?", "rude", "rude again", "Where?", None])
    assert converse(talk, lambda: next(lines), replies.append, notices.append) == 2
    set_template(either, TEMPLATE)
    expected = ["".join(undisturbed.reply(text)) for text in ("Who?", "Where?")]
    assert "".join(replies) == "".join(f"{reply}\n" for reply in expected)
    assert talk.messages == undisturbed.messages and talk.num_read == undisturbed.num_read
    assert notices[0].endswith("fails: division by zero") and len(notices) == 2


def test_what_goes_wrong_within_a_reply_is_no_refused_message(folder, monkeypatch):
    talk, notices, replies = conversation(folder), [], []

    def breaks(logits):
        yield "a piece"
        raise ValueError("broken")

    monkeypatch.setattr(talk, "_generated", breaks)
    lines = iter(["Who?", None])
    with pytest.raises(ValueError, match="broken"):
        converse(talk, lambda: next(lines), replies.append, notices.append)
    assert (replies, notices) == (["a piece"], [])
    assert [message["content"] for message in talk.messages] == ["Who?", "a piece"]


def test_a_reply_that_is_not_taken_leaves_no_trace(folder):
    talk, undisturbed = conversation(folder), conversation(folder)
    for each in (talk, undisturbed):
        "".join(each.reply("Who?"))
    talk.reply("Lost?")
    assert "".join(talk.reply("Where?")) == "".join(undisturbed.reply("Where?"))
    assert talk.messages == undisturbed.messages


def test_a_message_too_long_for_the_memory_is_told_and_the_next_one_answered(softmax_folder, monkeypatch):
    monkeypatch.setattr("radlads.inference.generate.available_bytes", lambda device: 100_000)
    talk, undisturbed, notices, replies = conversation(softmax_folder), conversation(softmax_folder), [], []
    lines = iter(["x" * 1000, "Who?", None])
    assert converse(talk, lambda: next(lines), replies.append, notices.append) == 1
    assert "shorten the prompt" in notices[0]
    assert "".join(replies) == "".join(undisturbed.reply("Who?")) + "\n"


def test_piped_messages_that_cannot_be_answered_are_exit_code_2(folder, template, monkeypatch, capsys):
    template(PICKY)
    argv = ["chat", folder, "--temperature", "0", "--max-tokens", "8", "--device", "cpu"]
    code, out, err = run(monkeypatch, capsys, argv, b"rude\nWho?\n")
    assert code == 2 and err.count("\n") == 1 and "division by zero" in err
    assert out == "".join(conversation(folder).reply("Who?")) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "fails: "),
        ("{{ messages[7].content.x }}", "fails: "),
        ("{{ raise_exception('no system role') }}", "fails: no system role"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("Hello!", "leaves out what the user says"),
        ("", "has no chat template"),
    ],
)
def test_a_template_that_does_not_work_is_a_sentence(folder, template, text, message, monkeypatch, capsys):
    template(text)
    code, _, err = run(monkeypatch, capsys, ["chat", folder, "--device", "cpu"])
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_folder_without_a_template_is_a_sentence(folder, monkeypatch, capsys):
    (folder / "chat_template.jinja").unlink()
    code, _, err = run(monkeypatch, capsys, ["chat", folder])
    set_template(folder, TEMPLATE)
    assert code == 2 and "has no chat template" in err and err.count("\n") == 1


def test_a_system_message_that_is_no_text_is_a_sentence_before_the_model_is_read(folder, monkeypatch, capsys):
    monkeypatch.setattr("radlads.checkpoint.model_folder.load_model", lambda *args, **keys: pytest.fail("read"))
    code, _, err = run(monkeypatch, capsys, ["chat", folder, "--system", "\udcff", "--device", "cpu"])
    assert code == 2 and "--system is not UTF-8 text" in err and err.count("\n") == 1


def test_binary_input_is_a_sentence(folder, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, ["chat", folder, "--device", "cpu"], b"\xff\xfe\n")
    assert code == 2 and "not UTF-8" in err and err.count("\n") == 1


ASK = ["--temperature", "0.7", "--seed", "5", "--max-tokens", "9", "--device", "cpu"]


def test_a_file_of_prompts_is_answered_as_its_prompts_one_by_one(folder, tmp_path, monkeypatch, capsys):
    prompts = ["The fox", "A much longer prompt about foxes and dogs", "x", "Ünïcode", "The end"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    argv = ["generate", folder, *ASK, "--batch-size", "2"]
    code, out, _ = run(monkeypatch, capsys, [*argv, "--prompts", tmp_path / "prompts.txt"])
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["prompt"] for answer in answers] == prompts
    for number, answer in enumerate(answers):
        seed = ["--seed", str(5 + number)]
        _, alone, _ = run(monkeypatch, capsys, ["generate", folder, *ASK, *seed, "--prompt", prompts[number]])
        assert alone == answer["text"] + "\n"
    records = [{"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    _, again, _ = run(monkeypatch, capsys, [*argv, "--prompts", tmp_path / "prompts.jsonl"])
    assert [json.loads(line) for line in again.splitlines()] == [
        {**r, **a} for r, a in zip(records, answers, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", b"", "is empty: give one prompt"),
        ("prompts.txt", b"one\n\ntwo\n", "line 2 of"),
        ("prompts.txt", b"\x80\x81", "not UTF-8"),
        ("prompts.jsonl", b'{"prompt": "a"}\n{', "line 2 of"),
        ("prompts.jsonl", b'{"prompt": 3}', 'has no text as "prompt"'),
        ("prompts.jsonl", b'["a"]', 'has no text as "prompt"'),
        ("prompts.jsonl", b'{"prompt": "a", "text": "mine"}', 'has a "text" of its own, where the answer is written'),
        ("prompts.jsonl", b'{"prompt": ""}', "has an empty prompt"),
        ("prompts.jsonl", b'{"prompt": "\\ud800"}', "not UTF-8"),
    ],
)
def test_prompts_that_are_none_are_a_sentence(folder, tmp_path, monkeypatch, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, _, err = run(monkeypatch, capsys, ["generate", folder, "--prompts", tmp_path / name])
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to continue"),
        (["--prompt", "\udcff"], "not UTF-8"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--prompts", "x", "--save-state", "y"], "stores one text"),
        (["--prompt", "x", "--save-state", __file__], "exists already"),
        (["--prompt-file", "/no/such/file", "--save-state", "/no/folder/y"], "/no/folder is not a folder"),
        (["--prompt", "x", "--load-state", __file__], "truncated or no state file"),
        (["--prompt", "x", "--load-state", "/no/state"], "no such file"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens 1 or more"),
        (["--prompt", "x", "--seed", str(2**70)], "seed must be from 0 to 9223372036854775807"),
        (["--prompt", "x", "--seed", "-1"], "seed must be from 0 to 9223372036854775807"),
    ],
)
def test_arguments_that_make_no_sense_are_a_sentence(folder, options, message, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, ["generate", folder, *options])
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_document_is_read_once_and_asked_about_later(either, tmp_path, monkeypatch, capsys):
    (tmp_path / "document").write_text("The fox lives in the wood. " * 100)
    asked = ["generate", either, *ASK]
    _, whole, _ = run(monkeypatch, capsys, [*asked, "--prompt-file", tmp_path / "document"])
    state = tmp_path / "state"
    saves = ["--save-state", state, "--max-tokens", "0"]
    code, out, err = run(
        monkeypatch, capsys, [*asked, "--prompt-file", "-", *saves], b"The fox lives in the wood. " * 100
    )
    assert (code, out) == (0, "") and f"wrote {state}: 2,700 tokens" in err
    assert run(monkeypatch, capsys, [*asked, "--load-state", state])[1] == whole
    (tmp_path / "prompts").write_text("Who?\nWhere?\n")
    _, out, _ = run(monkeypatch, capsys, [*asked, "--load-state", state, "--prompts", tmp_path / "prompts"])
    alone = run(monkeypatch, capsys, [*asked, "--load-state", state, "--prompt", "Who?"])[1]
    assert json.loads(out.splitlines()[0])["text"] + "\n" == alone != whole


def test_a_full_disk_is_a_sentence(folder, tmp_path, monkeypatch, capsys):
    options = ["--prompt", "x" * 600, "--save-state", tmp_path / "state", "--device", "cpu"]
    with largest_file(4000):
        code, out, err = run(monkeypatch, capsys, ["generate", folder, *options])
    assert (code, out) == (2, "") and str(tmp_path / "state") in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_read(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    options = ["--prompt-file", "/no/such/file", "--save-state", tmp_path / "state"]
    code, _, err = run(monkeypatch, capsys, ["generate", folder, *options])
    assert code == 2 and f"{tmp_path} cannot be written to" in err and err.count("\n") == 1


def test_a_state_of_other_weights_is_refused(folder, teacher, tmp_path, monkeypatch, capsys):
    run(monkeypatch, capsys, ["generate", folder, "--prompt", "x", "--save-state", tmp_path / "s", "--max-tokens", "0"])
    model = load_model(folder)
    model.model.norm.weight.data.mul_(1.01)
    export(model, teacher, tmp_path / "other")
    code, _, err = run(monkeypatch, capsys, ["generate", tmp_path / "other", "--load-state", tmp_path / "s"])
    assert code == 2 and "the state of another model" in err


def test_batches_are_at_most_half_padding():
    assert list(batches([5, 5, 5, 5, 5], 2)) == [range(0, 2), range(2, 4), range(4, 5)]
    assert list(batches([1, 1, 1000, 900, 1], 8)) == [range(0, 2), range(2, 5)]
    assert list(batches([], 8)) == []
