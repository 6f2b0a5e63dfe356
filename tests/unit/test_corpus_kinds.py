"""Files as real corpora have them: each gives its texts, or one sentence with its file and row; nothing is lost in
silence."""

import bz2
import functools
import gzip
import json
import lzma
import random
import tracemalloc
import zipfile
from types import SimpleNamespace

import pytest

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")
fsspec = pytest.importorskip("fsspec")

from pyarrow import parquet  # noqa: E402

from radlads.data.datasets_source import open_documents  # noqa: E402

ROWS = b'{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n'
COMPRESS = {
    ".gz": functools.partial(gzip.compress, mtime=0),
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    "": bytes,
}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def put_rows(path, rows):
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def put_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def texts(path, **options):
    return list(open_documents(str(path), **options).documents)


def left_out(path, **options):
    source = open_documents(str(path), **options)
    return list(source.documents), str(source.left_out)


def refusal(path, **options):
    with pytest.raises(ValueError) as caught:
        texts(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("change", [{"n": 1, "extra": "x"}, {"n": {"deep": 1}}, {"n": "text now"}, {"n": [1, "two"]}])
def test_what_other_columns_hold_may_change_after_the_first_block(tmp_path, change):
    path = put_rows(
        tmp_path / "x.jsonl", [*[{"text": "a" * 3000, "n": i} for i in range(4000)], {"text": "z"} | change]
    )
    found = texts(path)
    assert len(found) == 4001 and found[-1] == "z"


def test_files_of_a_folder_may_have_other_columns(tmp_path):
    put_rows(tmp_path / "1.jsonl", [{"text": "a"}])
    put_rows(tmp_path / "2.jsonl", [{"text": "b", "meta": {"z": 1}}])
    assert texts(tmp_path) == ["a", "b"]


def test_parquet_files_may_have_other_columns_and_types(tmp_path):
    put_table(tmp_path / "1.parquet", {"text": ["a", "b", "c"], "n": [1, 2, 3]})
    large = pyarrow.array(["d", None], pyarrow.large_string())
    put_table(tmp_path / "2.parquet", {"n": ["x", "y"], "text": large, "z": [{"q": 1}, None]})
    put_table(tmp_path / "3.parquet", {"text": pyarrow.array(["e"]).dictionary_encode()})
    assert left_out(tmp_path) == (["a", "b", "c", "d", "e"], "left out: 1 null text")


@pytest.mark.parametrize("packing", COMPRESS)
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", ROWS),
        (".ndjson", ROWS),
        (".json", b'[{"text": "a"},\n {"text": "b"}, {"text": "c"}]'),
        (".json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}{"text": "c"}'),
        (".json", b'["a", "b", "c"]'),
        (".csv", b'n,text\n1,a\n\n2,"b"\n3,c'),
        (".tsv", b"n\ttext\n1\ta\n2\tb\n3\tc\n"),
    ],
)
def test_rows_of_any_kind_compressed_in_any_way(tmp_path, suffix, content, packing):
    assert texts(put(tmp_path / f"x{suffix}{packing}", COMPRESS[packing](content))) == ["a", "b", "c"]


@pytest.mark.parametrize("packing", COMPRESS)
def test_several_compressed_parts_are_one_file(tmp_path, packing):
    assert texts(put(tmp_path / f"x.jsonl{packing}", COMPRESS[packing](ROWS) * 3)) == ["a", "b", "c"] * 3


@pytest.mark.parametrize("packing", [".gz", ".zst", ".xz", ".bz2"])
def test_a_file_that_is_cut_short_is_named_with_its_last_whole_row(tmp_path, packing):
    rows = b"".join(b'{"text": "%s"}\n' % bytes(str(i**9), "ascii") for i in range(30_000))
    path = put(tmp_path / f"x.jsonl{packing}", COMPRESS[packing](rows)[:-9])
    assert f"{path} does not read beyond row " in (said := refusal(path))
    assert "Compressed file ended before the end" in said and said.endswith("it is damaged, copy or download it again")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r\\nc"}', ["a", "b\r\nc"]),
        ("x.jsonl", b'{"text": "a"} {"text": "b"}\n  {"text": "c\\u0000"}\n', ["a", "b", "c\0"]),
        ("x.jsonl", b'{"text": "a", "raw": "\xff\\ud800"}\n', ["a"]),
        ("x.json", b" \n[\n]\n", []),
        ("x.csv", b'\xef\xbb\xbftext,n\r\nnull,1\r\n"a ""b""\r\nc",2\r\nNA', ["null", 'a "b"\r\nc', "NA"]),
        ("x.csv", b"n,text\n1,2020\n2,1e5,\n", ["2020", "1e5"]),
        ("x.csv", b"n,text\n\xff,a\n", ["a"]),
        ("x.txt", b"\xef\xbb\xbfa\r\nb", ["a\nb"]),
    ],
)
def test_marks_and_ends_of_lines(tmp_path, name, content, expected):
    assert texts(put(tmp_path / name, content)) == expected


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "saved"])
def test_null_and_empty_texts_are_left_out_and_counted(tmp_path, name):
    held = ["a", None, "", "b", None]
    if name == "x.jsonl":
        put(tmp_path / name, '{"text":"a"}\n{"n":1}\n{"text":""}\n{"text":"b"}\n{"text":NaN}\n')
    elif name == "x.parquet":
        put_table(tmp_path / name, {"text": held})
    else:
        datasets.Dataset.from_dict({"text": held, "n": range(5)}).save_to_disk(tmp_path / name)
    assert left_out(tmp_path / name) == (["a", "b"], "left out: 2 null texts, 1 empty text")
    assert f"{tmp_path / name}: row 1 has nothing in column 'text'" in refusal(tmp_path / name, strict=True)


def test_strict_names_the_row_and_line_of_an_empty_text(tmp_path):
    path = put(tmp_path / "x.csv", 'text,n\n"a\nb",1\n"",2\n')
    assert f"{path}: row 1 has an empty text in column 'text' (line 4): mend" in refusal(path, strict=True)


def test_empty_files_among_others_are_left_out_and_counted(tmp_path):
    put(tmp_path / "1.jsonl", b"")
    put(tmp_path / "2.jsonl.gz", gzip.compress(b"", mtime=0))
    put(tmp_path / "3.jsonl", ROWS)
    put(tmp_path / "4.jsonl.xz", b"")
    put(tmp_path / "5.jsonl.zst", zstandard.compress(b"\n"))
    assert left_out(tmp_path) == (["a", "b", "c"], "left out: 4 files without rows")
    assert "1.jsonl has no rows: remove it, or leave out --strict" in refusal(tmp_path, strict=True)


@pytest.mark.parametrize("kind", ["x.parquet", "x.csv", "x.txt"])
def test_a_dataset_without_rows_gives_no_text(tmp_path, kind):
    if kind == "x.parquet":
        put_table(tmp_path / kind, {"text": pyarrow.array([], pyarrow.string())})
    else:
        put(tmp_path / kind, {"x.csv": b"text\n", "x.txt": b"\xef\xbb\xbf"}[kind])
    assert left_out(tmp_path / kind) == ([], "left out: 1 file without rows")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            b'{"text": ["a"]}\n',
            "x.jsonl: row 0 has the list ['a'] in column 'text' (line 1): mend or remove",
        ),
        ("x.jsonl", b'{"text": "a"}\n{"text": 7}', "x.jsonl: row 1 has the int 7 in column 'text' (line 2)"),
        ("x.jsonl", b'{"text": "a"}\n7\n', "x.jsonl: row 1 is no object but the int 7 (line 2)"),
        ("x.jsonl", b'{"text": "\xe9"}\n', "row 0 has text that is not valid Unicode (byte 0xe9 at character 0)"),
        ("x.jsonl", b'{"text": "a\\ud83d"}\n', "row 0 has text that is not valid Unicode (U+D83D at character 1)"),
        ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), "x.jsonl is UTF-16: save it as UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b', "x.jsonl: line 2 is not valid JSON (Unterminated string starting"),
        ("x.json", b'[{"text": "a"},\n{"text": ]', "x.json: line 2 is not valid JSON (Expecting value)"),
        ("x.jsonl", b'[{"text": "a"}]\n[{"text": "b"}]', "x.jsonl has more after the end of its array on line 1: keep"),
        ("x.json", b'[{"text": "a"},', "x.json ends inside its array: it is cut short"),
        ("x.json", b'{"data": {"rows": 1}, "n": 2}', "x.json has no column 'text', only data.rows, n: choose with"),
        (
            "x.csv",
            b'text,n\na,1\n"b,2\nc,3\n',
            "x.csv has a quote that is never closed, in the row that begins on line 3",
        ),
        ("x.csv", b"content,n\na,1\n", "x.csv has no column 'text', only content, n: choose with --column_name"),
        # Without mtime=0 the bytes, and so the test's name, would depend on the second: xdist's workers would disagree
        (
            "x.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            "a compressed .parquet file cannot be read: decompress it first",
        ),
        ("x.jsonl.gz", b"no gzip", "x.jsonl.gz does not read from its start: Not a gzipped file"),
        ("x.jsonl.zst", b"no zstd", "x.jsonl.zst does not read from its start: zstd decompressor error"),
    ],
)
def test_what_does_not_read_is_one_sentence_with_file_and_place(tmp_path, name, content, message):
    assert message in refusal(put(tmp_path / name, content))


def test_an_empty_split_that_was_saved_harms_no_other(tmp_path):
    splits = {"train": datasets.Dataset.from_dict({"text": ["a"]})}
    splits["test"] = splits["train"].select([])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["a"]
    assert "does not open as a dataset: it was saved without rows" in refusal(tmp_path / "saved", split="test")
    assert "it has no split 'dev', only test, train" in refusal(tmp_path / "saved", split="dev")


def put_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("folder", [True, False])
def test_an_archive_is_read_file_by_file(tmp_path, folder):
    members = {
        "1.jsonl": b'{"text": "a"}',
        "b/1.jsonl.gz": gzip.compress(ROWS, mtime=0),
        "b/2.jsonl": b'{"text": "z", "n": {}}',
    }
    beside = {"__MACOSX/._1": b"", ".hidden.jsonl": ROWS, "empty.jsonl": b"", "README.md": b"Three files"}
    path = put_zip(tmp_path / "x.zip", members | beside)
    found, said = left_out(tmp_path if folder else path)
    assert found == ["a", "a", "b", "c", "z"] and said == "left out: 1 file without rows"


def test_an_archive_that_is_empty_or_none_or_damaged(tmp_path):
    assert left_out(put_zip(tmp_path / "x.zip", {})) == ([], "left out: 1 file without rows")
    assert "y.zip does not read as an archive: File is not a zip file" in refusal(put(tmp_path / "y.zip", b"PK"))
    content = bytearray(put_zip(tmp_path / "z.zip", {"1.jsonl": ROWS}).read_bytes())
    content[50] ^= 1
    assert "z.zip/1.jsonl does not read " in refusal(put(tmp_path / "z.zip", bytes(content)))


def test_files_elsewhere_are_read_as_those_on_disk(monkeypatch):
    """As those of a hub dataset are, through the library's own way of opening them."""
    with fsspec.open("memory://x/1.jsonl.zst", "wb") as file:
        file.write(zstandard.compress(ROWS + b'{"text": null}\n'))
    with fsspec.open("memory://x/2.parquet", "wb") as file:
        parquet.write_table(pyarrow.table({"text": ["d"], "n": [1]}), file)
    config = datasets.packaged_modules.json.JsonConfig()
    config.data_files = {"train": ["memory://x/1.jsonl.zst", "memory://x/2.parquet"]}
    builder = SimpleNamespace(config=config, info=SimpleNamespace(splits=None))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, subset: builder)
    assert left_out("owner/name") == (["a", "b", "c", "d"], "left out: 1 null text")
    assert "memory://x/1.jsonl.zst: row 3 has nothing" in refusal("owner/name", strict=True)


def test_a_deeply_nested_row_is_no_traceback(tmp_path):
    path = put(tmp_path / "x.jsonl", b'{"text": "a"}\n{"n": ' + b"[" * 200_000)
    assert "x.jsonl: line 2 is not valid JSON" in refusal(path)


def test_a_column_that_a_later_file_lacks_is_named_with_those_it_has(tmp_path):
    put_rows(tmp_path / "1.jsonl", [{"text": "a"}])
    put_rows(tmp_path / "2.jsonl", [{"content": "b", "n": 1}, {"content": "c", "url": {"host": "h"}}])
    assert "2.jsonl has no column 'text', only content, n, url.host: choose with" in refusal(tmp_path)
    put_table(tmp_path / "parquet" / "x.parquet", {"content": ["a"], "meta": [{"url": "u"}]})
    assert "x.parquet has no column 'text', only content, meta.url: choose" in refusal(tmp_path / "parquet")


def test_a_column_may_come_late_but_not_never(tmp_path):
    late = [{"n": 0}] * 900 + [{"text": "a"}]
    assert left_out(put_rows(tmp_path / "late.jsonl", late)) == (["a"], "left out: 900 null texts")
    never = put_rows(tmp_path / "never.jsonl", [{"n": 0}] * 1000 + [{"text": "a"}])
    assert "never.jsonl has no column 'text', only n" in refusal(never, strict=True)


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "saved", "x.arrow"])
def test_a_column_may_be_a_path(tmp_path, name):
    rows = [
        {"id": 1, "meta": {"text": "a", "n": 1}},
        {"id": 2, "meta": None},
        {"id": 3, "meta": {"text": None, "n": 2}},
    ]
    table = pyarrow.Table.from_pylist(rows)
    if name == "x.jsonl":
        put_rows(tmp_path / name, rows)
    elif name == "x.parquet":
        parquet.write_table(table, tmp_path / name)
    elif name == "saved":
        datasets.Dataset(table).save_to_disk(tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    assert left_out(tmp_path / name, column="meta.text") == (["a"], "left out: 2 null texts")
    assert "has no column 'meta.body', only id, meta.text, meta.n" in refusal(tmp_path / name, column="meta.body")


def test_a_path_may_end_in_a_null_at_any_depth(tmp_path):
    rows = [{"a": {"b": None}}, {"a": None}, {"a": {"b": {"text": None}}}, {"a": {"b": {"text": "t"}}}]
    jsonl = put_rows(tmp_path / "x.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for path in (jsonl, tmp_path / "x.parquet"):
        assert left_out(path, column="a.b.text") == (["t"], "left out: 3 null texts")
    nulls = put_rows(tmp_path / "nulls.jsonl", rows[:3])
    assert left_out(nulls, column="a.b.text") == ([], "left out: 3 null texts")


def test_a_name_with_a_dot_comes_before_a_path(tmp_path):
    rows = [{"meta.text": "a", "meta": {"text": "b"}}]
    assert texts(put_rows(tmp_path / "x.jsonl", rows), column="meta.text") == ["a"]
    table = {"meta.text": ["a"], "meta": [{"text": "b"}]}
    assert texts(put_table(tmp_path / "x.parquet", table), column="meta.text") == ["a"]


def beside(folder):
    """What lies in folders of datasets beside the data."""
    for name in ("_SUCCESS", ".gitattributes", ".part-0.txt.crc", ".cache/huggingface/x.txt.metadata", "LICENSE"):
        put(folder / name, b"no data")
    put(folder / ".hidden" / "x.jsonl", ROWS)
    put(folder / "README.md", b"---\nlicense: mit\n---\n# About\n")
    put(folder / "dataset_infos.json", b"{}")


def test_what_lies_beside_the_shards_is_no_data(tmp_path):
    for part in ("b", "a"):
        put(tmp_path / "rows" / part / "part-0.jsonl", f'{{"text": "{part}"}}')
        put(tmp_path / "texts" / part / "part-0.txt", f"{part}\n{part}")
    beside(tmp_path / "rows")
    beside(tmp_path / "texts")
    assert left_out(tmp_path / "rows") == (["a", "b"], "")
    assert left_out(tmp_path / "texts", strict=True) == (["a\na", "b\nb"], "")


def test_a_folder_of_markdown_keeps_its_readme(tmp_path):
    put(tmp_path / "README.md", "first")
    put(tmp_path / "usage.md", "second")
    assert texts(tmp_path) == ["first", "second"]


def test_files_of_another_kind_or_of_no_split_are_counted(tmp_path):
    put(tmp_path / "a.jsonl", ROWS)
    put(tmp_path / "b.jsonl", ROWS)
    put(tmp_path / "stats.csv", b"text\nz\n")
    assert left_out(tmp_path) == (["a", "b", "c"] * 2, "left out: 1 file of another kind or of no split")
    assert "stats.csv is of another kind or of no split: remove it" in refusal(tmp_path, strict=True)


def test_splits_of_a_folder_stay_apart(tmp_path):
    put(tmp_path / "train.jsonl", b'{"text": "a"}\n')
    put(tmp_path / "test.jsonl", b'{"text": "b"}\n')
    assert left_out(tmp_path, strict=True) == (["a"], "") and texts(tmp_path, split="test") == ["b"]
    assert "it has no split 'dev', only train, test: choose with --split" in refusal(tmp_path, split="dev")


@pytest.mark.parametrize(("unit", "expected"), [("document", ["a\n\nb"]), ("line", ["a", "b"])])
def test_a_folder_that_its_card_describes_reads_by_the_unit_that_is_asked_for(tmp_path, unit, expected):
    put(tmp_path / "data" / "x.txt", b"a\n\nb")
    put(tmp_path / "other.jsonl", b"not read")
    put(tmp_path / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: data/*.txt\n---\n")
    assert texts(tmp_path, text_unit=unit) == expected


def test_a_folder_whose_card_sets_how_to_read_is_left_to_the_library(tmp_path):
    put(tmp_path / "x.csv", b"a;1\n;2\nb;3\n")
    put(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files: x.csv\n  sep: ;\n  names: [text, n]\n---\n",
    )
    assert left_out(tmp_path) == (["a", "b"], "left out: 1 null text")
    assert "row 1 has nothing in column 'text'" in refusal(tmp_path, strict=True)


def test_a_document_of_a_few_megabytes(tmp_path):
    long = "word " * 800_000
    assert texts(put_rows(tmp_path / "x.jsonl", [{"text": long}, {"text": "b"}])) == [long, "b"]
    assert texts(put(tmp_path / "x.json", json.dumps([{"text": long}, {"text": "b"}]))) == [long, "b"]
    assert texts(put(tmp_path / "x.csv", f'text\n"{long}"\nb\n')) == [long, "b"]


def test_what_is_too_long_for_a_document_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("radlads.data.text_rows._LARGEST_DOCUMENT", 100)
    lines = put_rows(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b" * 100}])
    assert "x.jsonl: line 2 is longer than 100 characters: split or remove it" in refusal(lines)
    long = put(tmp_path / "x.txt", b"a" * 101)
    assert "x.txt is too large to be one document: choose a smaller --text_unit" in refusal(long)
    assert "x.txt: line 1 is longer" in refusal(long, text_unit="line")


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".json", ".csv.gz", ".txt"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    row = {".jsonl.zst": b'{"text": "%s"}\n', ".json": b'{"text":\n"%s"}\n', ".csv.gz": b"%s\n", ".txt": b"%s\n\n"}
    rows = random.Random(0)
    content = b"text\n" * suffix.startswith(".csv") + b"".join(
        row[suffix] % rows.randbytes(5000).hex().encode() for _ in range(3000)
    )
    packing = suffix[suffix.rindex(".") :]
    path = put(tmp_path / f"x{suffix}", COMPRESS.get(packing, bytes)(content))
    tracemalloc.start()
    count = sum(1 for _ in open_documents(str(path), text_unit="paragraph").documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000 and peak < 16e6 < len(content)
