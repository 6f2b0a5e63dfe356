"""Conversations as corpora: what the assistant wrote is marked, rows hold them whole, and every fault is a sentence."""

import itertools
import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch

from radlads.cli import main
from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.data.chat_rows import BEGINS, OWN, TO_WRITE, ConversationRows, Conversations, flags
from radlads.data.identity import describe_corpus
from radlads.data.mask import mask_file, read_mask
from radlads.inference.chat_template import ChatTemplate

datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% if tools %}<tools {{ tools | length }}>{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{% for call in message.get('tool_calls') or [] %}<call {{ call['name'] }}>{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Shows a reply before the last in another way than it was asked for
CHANGING = (
    "{% for message in messages %}[{{ message['role'] }}]{% if message['role'] == 'assistant' and not loop.last %}(old)"
    "{% endif %} {{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
UNMARKED = (
    "{% for message in messages %}{{ '>' if message['role'] == 'assistant' else '' }}{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def say(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]


TWO_TURNS = say("hi", "yes", "more", "no")
CALLS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "clock", "arguments": None}]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "noon"},
]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer with a template."""
    (tmp_path / "model").mkdir()
    tiny.save_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def build(capsys, dataset, folder, out, *options):
    words = ["data", "build", "--chat", "--dataset", dataset, "--tokenizer", folder, "--out", out, *options]
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(stem, folder):
    """Of each document all its text, and the assistant's."""
    reader, tokenizer = BinIdxReader(stem), ChatTemplate(folder, 1000).tokenizer
    mask, starts = read_mask(reader), reader.document_starts()
    found = []
    for first, end in itertools.pairwise(starts):
        ids = reader.tokens[first:end]
        found.append((tokenizer.decode(ids.tolist()), tokenizer.decode(ids[mask[first:end]].tolist())))
    return found


def as_jsonl(path):
    return write_rows(path / "x.jsonl", [{"messages": TWO_TURNS}, {"messages": CALLS, "tools": [{"name": "clock"}]}])


def as_parquet(path):
    rows = {"messages": [TWO_TURNS, CALLS], "tools": [None, json.dumps([{"name": "clock"}])]}
    datasets.Dataset.from_dict(rows).to_parquet(path / "x.parquet")
    return path / "x.parquet"


def as_saved(path):
    rows = {"messages": [TWO_TURNS, CALLS], "tools": [None, json.dumps([{"name": "clock"}])]}
    datasets.Dataset.from_dict(rows).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_saved])
def test_what_the_assistant_wrote_is_marked(tmp_path, folder, capsys, write):
    code, out, _ = build(capsys, write(tmp_path), folder, tmp_path / "chat")
    assert code == 0
    assert texts(tmp_path / "chat", folder) == [
        ("[user] hi<|end|>\n[assistant] yes<|end|>\n[user] more<|end|>\n[assistant] no<|end|>", "yes<|end|>no<|end|>"),
        (
            "<tools 1>[system] s<|end|>\n[user] time?<|end|>\n[assistant] <call clock><|end|>\n[tool] 12<|end|>\n"
            "[assistant] noon<|end|>",
            "<call clock><|end|>noon<|end|>",
        ),
    ]
    assert "in 4 replies" in out and "2.00 replies" in out


def test_other_spellings_and_templates_without_an_end(tmp_path, folder, capsys):
    (folder / "chat_template.jinja").write_text(UNMARKED)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    rows = write_rows(tmp_path / "x.jsonl", [{"conversations": turns}])
    assert build(capsys, rows, folder, tmp_path / "chat", "--column_name", "conversations")[0] == 0
    assert texts(tmp_path / "chat", folder) == [("hi\n>yes\n", "yes\n")]


def test_info_check_and_verify_know_the_mask(tmp_path, folder, capsys):
    build(capsys, as_jsonl(tmp_path), folder, tmp_path / "chat")
    assert main(["data", "info", str(tmp_path / "chat")]) == 0
    assert "the assistant wrote" in capsys.readouterr().out
    check = ["data", "check", "--dataset", "x", "--tokenizer", str(folder), "--out", str(tmp_path / "chat")]
    assert main(check) == 0
    assert "mask" in describe_corpus(BinIdxReader(tmp_path / "chat"))
    mask = mask_file(tmp_path / "chat")
    mask.write_bytes(mask.read_bytes()[:-1] + b"\0")
    capsys.readouterr()
    assert main(check) == 2
    assert "chat.mask is not the file" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "chat.bin")]) == 1


def test_a_new_corpus_of_the_name_takes_the_mask_away(tmp_path, folder, capsys):
    build(capsys, as_jsonl(tmp_path), folder, tmp_path / "chat")
    with BinIdxWriter(tmp_path / "chat", 300) as writer:
        writer.add_document([1, 2])
    with pytest.raises(ValueError, match=r"chat.mask is missing.*data build --chat"):
        read_mask(BinIdxReader(tmp_path / "chat"))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (say("hi", "yes", first="assistant"), "message 1 is the assistant's at the beginning, where turns do not"),
        ([*say("hi"), *say("again", "yes")], "message 2 is the user's after the user's, where turns do not alternate"),
        (say("hi", " "), "message 2, the assistant's, is empty"),
        ([{"role": "king", "content": "x"}], "message 1 has the role 'king'"),
        ("no messages", "it is no list of messages"),
        ([], "it has no messages"),
    ],
)
def test_what_is_no_conversation_is_an_error_or_left_out(tmp_path, folder, capsys, messages, expected):
    rows = write_rows(tmp_path / "x.jsonl", [{"messages": TWO_TURNS}, {"messages": messages}])
    code, _, error = build(capsys, rows, folder, tmp_path / "chat")
    assert code == 2
    assert error.count("\n") == 1
    assert f"x.jsonl: row 1 is no conversation in column 'messages' (line 2), as {expected}" in error
    assert "--skip_faulty" in error
    assert not list(tmp_path.glob("chat*"))
    code, out, _ = build(capsys, rows, folder, tmp_path / "chat", "--skip_faulty")
    assert code == 0
    assert "left out: 1 faulty conversation" in out


def test_templates_that_do_not_fit(tmp_path, folder, capsys):
    rows = as_jsonl(tmp_path)
    (folder / "chat_template.jinja").write_text(CHANGING)
    code, _, error = build(capsys, rows, folder, tmp_path / "chat")
    assert code == 2
    assert "shows message 2 in another way than it asks for it" in error
    (folder / "chat_template.jinja").unlink()
    code, _, error = build(capsys, rows, folder, tmp_path / "chat")
    assert code == 2
    assert "has no chat template: copy chat_template.jinja" in error
    assert not list(tmp_path.glob("chat*"))


@pytest.mark.parametrize("option", ["--strict", "--special_tokens_as_text"])
def test_options_of_texts_are_refused(tmp_path, folder, capsys, option):
    assert "is for texts" in build(capsys, as_jsonl(tmp_path), folder, tmp_path / "chat", option)[2]


def corpus(stem, lengths, vocab=300):
    """Conversations of these lengths, the second half of each the assistant's; their number is every token."""
    with BinIdxWriter(stem, vocab, masked=True) as writer:
        for number, length in enumerate(lengths):
            writer.add_document(np.full(length, number), np.arange(length) >= length // 2)
    return BinIdxReader(stem)


def rows_of(reader, context, **keys):
    share = [(Conversations(reader, context), Fraction(1))]
    return ConversationRows(share, context, **{"num_samples": 200, "seed": 3} | keys)


def test_rows_hold_whole_conversations_each_once_an_epoch(tmp_path):
    lengths = np.random.default_rng(1).integers(2, 40, 150)
    rows = rows_of(corpus(tmp_path / "chat", lengths), 63)
    for epoch in range(2):
        seen = {}
        for i in range(rows.rows_in_epoch):
            row = rows[epoch * rows.rows_in_epoch + i]
            assert row.shape == (64,)
            ids, own, begins, _ = flags(row)
            for first in begins.nonzero().flatten().tolist():
                end = min([x for x in begins.nonzero().flatten().tolist() if x > first], default=64)
                if not own[first:end].any():  # padding
                    assert end == 64 and not ids[first:].any()
                    continue
                number = int(ids[first])
                assert (ids[first:end] == number).all() and end - first == lengths[number]
                assert own[first:end].tolist() == (np.arange(end - first) >= (end - first) // 2).tolist()
                seen[number] = seen.get(number, 0) + 1
        assert seen == dict.fromkeys(range(150), 1)
    used = lengths.sum() / (64 * rows.rows_in_epoch)
    assert used > 0.9
    firsts = [int(rows[i][0]) for i in range(rows.rows_in_epoch)]
    assert firsts != [int(rows[rows.rows_in_epoch + i][0]) for i in range(rows.rows_in_epoch)]


def test_rows_depend_on_their_number_alone(tmp_path):
    reader = corpus(tmp_path / "chat", [5, 9, 3, 8, 20, 6] * 5)
    alone = rows_of(reader, 31)
    pair = [rows_of(reader, 31, rank=rank, world=2) for rank in range(2)]
    for i in range(20):
        assert torch.equal(pair[i % 2][i // 2], alone[i])


def test_a_share_of_the_rows_is_to_be_written(tmp_path):
    rows = rows_of(corpus(tmp_path / "chat", [5, 9, 3, 8] * 5), 31, on_policy_share=Fraction(1, 4))
    plain = rows_of(corpus(tmp_path / "chat", [5, 9, 3, 8] * 5), 31)
    is_to_write = [bool(rows[i][0] & TO_WRITE) for i in range(40)]
    assert sum(is_to_write) == 10 and all(any(is_to_write[i : i + 4]) for i in range(0, 40, 4))
    assert [int(rows[i][0] & (OWN - 1)) for i in range(40) if is_to_write[i]] == list(range(10))
    others = [rows[i] for i in range(40) if not is_to_write[i]]
    assert all(torch.equal(row, plain[i]) for i, row in enumerate(others))


def test_several_corpora_take_turns_by_their_shares(tmp_path):
    first, second = corpus(tmp_path / "a", [8] * 8), corpus(tmp_path / "b", [6] * 40)
    shares = [(Conversations(first, 15), Fraction(3, 4)), (Conversations(second, 15), Fraction(1, 4))]
    rows = ConversationRows(shares, 15, num_samples=40, seed=1)
    alone = [ConversationRows([(held, Fraction(1))], 15, num_samples=40, seed=1) for held, _ in shares]
    is_first = [int(flags(rows[i]).begins[8]) == 1 and not flags(rows[i]).begins[6] for i in range(40)]
    assert sum(is_first) == 30
    assert torch.equal(rows[is_first.index(True)], alone[0][0])


def test_long_conversations_are_cut_and_those_without_a_reply_left_out(tmp_path):
    kept = Conversations(corpus(tmp_path / "chat", [10, 30, 60]), 19)
    assert (len(kept), kept.num_cut, kept.num_empty) == (2, 2, 1)
    assert len(kept[1][0]) == 20
    with pytest.raises(ValueError, match=r"no conversation with a reply in its first 3 tokens: raise model.ctx_len"):
        Conversations(corpus(tmp_path / "other", [10, 30]), 3)


def test_a_conversation_up_to_a_reply(tmp_path):
    with BinIdxWriter(tmp_path / "chat", 300, masked=True) as writer:
        writer.add_document(range(9), [False, False, True, True, False, False, True, True, True])
    kept = Conversations(BinIdxReader(tmp_path / "chat"), 19)
    assert [len(kept.beginning(0, choice)) for choice in (0.0, 0.49, 0.5, 0.99)] == [2, 2, 6, 6]


def test_a_mask_of_another_corpus_is_refused(tmp_path):
    corpus(tmp_path / "a", [10, 30])
    reader = corpus(tmp_path / "b", [30, 10])
    shutil.copy(mask_file(tmp_path / "a"), mask_file(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"b.mask is the mask of another corpus.*copy or build"):
        read_mask(reader)
    for damaged, expected in ((b"RADMASK\0", "no mask"), (mask_file(tmp_path / "a").read_bytes()[:-3], "cut short")):
        mask_file(tmp_path / "a").write_bytes(damaged)
        with pytest.raises(ValueError, match=expected):
            read_mask(BinIdxReader(tmp_path / "a"))
        corpus(tmp_path / "a", [10, 30])


def test_flags_lie_above_every_id():
    assert BEGINS > OWN > 2**31
