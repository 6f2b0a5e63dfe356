"""Removing what a run wrote, and nothing else: by a mark in folders that are being filled, and by names within them."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

MARK = ".radlads-unfinished"
"""In every folder that radlads is filling, until it is complete: only such a folder is ever emptied."""


def mark(folder: Path) -> None:
    """Say in a folder that radlads may empty it."""
    (folder / MARK).write_text(
        "radlads writes this folder, and empties it to begin again: keep your own files elsewhere\n"
    )


def refuse_links(path: Path) -> None:
    """Raise ValueError if the path is a symbolic link: what it leads to is somebody else's."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, where radlads needs a folder of its own: remove the link")


def check_names(folder: Path, patterns: Sequence[str]) -> None:
    """Raise ValueError if something in a folder, links included, matches none of the patterns.

    Patterns are of paths below the folder, `step-*/run.json`, and match part by part; `wandb/**` means all that lies in
    wandb. The mark is always known, and so are the temporary files of write_text (.run.json.8_random_).
    """
    refuse_links(folder)
    for path in _entries(folder):
        parts = path.relative_to(folder).parts
        if path.name != MARK and not any(_matches(parts, pattern.split("/")) for pattern in patterns):
            raise ValueError(f"{path} is in the way, and no run wrote it: move it out of {folder}, or remove it")


def check_marked(folder: Path) -> None:
    """Raise ValueError if a folder holds anything, and no mark: it is not known to be ours."""
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ValueError(
            f"{folder} is in the way, and nothing in it says that radlads wrote it: move or remove it, or choose "
            "another name"
        )


def remove_folder(folder: Path, patterns: Sequence[str]) -> None:
    """Remove a folder in which everything has a name that a run gives. Raises ValueError as check_names, first."""
    check_names(folder, patterns)
    shutil.rmtree(folder)


def remove_marked(folder: Path) -> None:
    """Remove a folder that bears the mark. Raises ValueError if it does not."""
    empty_marked(folder)
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def empty_marked(folder: Path) -> None:
    """Remove all but the mark from a folder that bears it. Raises ValueError if it does not.

    The mark stays to the end, so that a run that is killed meanwhile leaves a folder that is known.
    """
    refuse_links(folder)
    check_marked(folder)
    remove_each(path for path in folder.iterdir() if path.name != MARK)


def remove_each(paths: Iterable[Path]) -> None:
    """Remove files, folders and links, never what a link leads to."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _entries(folder: Path) -> Iterator[Path]:
    """All files and links below a folder."""
    for where, folders, files in os.walk(folder):
        yield from (Path(where) / name for name in files)
        yield from (Path(where) / name for name in folders if (Path(where) / name).is_symlink())


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if pattern[-1] == "**":
        return len(parts) >= len(pattern) and _matches(parts[: len(pattern) - 1], pattern[:-1])
    if len(parts) != len(pattern) or not all(map(fnmatchcase, parts[:-1], pattern[:-1])):
        return False
    written = parts[-1][1:].rpartition(".")[0] if parts[-1].startswith(".") else parts[-1]
    return fnmatchcase(written, pattern[-1])
