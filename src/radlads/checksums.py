"""SHA-256 and size of files as a JSON file beside them records them, and which of them are others by now.

Owns the records' format: manifest.json of stages and checkpoints, checksums.json of other model folders,
NAME.checksums.json of corpora. Leaves to others which files are recorded, and when they are compared.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from radlads.files import read_json, write_text

CHECKSUMS = "checksums.json"
OfName = Callable[[str], bool]


def corpus_record(path_stem: Path) -> Path:
    """Where the checksums of a corpus are, by the name that its .bin and .idx share."""
    return path_stem.with_name(f"{path_stem.name}.{CHECKSUMS}")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums_of(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What a record holds of files: SHA-256 and size in bytes by name."""
    files = sorted(paths)
    return {
        "sha256": {path.name: sha256(path) for path in files},
        "bytes": {path.name: path.stat().st_size for path in files},
    }


def write_checksums(record: Path, content: dict[str, Any]) -> None:
    """Write a record, as write_text does. `content`: as checksums_of; with `folder`, if the files lie elsewhere than
    beside it."""
    write_text(record, json.dumps(content, indent=2) + "\n")


def read_checksums(record: Path) -> tuple[Path, dict[str, str], dict[str, int]]:
    """The folder of the files that a record is of, and their SHA-256 and sizes, which old records lack, by name.

    Raises ValueError if it is damaged.
    """
    try:
        content = read_json(record)
        hashes, sizes = content["sha256"], content.get("bytes", {})
        folder = Path(content.get("folder", record.parent))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{record} is damaged: it holds no checksums") from error
    whole = isinstance(hashes, dict) and isinstance(sizes, dict) and all(name == Path(name).name for name in hashes)
    if not whole:
        raise ValueError(f"{record} is damaged: it holds no checksums of files")
    return folder, hashes, sizes


def differences(
    record: Path, *, among: OfName = lambda name: True, hashed: OfName = lambda name: True
) -> Iterator[str]:
    """A sentence, without its end, for each recorded file that is missing or another one. `among`: which names count;
    `hashed`: of which more than the size is compared. Raises ValueError as read_checksums."""
    folder, hashes, sizes = read_checksums(record)
    for name in filter(among, hashes):
        path = folder / name
        if why := _difference(path, hashes[name] if hashed(name) else None, sizes.get(name)):
            yield f"{path} is not the file its {record.name} describes ({why})"


def _difference(path: Path, digest: str | None, num_bytes: int | None) -> str:
    if not path.is_file():
        return "it is missing"
    if num_bytes is not None and path.stat().st_size != num_bytes:
        return f"it has {path.stat().st_size} bytes, and had {num_bytes}"
    return "its SHA-256 is another one" if digest is not None and sha256(path) != digest else ""
