"""Documents out of files, folders and hub datasets; the only door to the `datasets` library.

Owns which files a dataset is made of, and reading the kinds that only that library knows. Leaves the usual kinds to
`text_cells.py`, what becomes of a row to `documents.py`, tokenising to `build.py`.
"""

import io
import logging
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from radlads.data.compressed import DAMAGE
from radlads.data.conversations import Conversation, LeftOutChats, conversations_of
from radlads.data.documents import LeftOut, texts_of
from radlads.data.text_cells import (
    SUFFIXES,
    TEXT_SUFFIXES,
    Cell,
    SourceFile,
    cell_of,
    check_columns,
    read_cells,
    suffix_of,
)
from radlads.data.text_rows import TextUnit, first_line

_ROWS_AT_A_TIME = 256
_ARCHIVE = ".zip"
_TOOLS = "tools"
_ENCRYPTED = 1  # of a member's flag bits
# Beside the data in folders of datasets
_NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
# What a dataset's card may say that does not change how its files read
_NEUTRAL_SETTINGS = {"name", "version", "data_dir", "data_files", "description", "features", "sep"}


@dataclass(frozen=True)
class DocumentSource:
    """Texts in the dataset's order, to be read once. num_rows: how many rows there are, those without text included;
    None if it is not known. left_out: counts that grow while the texts are read."""

    documents: Iterable[str]
    num_rows: int | None
    left_out: LeftOut


@dataclass(frozen=True)
class ConversationSource:
    """As DocumentSource, of conversations."""

    conversations: Iterable[Conversation]
    num_rows: int | None
    left_out: LeftOutChats


def open_documents(
    dataset: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    text_unit: TextUnit = "document",
    strict: bool = False,
) -> DocumentSource:
    """Open a file (jsonl, json, csv, tsv, parquet, arrow, plain text; also compressed), a folder or a hub dataset.

    A folder is one that `save_to_disk` wrote, one of plain text files (in the order of their names), or anything else
    that `load_dataset` knows. `column` may be a path, as in `meta.text`; what other columns hold does not matter.
    `text_unit`: what of a plain text file is one document. Texts that are null or empty are left out and counted;
    `strict` makes them an error, and files that would be left out. Raises ValueError if `datasets` is not installed or
    the dataset does not open, and while reading, naming file and row, if a file is damaged, has no such column, or
    holds something else than text there.
    """
    left_out = LeftOut()
    parts, num_rows = _opened(_Wanted(dataset, column, split, subset, text_unit, strict), left_out)
    texts = (text for name, cells in parts for text in texts_of(name, cells, column, left_out, strict=strict))
    return DocumentSource(texts, num_rows, left_out)


def open_conversations(
    dataset: str, *, column: str, split: str = "train", subset: str | None = None, skips_faulty: bool = False
) -> ConversationSource:
    """As open_documents, of a column of messages; tools are taken from a column of that name, if there is one.

    Conversations that do not alternate, or have an empty message, are an error, or left out if skips_faulty.
    """
    parts, num_rows = _opened(_Wanted(dataset, column, split, subset, "line", False, beside=_TOOLS), LeftOut())
    left_out = LeftOutChats()
    found = (
        conversation
        for name, cells in parts
        for conversation in conversations_of(name, cells, column, left_out, skips_faulty=skips_faulty)
    )
    return ConversationSource(found, num_rows, left_out)


def _opened(wanted: "_Wanted", left_out: LeftOut) -> tuple["_Parts", int | None]:
    """The dataset's parts, and how many rows there are, if that is known."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("reading datasets needs the datasets library: pip install 'radlads[data]'") from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the error, too
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README need not describe a dataset
    try:
        return _open(datasets, wanted, left_out)
    except (datasets.exceptions.DatasetsError, ValueError, NotImplementedError, *DAMAGE) as error:
        raise ValueError(f"{wanted.dataset} does not open as a dataset: {first_line(error)}") from error


@dataclass(frozen=True)
class _Wanted:
    """What open_documents was asked for. beside: a second column, that need not be there."""

    dataset: str
    column: str
    split: str
    subset: str | None
    text_unit: TextUnit
    strict: bool
    beside: str | None = None

    def cells(self, files: Iterable[SourceFile], delimiter: str = ",") -> "_Parts":
        members = (member for file in files for member in _members(file))
        read = partial(read_cells, column=self.column, text_unit=self.text_unit, delimiter=delimiter)
        return ((file.name, read(file, beside=self.beside)) for file in members)

    def cell(self, row: int, content: dict[str, Any]) -> Cell:
        beside = None if self.beside is None else content.get(self.beside)
        return Cell(row, None, cell_of(self.dataset, content, self.column), beside)


_Parts = Iterable[tuple[str, Iterable[Cell]]]
"""What names a part of a dataset in messages, usually a file, with its cells."""


def _open(datasets: Any, wanted: _Wanted, left_out: LeftOut) -> tuple[_Parts, int | None]:
    path = Path(wanted.dataset).expanduser()
    if path.is_file():
        if not _is_read(path.name):
            raise ValueError(f"its suffix is none of {', '.join((*SUFFIXES, _ARCHIVE))}")
        return wanted.cells(_on_disk([path])), _num_rows(path)
    if path.is_dir():
        return _open_folder(datasets, path, wanted, left_out)
    name = wanted.dataset
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or suffix_of(name) in SUFFIXES:
        raise ValueError("it is neither a file or folder nor a hub name such as owner/name")
    return _open_built(datasets, datasets.load_dataset_builder(name, wanted.subset), wanted)


def _open_folder(datasets: Any, folder: Path, wanted: _Wanted, left_out: LeftOut) -> tuple[_Parts, int | None]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = _load_saved(datasets, folder, wanted.split)
        return [(wanted.dataset, _saved_cells(saved, wanted))], len(saved)
    files = _data_files(folder)
    if all(suffix_of(file.name) in TEXT_SUFFIXES for file in files):
        return wanted.cells(_on_disk(files)), None
    builder = datasets.load_dataset_builder(str(folder), wanted.subset)
    used = {Path(name).resolve() for each in (builder.config.data_files or {}).values() for name in each}
    unused = [file for file in files if _is_read(file.name) and file.resolve() not in used]
    if unused and wanted.strict:
        raise ValueError(f"{unused[0]} is of another kind or of no split: remove it, or leave out --strict")
    left_out.other_files = len(unused)
    return _open_built(datasets, builder, wanted)


def _open_built(datasets: Any, builder: Any, wanted: _Wanted) -> tuple[_Parts, int | None]:
    """What a builder of the library knows of, by our own readers where they read it as it would."""
    described = (builder.info.splits or {}).get(wanted.split)
    num_rows = described.num_examples or None if described is not None else None
    names = _names_of_split(builder.config, wanted.split)
    if names is None:
        opened = builder.as_streaming_dataset(split=wanted.split)
        return [(wanted.dataset, _cells(opened, wanted))], num_rows
    opener = datasets.utils.file_utils.xopen  # which tries again when a connection breaks
    files = (SourceFile(name, partial(opener, name, "rb")) for name in names)
    return wanted.cells(files, vars(builder.config).get("sep") or ","), num_rows


def _names_of_split(config: Any, split: str) -> list[str] | None:
    """A split's files, if read_cells reads them as `datasets` would; None if it has to do that by itself."""
    files = config.data_files
    if not files:
        return None
    if split not in files:
        raise ValueError(f"it has no split {split!r}, only {', '.join(map(str, files))}: choose with --split")
    usual = vars(type(config)())
    settings = {key for key, value in vars(config).items() if value != usual.get(key)} - _NEUTRAL_SETTINGS
    names = [str(name) for name in files[split]]
    return None if settings or not all(map(_is_read, names)) else names


def _data_files(folder: Path) -> list[Path]:
    """The files of a folder that may hold data, by name."""
    found = sorted(file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder)))
    if not found:
        raise ValueError("the folder is empty")
    readable = [file for file in found if _is_read(file.name)]
    return _only_data(readable) or found  # found: perhaps of a kind that the library knows


def _only_data(files: list[Path]) -> list[Path]:
    """Files without those that only describe a dataset. A README.md counts where all else is Markdown too."""
    if all(suffix_of(file.name) == ".md" for file in files):
        return files
    return [file for file in files if file.name not in _NO_DATA] or files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_read(name: str) -> bool:
    return suffix_of(name) in (*SUFFIXES, _ARCHIVE)


def _members(file: SourceFile) -> Iterator[SourceFile]:
    """The file, or the files of a zip archive that read_cells reads; an archive without any is a file without rows."""
    if file.suffix != _ARCHIVE:
        yield file
        return
    try:
        with file.open() as opened, zipfile.ZipFile(opened) as archive:
            infos = {Path(each.filename): each for each in archive.infolist() if suffix_of(each.filename) in SUFFIXES}
            files = _only_data([path for path, info in infos.items() if not _is_hidden(path) and not info.is_dir()])
            if any(infos[path].flag_bits & _ENCRYPTED for path in files):
                raise ValueError(f"{file.name} is encrypted: unpack it first")
            for info in (infos[path] for path in files):
                yield SourceFile(f"{file.name}/{info.filename}", partial(archive.open, info))  # type: ignore[arg-type]
            if not files:
                yield SourceFile(f"{file.name}{SUFFIXES[0]}", io.BytesIO)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.name} does not read as an archive: {first_line(error)}") from error


def _on_disk(files: list[Path]) -> list[SourceFile]:
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError("it is empty")
    return [SourceFile(str(file), partial(_open_binary, file)) for file in files]


def _open_binary(path: Path) -> BinaryIO:
    return path.open("rb")


def _load_saved(datasets: Any, folder: Path, split: str) -> Any:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(child.parent.name for child in folder.glob("*/state.json"))
        if split not in splits:
            raise ValueError(
                f"it has no split {split!r}, only {', '.join(splits) or 'empty ones'}: choose with --split"
            )
        folder = folder / split
    try:
        return datasets.load_from_disk(str(folder))
    except IndexError as error:  # the library's, of no tables to put together
        raise ValueError("it was saved without rows") from error


def _num_rows(path: Path) -> int | None:
    """Where counting is cheap: rows of a Parquet file, lines of a .jsonl."""
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(2**22), b""))
    return None


def _saved_cells(saved: Any, wanted: _Wanted) -> Iterator[Cell]:
    check_columns(wanted.dataset, saved.features.arrow_schema, wanted.column)
    top = wanted.column if wanted.column in saved.column_names else wanted.column.split(".")[0]
    also = [wanted.beside] if wanted.beside in saved.column_names else []
    yield from _cells(saved.select_columns([top, *also]), wanted)


def _cells(opened: Any, wanted: _Wanted) -> Iterator[Cell]:
    """The cells of a dataset of the library's, with what its readers raise as one ValueError that names the dataset."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    row = 0
    try:
        for rows in opened.iter(batch_size=_ROWS_AT_A_TIME):
            for values in zip(*rows.values(), strict=True):
                yield wanted.cell(row, dict(zip(rows, values, strict=True)))
                row += 1
    except (DatasetsError, ArrowException, TypeError, *DAMAGE) as error:
        where = f" beyond row {row - 1}" if row else ""
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"{wanted.dataset} does not read as a dataset{where}: {reason}") from error
