"""The text column of one file, row by row: JSON, CSV, Parquet, Arrow and plain text, also compressed.

Owns the formats. Only the text column is looked at: what other columns hold, and whether it changes from row to row,
does not matter. Leaves which files there are to `datasets_source.py`, what becomes of empty texts to `documents.py`.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO, Literal, NamedTuple

from radlads.data import compressed

TextUnit = Literal["document", "paragraph", "line"]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".md")
TEXT_SUFFIXES = (".txt", ".md")

_LARGEST_DOCUMENT = 2**26  # characters; a longer line or file is no document but a mistake, and would fill the memory
_READ_CHARACTERS = 2**20
_ROWS_AT_A_TIME = 256
_ROWS_TO_MEET_THE_COLUMN = 1000
_COLUMNS_SHOWN = 20
_MISSING = object()
_BETWEEN_VALUES = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")


class Cell(NamedTuple):
    """What a row holds in the text column; None if nothing. Rows count from 0, lines, where a file has them, from 1."""

    row: int
    line: int | None
    value: Any


@dataclass(frozen=True)
class SourceFile:
    """A file on disk or elsewhere. name: its path or URL, by whose suffix it is read."""

    name: str
    open: Callable[[], BinaryIO]

    @property
    def suffix(self) -> str:
        """Of the file that is compressed, if it is."""
        return suffix_of(self.name)


def suffix_of(name: str) -> str:
    """The suffix that says what a file is, in lower case, less the one of its compression."""
    path = PurePath(name)
    return PurePath(path.stem if path.suffix.lower() in compressed.SUFFIXES else path.name).suffix.lower()


def read_cells(file: SourceFile, column: str, text_unit: TextUnit, delimiter: str = ",") -> Iterator[Cell]:
    """Yield the cell of every row of a file whose suffix is one of SUFFIXES. `column` may be a path, as in `meta.text`.

    A row that lacks the column has None there. `text_unit`: what of a plain text file is a row; `delimiter`: of a .csv.
    At most one row, or one block of a Parquet file's text column, is in memory. Raises ValueError, naming the file and
    the row, if the file is damaged, cut short, or not what its suffix says, or if the column is not in it.
    """
    row = -1
    try:
        with file.open() as opened:
            if opened.read(1):
                opened.seek(0)
                for cell in _cells_of(file, opened, column, text_unit, delimiter):
                    row = cell.row
                    yield cell
    except (csv.Error, NotImplementedError, *compressed.DAMAGE) as error:
        where = f"beyond row {row}" if row >= 0 else "from its start"
        remedy = "" if isinstance(error, OSError) and error.errno else ": it is damaged, copy or download it again"
        raise ValueError(f"{file.name} does not read {where}: {first_line(error)}{remedy}") from error


def _cells_of(file: SourceFile, opened: BinaryIO, column: str, text_unit: TextUnit, delimiter: str) -> Iterator[Cell]:
    name, suffix, packing = file.name, file.suffix, PurePath(file.name).suffix.lower()
    if suffix in (".parquet", ".arrow"):
        if packing in compressed.SUFFIXES:
            raise ValueError(f"{name}: a compressed {suffix} file cannot be read: decompress it first")
        return _column_cells(name, _parquet_tables if suffix == ".parquet" else _arrow_tables, opened, column)
    stream = io.BufferedReader(compressed.decompressed(opened, packing))  # type: ignore[type-var]
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{name} is UTF-16: save it as UTF-8")
    # A byte that is not UTF-8 becomes half of a surrogate pair, which matters only if it is in the text
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="" if suffix in (".csv", ".tsv") else None)
    if suffix in (".csv", ".tsv"):
        return _csv_cells(name, text, column, "\t" if suffix == ".tsv" else delimiter)
    if suffix in TEXT_SUFFIXES:
        if column != "text":
            raise _no_column(name, column, ["text"])
        return (Cell(row, None, value) for row, value in enumerate(_units(name, text, text_unit)))
    return _json_cells(name, _json_rows(name, text), column)


def _json_cells(name: str, rows: Iterable[tuple[int, Any]], column: str) -> Iterator[Cell]:
    """The cells of rows with their lines, once one of the first rows is known to have the column."""
    lacking: list[Cell] | None = []  # the rows before the first that has the column
    keys: dict[str, None] = {}
    for row, (line, content) in enumerate(rows):
        if not isinstance(content, (dict, str)):
            raise ValueError(f"{name}: row {row} is no object but the {_shown(content)} (line {line})")
        value = content if isinstance(content, str) else _cell_of(content, column)
        cell = Cell(row, line, None if value is _MISSING else value)
        if lacking is not None and value is _MISSING:
            keys |= dict.fromkeys(_columns(content))
            lacking.append(cell)
            if len(lacking) == _ROWS_TO_MEET_THE_COLUMN:
                break
            continue
        if lacking is not None:
            yield from lacking
            lacking = None
        yield cell
    if lacking:
        raise _no_column(name, column, keys)


def _json_rows(name: str, text: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    """Rows with the line each begins on: of JSON lines, of one array, or of objects that span lines."""
    lines = _numbered_lines(name, text)
    number, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if not first.lstrip().startswith("[") and _is_json(first):
        yield from _parsed_line(name, number, first)
        for number, line in lines:
            yield from _parsed_line(name, number, line)
    else:
        yield from _parsed_stream(name, text, number, first)


def _parsed_line(name: str, number: int, line: str) -> Iterator[tuple[int, Any]]:
    """The values on one line, usually one."""
    decoder, line, position = json.JSONDecoder(), line.strip(), 0
    while position < len(line):
        try:
            value, position = decoder.raw_decode(line, position)
        except (ValueError, RecursionError) as error:
            raise _not_json(name, number, error) from error
        yield number, value
        position = _end_of(_SPACE, line, position)


def _parsed_stream(name: str, text: io.TextIOWrapper, line: int, buffer: str) -> Iterator[tuple[int, Any]]:
    """The items of an array, or values one after another; `buffer` is what was read before, from `line` on."""
    decoder, position = json.JSONDecoder(), _end_of(_SPACE, buffer, 0)
    in_array = buffer.startswith("[", position)
    position += in_array
    while True:
        start = _end_of(_BETWEEN_VALUES, buffer, position)
        line, position = line + buffer.count("\n", position, start), start
        if in_array and buffer.startswith("]", position):
            return
        try:
            value, end = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:
            waiting = buffer[position:]
            more = text.read(max(_READ_CHARACTERS, len(waiting))) if len(waiting) <= _LARGEST_DOCUMENT else ""
            if not more and not waiting:
                if in_array:
                    raise ValueError(f"{name} ends inside its array: it is cut short, copy it again") from error
                return
            if not more:
                raise _not_json(name, line, error) from error
            buffer, position = waiting + more, 0
            continue
        yield line, value
        line, position = line + buffer.count("\n", position, end), end


def _csv_cells(name: str, text: io.TextIOWrapper, column: str, delimiter: str) -> Iterator[Cell]:
    rows = _csv_rows(name, text, delimiter)
    _, header = next(rows, (1, []))
    if column not in header:
        raise _no_column(name, column, header)
    index = header.index(column)
    for row, (line, fields) in enumerate(rows):
        if any(fields[len(header) :]):
            raise ValueError(
                f"{name}: row {row} has {len(fields)} fields, and the header {len(header)} (line {line}): "
                "put quotes around a text with a delimiter in it"
            )
        yield Cell(row, line, fields[index] if index < len(fields) else None)


def _csv_rows(name: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Every row that is not blank, the header included, with the line it begins on."""
    csv.field_size_limit(_LARGEST_DOCUMENT)
    ended: list[bool] = []

    def lines() -> Iterator[str]:
        yield from (line for _, line in _numbered_lines(name, text))
        ended.append(True)

    line, reader = 1, csv.reader(lines(), delimiter=delimiter)
    for fields in reader:
        if ended:  # in the middle of this row
            raise ValueError(f"{name} has a quote that is never closed, in the row that begins on line {line}")
        if fields:
            yield line, fields
        line = reader.line_num + 1


def _units(name: str, text: io.TextIOWrapper, text_unit: TextUnit) -> Iterator[str]:
    if text_unit == "line":
        yield from (line.removesuffix("\n") for _, line in _numbered_lines(name, text))
        return
    rest = ""
    while read := text.read(_READ_CHARACTERS):
        rest += read
        if text_unit == "paragraph":
            *whole, rest = rest.split("\n\n")
            yield from filter(None, whole)
        if len(rest) > _LARGEST_DOCUMENT:
            raise ValueError(f"{name} is too large to be one document: choose a smaller --text_unit")
    if rest:
        yield rest


def _column_cells(name: str, tables: Callable[..., Any], opened: BinaryIO, column: str) -> Iterator[Cell]:
    """The cells of a format that holds columns, read by pyarrow."""
    from pyarrow import ArrowException

    row = 0
    try:
        for batch in tables(name, opened, column):
            for content in batch.to_pylist():
                yield Cell(row, None, cell_of(name, content, column))
                row += 1
    except ArrowException as error:
        raise OSError(first_line(error)) from error


def _parquet_tables(name: str, opened: BinaryIO, column: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # Buffered by pages: a row group's column may be larger than memory
    file = ParquetFile(opened, buffer_size=2**22, pre_buffer=False)
    check_columns(name, file.schema_arrow, column)
    yield from file.iter_batches(_ROWS_AT_A_TIME, columns=[column])


def _arrow_tables(name: str, opened: BinaryIO, column: str) -> Iterator[Any]:
    """Record batches of an Arrow file, in the format of streams (as datasets writes it) or of files."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_stream(opened)
    except pyarrow.ArrowInvalid:
        opened.seek(0)
        file = pyarrow.ipc.open_file(opened)
        reader = pyarrow.RecordBatchReader.from_batches(
            file.schema, map(file.get_batch, range(file.num_record_batches))
        )
    check_columns(name, reader.schema, column)
    top = column if column in reader.schema.names else column.split(".")[0]
    for batch in reader:
        for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
            yield batch.select([top]).slice(start, _ROWS_AT_A_TIME)


def check_columns(name: str, schema: Any, column: str) -> None:
    """Raise ValueError, with the columns there are, if an Arrow schema has no such column."""
    empty = {field.name: _empty_of(field.type) for field in schema}
    if _cell_of(empty, column) is _MISSING:
        raise _no_column(name, column, _columns(empty))


def _empty_of(arrow_type: Any) -> Any:
    """Nested dictionaries with the names of a struct's fields; None for any other type."""
    from pyarrow.types import is_struct

    return {field.name: _empty_of(field.type) for field in arrow_type} if is_struct(arrow_type) else None


def cell_of(name: str, row: dict[str, Any], column: str) -> Any:
    """What a row of `name` holds in a column, None below a null. Raises ValueError, with the columns there are, if it
    has no such one."""
    value = _cell_of(row, column)
    if value is _MISSING and row.get(column.split(".")[0], _MISSING) is not None:
        raise _no_column(name, column, _columns(row))
    return None if value is _MISSING else value


def _cell_of(row: dict[str, Any], column: str) -> Any:
    """What a row has under the column's name or, if it has no such key, at the path that the name spells."""
    if column in row or "." not in column:
        return row.get(column, _MISSING)
    top, rest = column.split(".", 1)
    below = row.get(top)
    return _cell_of(below, rest) if isinstance(below, dict) else _MISSING


def _columns(row: dict[str, Any]) -> Iterator[str]:
    """The names of a row's columns, those of nested ones as paths."""
    for key, value in row.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{below}" for below in _columns(value))
        else:
            yield key


def _numbered_lines(name: str, text: io.TextIOWrapper) -> Iterator[tuple[int, str]]:
    """Lines from 1, with their ends. Raises ValueError at one that is too long to be a document."""
    for number, line in enumerate(iter(lambda: text.readline(_LARGEST_DOCUMENT + 1), ""), 1):
        if len(line) > _LARGEST_DOCUMENT:
            raise ValueError(
                f"{name}: line {number} is longer than {_LARGEST_DOCUMENT:,} characters: split or remove it"
            )
        yield number, line


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None
    return match.end()


def _no_column(name: str, column: str, columns: Iterable[str]) -> ValueError:
    names = [f"{' '.join(each.split()):.40}" for each in columns]
    shown = ", ".join([*names[:_COLUMNS_SHOWN], *(["..."] if len(names) > _COLUMNS_SHOWN else [])])
    return ValueError(f"{name} has no column {column!r}, only {shown or 'unnamed ones'}: choose with --column_name")


def _not_json(name: str, line: int, error: Exception) -> ValueError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
    return ValueError(f"{name}: line {line} is not valid JSON ({reason}): mend or remove it")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
