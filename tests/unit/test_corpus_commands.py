"""From a dataset to a corpus: every format, every fault in it as one sentence, and the commands around it."""

import gzip
import json
import lzma
import sys

import numpy as np
import pytest
import tiny
from root_scripts import largest_file, run_script

from radlads.cli import main
from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.data.inspect_corpus import replace_trailing

datasets = pytest.importorskip("datasets")

from radlads.data.datasets_source import open_documents  # noqa: E402

EOS = 256
ROWS = b'{"text": "a"}\n' * 99


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(folder)
    return folder


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(capsys, *argv):
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def build(capsys, dataset, tokenizer, out, *options):
    return run(capsys, "data", "build", "--dataset", dataset, "--tokenizer", tokenizer, "--out", out, *options)


def as_jsonl(folder):
    return write_rows(folder / "x.jsonl", ["a\nb", "c, d"])


def as_csv(folder):
    (folder / "x.csv").write_text('n,text\n1,"a\nb"\n2,"c, d"\n')
    return folder / "x.csv"


def as_parquet(folder):
    datasets.Dataset.from_dict({"text": ["a\nb", "c, d"]}).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def as_saved_folder(folder):
    datasets.Dataset.from_dict({"text": ["a\nb", "c, d"]}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_folder_of_text(folder):
    (folder / "texts").mkdir()
    (folder / "texts" / "2.txt").write_text("c, d")
    (folder / "texts" / "1.txt").write_text("a\nb")
    return folder / "texts"


def as_folder_of_jsonl(folder):
    (folder / "rows").mkdir()
    write_rows(folder / "rows" / "train.jsonl", ["a\nb", "c, d"])
    return folder / "rows"


@pytest.mark.parametrize("form", [as_jsonl, as_csv, as_parquet, as_saved_folder, as_folder_of_text, as_folder_of_jsonl])
def test_every_format_gives_its_texts(tmp_path, form):
    assert list(open_documents(str(form(tmp_path))).documents) == ["a\nb", "c, d"]


@pytest.mark.parametrize(
    ("unit", "documents"),
    [("document", ["a\nb\n\nc\n"]), ("paragraph", ["a\nb", "c\n"]), ("line", ["a", "b", "c"])],
)
def test_what_of_a_text_file_is_one_document(tmp_path, unit, documents):
    (tmp_path / "x.txt").write_text("a\nb\n\nc\n")
    assert list(open_documents(str(tmp_path / "x.txt"), text_unit=unit).documents) == documents


@pytest.mark.parametrize("form", [as_jsonl, as_parquet, as_saved_folder])
def test_rows_are_counted_where_that_is_cheap(tmp_path, form):
    assert open_documents(str(form(tmp_path))).num_rows == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"body": "a"}\n', "has no column 'text', only body: choose with --column_name"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "row 1 has nothing in column 'text'"),
        ("x.jsonl", b'{"text": 7}\n', "row 0 has the int 7 in column 'text'"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "does not read as a dataset: JSON parse error"),
        ("x.jsonl", b"", "does not open as a dataset: it is empty"),
        ("x.csv", b"text,n\na,1\n1,2,3,4\n", "does not read as a dataset: Error tokenizing data"),
        ("x.parquet", b"PAR1 and no more", "does not open as a dataset: "),
        ("x.txt", b"caf\xe9 x", "does not read as a dataset: 'utf-8' codec can't decode byte 0xe9"),
        ("x.jsonl", b'{"text": ""}\n', "would hold no tokens: add at least one document"),
        ("x.jsonl.gz", gzip.compress(ROWS, mtime=0)[:-9], "does not open as a dataset: Compressed file ended"),
        ("x.jsonl.xz", lzma.compress(ROWS)[:-9], "does not open as a dataset: Compressed file ended"),
        ("x.weird", b"a", "its suffix is none of .json"),
        ("x/y/z", None, "neither a file or folder nor a hub name"),
    ],
)
def test_bad_dataset_is_one_sentence_and_leaves_nothing(tmp_path, tokenizer, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "out").mkdir()
    code, _, error = build(capsys, tmp_path / name, tokenizer, tmp_path / "out" / "x")
    assert code == 2 and message in error and error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, tokenizer, capsys):
    code, _, error = build(capsys, "nothing.jsonl", tokenizer, tmp_path / "x")
    assert code == 2 and "neither a file or folder nor a hub name" in error


@pytest.mark.parametrize("options", [["--processes", "0"], ["--max_tokens", "1"], ["--ctxlen", "0"]])
def test_options_out_of_range_are_refused(tmp_path, tokenizer, capsys, options):
    code, _, error = build(capsys, as_jsonl(tmp_path), tokenizer, tmp_path / "out", *options)
    assert code == 2 and f"{options[0]} must be" in error


def test_missing_library_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'radlads\[data\]'"):
        open_documents(str(as_jsonl(tmp_path)))


@pytest.mark.parametrize("limit", [[], ["--max_tokens", "30001"]])
def test_processes_do_not_change_the_files(tmp_path, tokenizer, capsys, limit):
    dataset = write_rows(tmp_path / "x.jsonl", [f"document {i} " * (i % 9 + 1) for i in range(2000)])
    for processes in (1, 2):
        code, *_ = build(capsys, dataset, tokenizer, tmp_path / f"out{processes}", "--processes", processes, *limit)
        assert code == 0
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"out1.{suffix}").read_bytes() == (tmp_path / f"out2.{suffix}").read_bytes()


def test_bad_row_stops_the_workers_and_leaves_nothing(tmp_path, tokenizer, capsys):
    dataset = write_rows(tmp_path / "x.jsonl", [*["a document"] * 3000, None])
    code, _, error = build(capsys, dataset, tokenizer, tmp_path / "out" / "x", "--processes", 2)
    assert code == 2 and "row 3000 has nothing" in error
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, tokenizer, capsys, processes):
    dataset = write_rows(tmp_path / "x.jsonl", ["a document of some length"] * 4000)
    (tmp_path / "out").mkdir()
    with largest_file(50_000):
        code, _, error = build(capsys, dataset, tokenizer, tmp_path / "out" / "x", "--processes", processes)
    assert code == 2 and error == f"radlads: {tmp_path}/out/x.bin: File too large\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_script_builds_checks_and_describes(tmp_path, tokenizer, capsys, monkeypatch):
    write_rows(tmp_path / "my.data.jsonl", ["first text " * 9, "x", "last text"])
    monkeypatch.chdir(tmp_path)
    options = ["--dataset", "my.data.jsonl", "--tokenizer", tokenizer, "--ctxlen", "8"]
    for action in ("build", "check"):
        assert run_script(monkeypatch, "make_data_hf.py", *options, "--action", action) == 0
        said = capsys.readouterr().out
        assert "my: 112 tokens in 3 documents, uint16" in said
        assert "magic prime 11 at ctx_len 8" in said
        assert "last document, 10 tokens: 'last text<|end|>'" in said
    code, out, _ = run(capsys, "data", "info", tmp_path / "my.bin")
    assert code == 0 and "magic prime none, the corpus is too short at ctx_len 256" in out
    assert "64 to          127            1 #" in out and "first document, 100 tokens: " in out


def test_check_refuses_documents_without_eos_and_fixeos_mends_them(tmp_path, tokenizer, capsys):
    stem = tmp_path / "x"
    with BinIdxWriter(stem, 260) as writer:
        for ids in ([5, 0, 0], [7, EOS], [], [0, 9, 0]):
            writer.add_document(np.array(ids, dtype=np.int32))
    where = ["--dataset", "unused", "--tokenizer", tokenizer, "--out", stem]
    code, _, error = run(capsys, "data", "check", *where)
    assert code == 2 and "3 of 4 documents do not end in the tokenizer's EOS, 256: run fixeos" in error
    code, out, _ = run(capsys, "data", "fixeos", *where)
    assert code == 0 and "2 of 4 documents ended in 0 and now end in 256" in out
    assert BinIdxReader(stem).tokens.tolist() == [5, 0, EOS, 7, EOS, 0, 9, EOS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.fixture
def built(tmp_path, tokenizer, capsys):
    """A corpus that data build wrote, by the options of data check, and its name."""
    rows = write_rows(tmp_path / "rows.jsonl", ["ab", "c"])
    where = ["--dataset", rows, "--tokenizer", tokenizer, "--out", tmp_path / "x"]
    assert run(capsys, "data", "build", *where)[0] == 0
    return where, tmp_path / "x"


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_a_flipped_bit_of_a_built_corpus_is_noticed(built, capsys, kind):
    where, stem = built
    for name in (stem, f"{stem}.{kind}"):
        code, out, _ = run(capsys, "verify", name)
        assert code == 0 and out.endswith(f"\n{stem}.checksums.json: all 2 files are as described\n")
    path = stem.with_suffix(f".{kind}")
    content = bytearray(path.read_bytes())
    content[0 if kind == "bin" else -1] ^= 1
    path.write_bytes(bytes(content))
    code, out, _ = run(capsys, "verify", stem)
    assert code == 1
    assert f"\n{path} is not the file its x.checksums.json describes (its SHA-256 is another one)\n" in out
    code, _, error = run(capsys, "data", "check", *where)
    assert code == 2 and str(path) in error


def test_a_corpus_that_is_written_again_has_checksums_of_its_own_or_none(built, tokenizer, capsys):
    _, stem = built
    before = stem.with_name("x.checksums.json").read_bytes()
    eos_is_another = ["--dataset", "x", "--tokenizer", tokenizer, "--out", stem]
    replace_trailing(BinIdxReader(stem), old=EOS, new=0)
    assert stem.with_name("x.checksums.json").read_bytes() != before
    assert run(capsys, "verify", stem)[0] == 0
    assert run(capsys, "data", "fixeos", *eos_is_another)[0] == 0
    assert stem.with_name("x.checksums.json").read_bytes() == before
    with BinIdxWriter(stem, 260) as writer:
        writer.add_document([5, EOS])
    assert run(capsys, "verify", stem)[0] == 2


def test_fixeos_on_a_full_disk_keeps_the_corpus(tmp_path, tokenizer, capsys):
    stem = tmp_path / "x"
    with BinIdxWriter(stem, 260) as writer:
        writer.add_document([5] * 50_000 + [0])
    with largest_file(1000):
        code, _, error = run(capsys, "data", "fixeos", "--dataset", "x", "--tokenizer", tokenizer, "--out", stem)
    assert code == 2 and error == f"radlads: {stem}.bin: File too large\n"
    assert BinIdxReader(stem).document(0)[-1] == 0 and len(list(tmp_path.iterdir())) == 2


def test_check_names_a_token_beyond_the_vocabulary(tmp_path, tokenizer, capsys):
    with BinIdxWriter(tmp_path / "x", 300) as writer:
        writer.add_document([5, 290, EOS])
    code, _, error = run(capsys, "data", "check", "--dataset", "x", "--tokenizer", tokenizer, "--out", tmp_path / "x")
    assert code == 2 and "x.bin: token 1 is 290, outside" in error


@pytest.mark.parametrize("name", ["nothing", "."])
def test_info_of_no_corpus_is_one_sentence(tmp_path, capsys, name):
    code, _, error = run(capsys, "data", "info", tmp_path / name)
    assert code == 2 and error.count("\n") == 1
