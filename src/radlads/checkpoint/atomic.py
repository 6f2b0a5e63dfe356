"""Files and folders that exist under their final name only when they are complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, sync it and rename it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError that names the file if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def partial_name(target: Path) -> Path:
    """The name a folder bears until it is finished."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """Give a new folder `NAME.partial` to fill; at the end sync its files and rename it to `target`.

    After an exception the partial folder stays, for a look at what went wrong; `target` never exists half-written.
    Raises ValueError if `target` exists. An older partial folder is removed first.
    """
    if target.exists():
        raise ValueError(f"{target} exists already: remove it or choose another folder")
    partial = partial_name(target)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    for path in partial.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(partial)
    os.replace(partial, target)
    _sync(target.parent)


@contextmanager
def unfinished_file(target: Path) -> Iterator[Path]:
    """Give the name `NAME.partial` to write a file under; at the end sync it and rename it to `target`.

    After an exception nothing is left. Raises ValueError if `target` exists or its folder does not, and OSError that
    names the file if it cannot be written.
    """
    if target.exists():
        raise ValueError(f"{target} exists already: remove it or choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder: make it first, or choose another one for {target.name}")
    partial = partial_name(target)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
