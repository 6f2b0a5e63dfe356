"""Files and folders that exist under their final name only when they are complete."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from radlads.checkpoint.own_files import MARK, empty_marked, mark, refuse_links, remove_marked
from radlads.files import naming


def partial_name(target: Path) -> Path:
    """The name a folder bears until it is finished."""
    return target.with_name(f"{target.name}.partial")


def check_new(target: Path) -> None:
    """Raise ValueError if there is something by the name."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already: remove it or choose another name")


@contextmanager
def unfinished_folder(target: Path, *, keep_failed: bool = True, keep_earlier: bool = False) -> Iterator[Path]:
    """Give a new folder `NAME.partial` to fill; at the end sync its files and rename it to `target`.

    After an exception the partial folder stays, for a look at what went wrong, unless keep_failed is False; `target`
    never exists half-written. An older partial folder that this function made, by its mark, is emptied first, unless
    keep_earlier gives it as it is. Raises ValueError if `target` exists, another process is filling its partial folder,
    or that is a link or somebody else's, and OSError that names a file or `target`.
    """
    check_new(target)
    partial = partial_name(target)
    refuse_links(partial)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, _being_written(partial)):
        if not keep_earlier:
            empty_marked(partial)
        try:
            with naming(target):
                if not any(partial.iterdir()):
                    mark(partial)
                yield partial
                for path in partial.rglob("*"):
                    if path.is_file():
                        _sync(path)
                _sync(partial)
                os.replace(partial, target)
        except BaseException:
            if not keep_failed:
                with suppress(OSError, ValueError):
                    remove_marked(partial)
            raise
    (target / MARK).unlink(missing_ok=True)  # not before: a folder that a killed run has left bears either
    _sync(target.parent)


def discard(folder: Path) -> None:
    """Remove a folder, all of it. It loses its name first, to one that unfinished_folder would empty: so a run that is
    killed meanwhile leaves none that looks whole."""
    partial = partial_name(folder)
    if partial.exists():
        remove_marked(partial)
    mark(folder)
    folder.rename(partial)
    remove_marked(partial)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock on a folder or file, which ends with the process. Raises ValueError, that says `busy`, while another
    process holds it. Where the file system has no locks, nothing is held.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(busy) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def unfinished_file(target: Path) -> Iterator[Path]:
    """Give a hidden name to write a file under, which nobody else gives; at the end sync it and rename it to `target`.

    After an exception nothing is left. Raises ValueError if `target` exists, its folder does not, or another process is
    writing it, and OSError that names the file if it cannot be written.
    """
    check_new(target)
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder: make it first, or choose another one for {target.name}")
    unfinished = target.with_name(f".{target.name}{MARK}")
    refuse_links(unfinished)
    unfinished.touch()
    with locked(unfinished, _being_written(unfinished)):
        try:
            with naming(target):
                yield unfinished
                _sync(unfinished)
                os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    _sync(target.parent)


def _being_written(path: Path) -> str:
    return f"{path} is being written by another process: wait for it, or choose another one"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
