"""The text column of one file, row by row: JSON, CSV, Parquet, Arrow and plain text, also compressed.

Owns the formats. Only the text column is looked at: what other columns hold, and whether it changes from row to row,
does not matter. Leaves which files there are to `datasets_source.py`, what becomes of empty texts to `documents.py`.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple, TextIO

from radlads.data import compressed
from radlads.data.text_rows import TextUnit, csv_rows, first_line, json_rows, text_units

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".md")
TEXT_SUFFIXES = (".txt", ".md")

_ROWS_AT_A_TIME = 64
_ROWS_TO_MEET_THE_COLUMN = 1000
_COLUMNS_SHOWN = 20
_MISSING = object()


class Cell(NamedTuple):
    """What a row holds in the text column; None if nothing. Rows count from 0, lines, where a file has them, from 1.
    beside: what it holds in a second column that was asked for; None if nothing, or there is no such column."""

    row: int
    line: int | None
    value: Any
    beside: Any = None


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


def read_cells(
    file: SourceFile, column: str, text_unit: TextUnit, delimiter: str = ",", *, beside: str | None = None
) -> Iterator[Cell]:
    """Yield the cell of every row of a file whose suffix is one of SUFFIXES. `column` may be a path, as in `meta.text`.

    beside: a second column, of JSON, Parquet and Arrow, that files need not have. A row that lacks the column has None
    there. `text_unit`: what of a plain text file is a row; `delimiter`: of a .csv. At most one row, or one block of a
    Parquet file's text column, is in memory. Raises ValueError, naming the file and the row, if the file is damaged,
    cut short, or not what its suffix says, or if the column is not in it.
    """
    row = -1
    try:
        with file.open() as opened:
            raw = compressed.decompressed(opened, "")
            for cell in _cells_of(file, raw, column, text_unit, delimiter, beside) if raw.peek(1) else ():
                row = cell.row
                yield cell
    except (csv.Error, NotImplementedError, *compressed.DAMAGE) as error:
        where = f"beyond row {row}" if row >= 0 else "from its start"
        remedy = "" if isinstance(error, OSError) and error.errno else ": it is damaged, copy or download it again"
        raise ValueError(f"{file.name} does not read {where}: {first_line(error)}{remedy}") from error


def _cells_of(
    file: SourceFile, opened: BinaryIO, column: str, text_unit: TextUnit, delimiter: str, beside: str | None
) -> Iterator[Cell]:
    name, suffix, packing = file.name, file.suffix, PurePath(file.name).suffix.lower()
    if suffix in (".parquet", ".arrow"):
        if packing in compressed.SUFFIXES:
            raise ValueError(f"{name}: a compressed {suffix} file cannot be read: decompress it first")
        return _column_cells(name, _parquet_tables if suffix == ".parquet" else _arrow_tables, opened, column, beside)
    stream = compressed.decompressed(opened, packing)
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{name} is UTF-16: save it as UTF-8")
    # A byte that is not UTF-8 becomes half of a surrogate pair, which matters only if it is in the text
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="" if suffix in (".csv", ".tsv") else None)
    if suffix in (".csv", ".tsv"):
        return _csv_cells(name, text, column, "\t" if suffix == ".tsv" else delimiter)
    if suffix in TEXT_SUFFIXES:
        if column != "text":
            raise _no_column(name, column, ["text"])
        return (Cell(row, None, value) for row, value in enumerate(text_units(name, text, text_unit)))
    return _json_cells(name, json_rows(name, text), column, beside)


def _json_cells(name: str, rows: Iterable[tuple[int, Any]], column: str, beside: str | None) -> Iterator[Cell]:
    """The cells of rows with their lines, once one of the first rows is known to have the column."""
    lacking: list[Cell] = []  # the rows before the first that has the column
    keys: dict[str, None] = {}  # of these
    found = False
    for row, (line, content) in enumerate(rows):
        if isinstance(content, str):  # of an array of texts
            content = {column: content}
        if not isinstance(content, dict):
            raise ValueError(f"{name}: row {row} is no object but the {_shown(content)} (line {line})")
        value = _cell_of(content, column)
        cell = Cell(row, line, None if value is _MISSING else value, _beside(content, beside))
        if found:
            yield cell
            continue
        keys |= dict.fromkeys(_columns(content))
        lacking.append(cell)
        found = cell.value is not None or column in keys
        if found:
            yield from lacking
        elif len(lacking) == _ROWS_TO_MEET_THE_COLUMN:
            break
    if lacking and not found:
        raise _no_column(name, column, keys)


def _csv_cells(name: str, text: TextIO, column: str, delimiter: str) -> Iterator[Cell]:
    rows = csv_rows(name, text, delimiter)
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


def _column_cells(
    name: str, tables: Callable[..., Any], opened: BinaryIO, column: str, beside: str | None
) -> Iterator[Cell]:
    """The cells of a format that holds columns, read by pyarrow."""
    from pyarrow import ArrowException

    row = 0
    try:
        for batch in tables(name, opened, column, beside):
            for content in batch.to_pylist():
                yield Cell(row, None, cell_of(name, content, column), _beside(content, beside))
                row += 1
    except ArrowException as error:
        raise OSError(first_line(error)) from error


def _parquet_tables(name: str, opened: BinaryIO, column: str, beside: str | None) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    # Buffered by pages: a row group's column may be larger than memory
    file = ParquetFile(opened, buffer_size=2**22, pre_buffer=False)
    check_columns(name, file.schema_arrow, column)
    also = [beside] if beside in file.schema_arrow.names else []
    yield from file.iter_batches(_ROWS_AT_A_TIME, columns=[column, *also])


def _arrow_tables(name: str, opened: BinaryIO, column: str, beside: str | None) -> Iterator[Any]:
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
    also = [beside] if beside in reader.schema.names else []
    for batch in reader:
        for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
            yield batch.select([top, *also]).slice(start, _ROWS_AT_A_TIME)


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
    """What a row of `name` holds in a column. Raises ValueError, with the columns there are, if it has no such one."""
    value = _cell_of(row, column)
    if value is _MISSING:
        raise _no_column(name, column, _columns(row))
    return value


def _beside(row: dict[str, Any], column: str | None) -> Any:
    return None if column is None else row.get(column)


def _cell_of(row: dict[str, Any], column: str) -> Any:
    """What a row has under the column's name or, if it has no such key, at the path that the name spells: None below a
    null."""
    if column in row or "." not in column:
        return row.get(column, _MISSING)
    top, rest = column.split(".", 1)
    below = row.get(top, _MISSING)
    return _cell_of(below, rest) if isinstance(below, dict) else below if below is None else _MISSING


def _columns(row: dict[str, Any]) -> Iterator[str]:
    """The names of a row's columns, those of nested ones as paths."""
    for key, value in row.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{below}" for below in _columns(value))
        else:
            yield key


def _no_column(name: str, column: str, columns: Iterable[str]) -> ValueError:
    names = [f"{' '.join(each.split()):.40}" for each in columns]
    shown = ", ".join([*names[:_COLUMNS_SHOWN], *(["..."] if len(names) > _COLUMNS_SHOWN else [])])
    return ValueError(f"{name} has no column {column!r}, only {shown or 'unnamed ones'}: choose with --column_name")


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.40}"
