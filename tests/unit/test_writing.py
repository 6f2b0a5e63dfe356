"""A teacher that answers prompts: what becomes a corpus, how a killed run goes on, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import tiny
from safetensors.torch import load_file, save_file

from radlads.checkpoint.atomic import partial_name
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.data.conversations import Conversation
from radlads.data.mask import read_mask
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.sampling import Sampling
from radlads.inference.writing.command import Teacher, write_corpus
from radlads.inference.writing.own_prompts import own_prompts
from radlads.inference.writing.prompts import read_beginnings
from radlads.inference.writing.replies import Reply, fitting_rows, write_replies

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
END = 256
PROMPTS = ["a", "bcd", "efghijklmno", "p", "qr"]
SAMPLING = Sampling(temperature=1.0, max_tokens=60, seed=5)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A teacher with a template, that often ends a reply."""
    copy = tmp_path_factory.mktemp("writing") / "teacher"
    shutil.copytree(teacher, copy)
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    set_end_row(copy, 12)
    return copy


def set_end_row(folder, factor):
    """Make the end's logit vary so many times as much, so that it often wins; with 0 it never does greedily."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][END] *= factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def opened(folder):
    source = open_teacher(folder)
    return Teacher(source, build_teacher(source), ChatTemplate(folder, source.config.vocab_size))


def beginnings(prompts=PROMPTS):
    return [Conversation([{"role": "user", "content": text}]) for text in prompts]


class StopsAfter(tiny.Silent):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def progress(self, text):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def documents(stem):
    reader = BinIdxReader(stem)
    mask, starts = read_mask(reader), reader.document_starts()
    spans = [slice(*pair) for pair in np.stack([starts[:-1], starts[1:]], 1).tolist()]
    return [(reader.tokens[span].tolist(), mask[span].tolist()) for span in spans]


def test_replies_become_conversations_with_a_mask(opened, tmp_path):
    written = write_corpus(opened, beginnings(), tmp_path / "chat", SAMPLING, tiny.Silent(), answers=6, rows=7)
    found = documents(tmp_path / "chat")
    assert written.kept == len(found) and written.kept + written.endless + written.empty == 30
    assert 5 < written.kept < 30
    prompts = [opened.template.token_ids(each.messages) for each in beginnings()]
    of = []
    for ids, mask in found:
        first = mask.index(True)
        of.append(prompts.index(ids[:first]))
        assert all(mask[first:]) and ids[-1] == END and END not in ids[first:-1]
    assert of == sorted(of)
    assert len({tuple(ids) for ids, _ in found}) == len(found)
    assert not partial_name(tmp_path / "chat").exists()


@pytest.mark.parametrize("steps", [1, 9, 33])
def test_a_run_that_was_killed_goes_on_token_by_token(opened, tmp_path, steps):
    keys = {"answers": 4, "rows": 6}
    write_corpus(opened, beginnings(), tmp_path / "whole", SAMPLING, tiny.Silent(), **keys)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(opened, beginnings(), tmp_path / "chat", SAMPLING, StopsAfter(steps), **keys)
    journal = partial_name(tmp_path / "chat") / "tokens.bin"
    held = journal.read_bytes()
    journal.write_bytes(held + b"\0\0\0")  # a pair that was cut in two
    console = tiny.Silent()
    write_corpus(opened, beginnings(), tmp_path / "chat", SAMPLING, console, **keys)
    assert documents(tmp_path / "chat") == documents(tmp_path / "whole")
    assert "going on after" in console.lines[0]


def test_a_reply_depends_on_its_number_and_the_seed_alone(opened):
    prompts = [opened.template.token_ids(each.messages) for each in beginnings()]

    def written(rows, seed=5):
        replies = [Reply(number, prompt) for number, prompt in enumerate(prompts * 2)]
        sampling = Sampling(temperature=1.0, max_tokens=60, seed=seed)
        for _ in write_replies(opened.model, replies, sampling, frozenset({END}), rows=rows):
            pass
        return [(reply.tokens, reply.has_ended) for reply in replies]

    assert written(1) == written(4) == written(10) != written(4, seed=6)


def test_more_tokens_may_be_asked_for_and_nothing_else(opened, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_corpus(opened, beginnings(), tmp_path / "chat", SAMPLING, StopsAfter(9))
    other = Sampling(temperature=0.5, max_tokens=60, seed=5)
    with pytest.raises(ValueError, match=r"replies to another request \(temperature is 1.0 there and 0.5 here\): set"):
        write_corpus(opened, beginnings(), tmp_path / "chat", other, tiny.Silent())
    longer = Sampling(temperature=1.0, max_tokens=90, seed=5)
    write_corpus(opened, beginnings(), tmp_path / "chat", longer, tiny.Silent())
    with pytest.raises(ValueError, match=r"chat.bin exists already: remove it"):
        write_corpus(opened, beginnings(), tmp_path / "chat", longer, tiny.Silent())


def test_a_teacher_that_never_ends_is_refused_early(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "endless")
    set_end_row(tmp_path / "endless", 0)
    words = ["data", "write", "--teacher", tmp_path / "endless", "--out", tmp_path / "chat", "--temperature", 0]
    code = main([*map(str, words), "--max-tokens", "5", "--max-prompts", "80", "--device", "cpu"])
    error = capsys.readouterr().err
    assert code == 2
    assert "none of the teacher's first 32 replies ended within 5 tokens, by '<|end|>': raise --max-tokens" in error
    assert not (tmp_path / "chat.idx").exists()


def test_a_teacher_without_a_template_is_refused(teacher, tmp_path, capsys):
    assert main(["data", "write", "--teacher", str(teacher), "--out", str(tmp_path / "chat"), "--device", "cpu"]) == 2
    assert "has no chat template: copy chat_template.jinja from an instruct model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_info_describes(folder, tmp_path, capsys):
    lines = [
        json.dumps({"prompt": "x"}),
        json.dumps({"messages": [{"role": "user", "content": "y"}]}),
        *[json.dumps({"prompt": "abc"})] * 6,
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    words = ["data", "write", "--teacher", folder, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "chat"]
    assert main([*map(str, words), "--max-tokens", "80", "--answers", "2", "--system", "s", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "replies; left out:" in out and "the assistant wrote" in out
    tokenizer = ChatTemplate(folder, 300).tokenizer
    texts = {tokenizer.decode(ids[: mask.index(True)]) for ids, mask in documents(tmp_path / "chat")}
    assert texts <= {f"[system] s<|end|>\n[user] {text}<|end|>\n[assistant] " for text in ("x", "y", "abc")}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "", "p.txt is empty: give one prompt on each line"),
        ("p.txt", "a\n\nb", "line 2 of .*p.txt is empty"),
        ("p.jsonl", "{", "line 1 of .*p.jsonl is no JSON"),
        ("p.jsonl", '{"text": "a"}', 'has neither "prompt" nor "messages"'),
        ("p.jsonl", '{"prompt": ""}', 'has no text as "prompt"'),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "is no conversation, as message 1"),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "does not wait for a reply",
        ),
    ],
)
def test_prompts_that_are_none(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_beginnings(tmp_path / name)


def test_too_many_rows_for_the_memory(opened, monkeypatch):
    assert fitting_rows(opened.model, 100) == 16
    monkeypatch.setattr("radlads.inference.writing.replies.available_bytes", lambda device: 10**6)
    assert 1 <= fitting_rows(opened.model, 100) < 16
    with pytest.raises(ValueError, match=r"500 texts of 100 tokens need .* set a smaller --batch-size or --max-tokens"):
        fitting_rows(opened.model, 100, 500)


def test_own_prompts_are_many_and_the_same_every_time():
    assert own_prompts() == own_prompts()
    assert len(set(own_prompts())) == len(own_prompts()) > 1500
