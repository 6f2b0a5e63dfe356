"""Documents out of rows: which texts are left out and counted, and what ends the reading."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from radlads.data.text_cells import Cell


@dataclass
class LeftOut:
    """What was read so far and gave no document: texts that are null or not there at all, empty texts, files without
    rows; and files that are not read, being of another kind than most or of no split. As text one line, "" if none."""

    nulls: int = 0
    empties: int = 0
    empty_files: int = 0
    other_files: int = 0

    def __str__(self) -> str:
        counts = (
            (self.nulls, "null text", "null texts"),
            (self.empties, "empty text", "empty texts"),
            (self.empty_files, "file without rows", "files without rows"),
            (self.other_files, "file of another kind or of no split", "files of another kind or of no split"),
        )
        shown = [f"{count:,} {one if count == 1 else many}" for count, one, many in counts if count]
        return f"left out: {', '.join(shown)}" if shown else ""


def texts_of(name: str, cells: Iterable[Cell], column: str, left_out: LeftOut, *, strict: bool) -> Iterator[str]:
    """Yield the texts of a file's cells, and count in `left_out` those that are null or empty.

    NaN is null. Raises ValueError, naming the file, the row and the column, at a value that is no text, at a text that
    is not Unicode, and, if `strict`, at a null or an empty text or where there is no row.
    """
    num_rows = 0
    for cell in cells:
        num_rows += 1
        text = None if _is_null(cell.value) else cell.value
        if text is not None and not isinstance(text, str):
            raise _error(name, cell, column, f"has the {type(text).__name__} {text!r:.40}", "mend or remove the row")
        if text:
            _check_unicode(name, cell, column, text)
            yield text
            continue
        if strict:
            held = "has nothing" if text is None else "has an empty text"
            raise _error(name, cell, column, held, "mend or remove the row, or leave out --strict")
        left_out.nulls += text is None
        left_out.empties += text is not None
    if num_rows == 0:
        if strict:
            raise ValueError(f"{name} has no rows: remove it, or leave out --strict")
        left_out.empty_files += 1


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _check_unicode(name: str, cell: Cell, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # How text_cells.py hands on a byte that is not UTF-8
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        held = f"has text that is not valid Unicode ({what} at character {error.start})"
        raise _error(name, cell, column, held, "save the file as UTF-8, or remove the row") from error


def _error(name: str, cell: Cell, column: str, held: str, remedy: str) -> ValueError:
    line = "" if cell.line is None else f" (line {cell.line})"
    return ValueError(f"{name}: row {cell.row} {held} in column {column!r}{line}: {remedy}")
