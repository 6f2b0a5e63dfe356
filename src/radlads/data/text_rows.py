"""Rows out of text: of JSON in lines or as one value, of CSV, and plain text in units.

Owns parsing, one row at a time, and how long a row may be. What lies in a row is `text_cells.py`'s.
"""

import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal, TextIO

TextUnit = Literal["document", "paragraph", "line"]

_LARGEST_DOCUMENT = 2**26  # characters; a longer line or file is no document but a mistake, and would fill the memory
_READ_CHARACTERS = 2**20
_BETWEEN_VALUES = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")


def json_rows(name: str, text: TextIO) -> Iterator[tuple[int, Any]]:
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


def _parsed_stream(name: str, text: TextIO, line: int, buffer: str) -> Iterator[tuple[int, Any]]:
    """The items of an array, or values one after another; `buffer` is what was read before, from `line` on."""
    decoder, position = json.JSONDecoder(), _end_of(_SPACE, buffer, 0)
    in_array = buffer.startswith("[", position)
    position += in_array
    while True:
        start = _end_of(_BETWEEN_VALUES, buffer, position)
        line, position = line + buffer.count("\n", position, start), start
        if in_array and buffer.startswith("]", position):
            _check_ends(name, text, line, buffer[position + 1 :])
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


def _check_ends(name: str, text: TextIO, line: int, rest: str) -> None:
    """Raise ValueError if something follows an array's end, which is on this line, with `rest` behind it."""
    for more in chain([rest], iter(lambda: text.read(_READ_CHARACTERS), "")):
        if more.strip():
            raise ValueError(
                f"{name} has more after the end of its array on line {line}: keep one array, or one object a line"
            )


def csv_rows(name: str, text: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
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


def text_units(name: str, text: TextIO, text_unit: TextUnit) -> Iterator[str]:
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


def _numbered_lines(name: str, text: TextIO) -> Iterator[tuple[int, str]]:
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


def _not_json(name: str, line: int, error: Exception) -> ValueError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
    return ValueError(f"{name}: line {line} is not valid JSON ({reason}): mend or remove it")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
