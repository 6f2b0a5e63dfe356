"""Folders that may be anybody's: what is no model to read as it is, and what must not be copied out of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"


def refuse_adapter(folder: Path) -> None:
    """Raise ValueError for an adapter's folder, also where its base model lies beside it."""
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}): merge it into its base model first, with peft's "
            "merge_and_unload(), and save the result in a folder of its own"
        )


def refuse_quantised(values: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if a config.json's values say that the weights are quantised."""
    for key in ("quantization_config", "compression_config"):
        if values.get(key):
            method = values[key].get("quant_method") if isinstance(values[key], dict) else None
            raise ValueError(
                f"{folder} is quantised ({method or key}), which is not supported: "
                "take the checkpoint in bf16, fp16 or fp32 that it was made from"
            )


def refuse_links_out(folder: Path, patterns: Iterable[str]) -> None:
    """Raise ValueError if a file of these patterns is a link out of the folder: what is exported may be published.

    Links in the hub's cache lead from a snapshot to the blobs of the same model, which are its own.
    """
    home = folder.resolve()
    if home.parent.name == "snapshots" and (home.parent.parent / "blobs").is_dir():
        home = home.parent.parent
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if not path.resolve().is_relative_to(home):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside its folder: put a copy there if it may be published"
            )
