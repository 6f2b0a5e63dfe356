"""What makes a stage folder finished: a manifest with its origin, versions, hashes and measurements, written last."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from radlads.checksums import CHECKSUMS, OfName, checksums_of, differences, sha256, write_checksums
from radlads.files import read_json, write_text

MANIFEST = "manifest.json"
_PACKAGES = ("radlads", "torch", "transformers", "lightning", "safetensors", "tokenizers", "fla-core")


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write manifest.json: the facts given, versions, and a SHA-256 of every file in the folder."""
    content = {**facts, "versions": versions(), **checksums_of(_files(folder))}
    write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def write_folder_checksums(folder: Path) -> None:
    """Write checksums.json into a model folder that is no stage's: of every file that it holds by now."""
    write_checksums(folder / CHECKSUMS, checksums_of(_files(folder)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """A finished stage's manifest. Raises ValueError if the folder has none, or if a file that its model is read from
    is not the one whose hash the manifest has."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a finished stage: it has no {MANIFEST}")
    manifest = read_json(path)
    if not isinstance(manifest.get("sha256"), dict):
        raise ValueError(f"{path} is damaged: run the stage again")
    for difference in differences(path, among=_is_of_model):
        raise ValueError(f"{difference}: run the stage again")
    return manifest


def check_model_files(folder: Path, *, whole: bool = False) -> None:
    """Compare the files that a model is read from with the folder's manifest or checksums, if it has either.

    By a manifest every byte is compared; by checksums.json sizes and config.json, and with `whole` every byte. Raises
    ValueError for a file that differs.
    """
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
    elif (folder / CHECKSUMS).is_file():
        _compare(folder, among=_is_of_model, hashed=_is_of_model if whole else "config.json".__eq__)


def check_every_file(folder: Path) -> None:
    """Compare a folder to publish with its checksums, if it has any. Raises ValueError for a file that differs."""
    if (folder / CHECKSUMS).is_file():
        _compare(folder)


def _compare(folder: Path, **which: OfName) -> None:
    for difference in differences(folder / CHECKSUMS, **which):
        raise ValueError(f"{difference}: copy it anew, or remove {CHECKSUMS} if you changed it on purpose")


def _files(folder: Path) -> list[Path]:
    """The files in a folder that describe it: not hidden ones, and not what has the hashes."""
    records = (MANIFEST, CHECKSUMS)
    return [path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and path.name not in records]


def _is_of_model(name: str) -> bool:
    """Whether a model is read from files of this name, its logs and its tokenizer apart."""
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))


def weights_hash(folder: Path) -> str:
    """One digest of all of a folder's safetensors files."""
    return joint_hash({path.name: sha256(path) for path in folder.glob("*.safetensors")})


def joint_hash(hashes: Mapping[str, str]) -> str:
    """weights_hash, by the hashes that a record has of the folder's files."""
    digests = "".join(digest for name, digest in sorted(hashes.items()) if name.endswith(".safetensors"))
    return hashlib.sha256(digests.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
