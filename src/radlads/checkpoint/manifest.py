"""What makes a stage folder finished: a manifest with its origin, versions, hashes and measurements, written last."""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from radlads.checkpoint.atomic import read_json, write_text

MANIFEST = "manifest.json"
_PACKAGES = ("radlads", "torch", "transformers", "lightning", "safetensors", "tokenizers", "fla-core")


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write manifest.json: the facts given, versions, and a SHA-256 of every safetensors file in the folder."""
    hashes = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    content = {**facts, "versions": versions(), "sha256": hashes}
    write_text(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A finished stage's manifest. Raises ValueError if the folder has none or a weights file's hash differs."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a finished stage: it has no {MANIFEST}")
    manifest = read_json(path)
    hashes = manifest.get("sha256")
    if not isinstance(hashes, dict):
        raise ValueError(f"{path} is damaged: run the stage again")
    for name, expected in hashes.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is not the file its {MANIFEST} describes: run the stage again")
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(folder: Path) -> str:
    """One digest of all of a folder's safetensors files."""
    digests = "".join(sha256(path) for path in sorted(folder.glob("*.safetensors")))
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
