"""The text every Python installation carries: the sources (and with them the documentation) of its standard library.

Owns which files count and which of them are held out. A file is held out by the hash of its path alone, so the split
is the same for every Python version, and the bundled teacher has seen no file under a held-out path.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_ONE_IN = 40
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "idle_test"}
_EXCLUDED_PREFIXES = ("config-", "lib2to3/tests/", "test/cjkencodings", "test/encoded_modules")
_MIN_BYTES, _MAX_BYTES = 400, 800_000


def split_of(relative_path: str) -> Split:
    """Tell whether a standard-library file, named by its POSIX path below the library folder, is held out."""
    digest = hashlib.blake2b(relative_path.encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0 else "train"


def iter_documents(split: Split, *, library: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of one split's standard-library files, in a fixed pseudo-random order.

    `library` is the folder to read (default: the running Python's). Files that are not UTF-8, the character tables
    under `encodings/`, and files outside 400 bytes .. 800 kB are left out. Raises ValueError if nothing is found.
    """
    root = library or Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if _counts(path.relative_to(root), path)]
    relative_paths = sorted((path.relative_to(root).as_posix() for path in paths), key=_shuffle_key)
    if not relative_paths:
        raise ValueError(f"no Python sources under {root}: install the standard library's .py files")
    for relative_path in relative_paths:
        if split_of(relative_path) == split:
            text = _read_utf8(root / relative_path)
            if text is not None:
                yield relative_path, text


def _counts(relative: Path, path: Path) -> bool:
    if _EXCLUDED_FOLDERS & set(relative.parts[:-1]) or relative.as_posix().startswith(_EXCLUDED_PREFIXES):
        return False
    return path.is_file() and _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES


def _shuffle_key(relative_path: str) -> bytes:
    return hashlib.blake2b(b"order:" + relative_path.encode(), digest_size=8).digest()


def _read_utf8(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
