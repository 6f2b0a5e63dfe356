"""Documents out of any dataset that the `datasets` library opens; the only door to that library.

Owns which loader reads what, the text column, and what is wrong with a row. Leaves tokenising to `build.py`.
"""

import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TextUnit = Literal["document", "paragraph", "line"]

_LOADERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
    ".md": ("text", {}),
}
_COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
_DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError)  # of files that are cut short or damaged
_TEXT_SUFFIXES = {suffix for suffix, (loader, _) in _LOADERS.items() if loader == "text"}
_ROWS_AT_A_TIME = 256
_LARGEST_DOCUMENT_BYTES = 2**26


@dataclass(frozen=True)
class DocumentSource:
    """Texts in the dataset's order. num_rows: how many rows there are, empty ones included; None if it is not known."""

    documents: Iterable[str]
    num_rows: int | None


def open_documents(
    dataset: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    text_unit: TextUnit = "document",
) -> DocumentSource:
    """Open a file (jsonl, json, csv, tsv, parquet, plain text; also compressed), a folder or a hub dataset, streaming.

    A folder is one that `save_to_disk` wrote, one of plain text files (in the order of their names), or anything else
    that `load_dataset` knows. `text_unit`: what of a plain text file is one document. Empty texts are left out. Raises
    ValueError if `datasets` is not installed or the dataset does not open, and while reading, naming the row, if the
    column is missing or holds something else than text.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("reading datasets needs the datasets library: pip install 'radlads[data]'") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the error, too
    try:
        opened = _open(datasets, dataset, split, subset, text_unit)
        num_rows = _num_rows(opened, dataset, split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, *_DECOMPRESSION_ERRORS) as error:
        raise ValueError(f"{dataset} does not open as a dataset: {_first_line(error)}") from error
    return DocumentSource(_texts(opened, dataset, column), num_rows)


def _open(datasets: Any, dataset: str, split: str, subset: str | None, text_unit: TextUnit) -> Any:
    path = Path(dataset).expanduser()
    if path.is_file():
        return _open_files(datasets, [path], text_unit)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _split_on_disk(datasets.load_from_disk(str(path)), split)
        files = sorted(child for child in path.rglob("*") if child.is_file() and not child.name.startswith("."))
        if not files:
            raise ValueError("the folder is empty")
        if all(_suffix(file) in _TEXT_SUFFIXES for file in files):
            return _open_files(datasets, files, text_unit)
        return datasets.load_dataset(str(path), subset, split=split, streaming=True)
    if dataset.count("/") > 1 or dataset.startswith((".", "/", "~")) or _suffix(path) in _LOADERS:
        raise ValueError("it is neither a file or folder nor a hub name such as owner/name")
    return datasets.load_dataset(dataset, subset, split=split, streaming=True)


def _open_files(datasets: Any, files: list[Path], text_unit: TextUnit) -> Any:
    if _suffix(files[0]) not in _LOADERS:
        raise ValueError(f"its suffix is none of {', '.join(_LOADERS)}")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError("it is empty")
    loader, options = _LOADERS[_suffix(files[0])]
    if loader == "text":
        large = next((file for file in files if file.stat().st_size > _LARGEST_DOCUMENT_BYTES), None)
        if text_unit == "document" and large is not None:
            raise ValueError(f"{large.name} is too large to be one document: take a paragraph or a line as one")
        options = {"sample_by": text_unit}
    return datasets.load_dataset(
        loader, data_files=[str(file) for file in files], split="train", streaming=True, **options
    )


def _split_on_disk(loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise ValueError(f"it has no split {split!r}, only {', '.join(loaded)}")
    return loaded[split]


def _num_rows(opened: Any, dataset: str, split: str) -> int | None:
    if hasattr(opened, "__len__"):
        return len(opened)
    path = Path(dataset).expanduser()
    if path.is_file() and path.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if path.is_file() and path.suffix == ".jsonl":
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**22), b""))
    described = (opened.info.splits or {}).get(split)
    return described.num_examples or None if described is not None else None


def _texts(opened: Any, dataset: str, column: str) -> Iterator[str]:
    row = 0
    for rows in _readable(opened.iter(batch_size=_ROWS_AT_A_TIME), dataset):
        if column not in rows:
            raise ValueError(f"{dataset} has no column {column!r}, only {', '.join(rows)}: choose with --column_name")
        for text in rows[column]:
            if not isinstance(text, str):
                held = "nothing" if text is None else f"the {type(text).__name__} {text!r:.40}"
                raise ValueError(f"{dataset}: row {row} has {held} in column {column!r}: remove the row or mend it")
            if text:
                yield text
            row += 1


def _readable(batches: Iterable[dict[str, list[Any]]], dataset: str) -> Iterator[dict[str, list[Any]]]:
    """The batches, with whatever the file formats' readers raise as one ValueError that names the dataset."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield from batches
    except (DatasetsError, ArrowException, ValueError, OSError, TypeError, *_DECOMPRESSION_ERRORS) as error:
        raise ValueError(f"{dataset} does not read as a dataset: {_first_line(error.__cause__ or error)}") from error


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
