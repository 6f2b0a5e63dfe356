"""Folders that hold no model to read as it is: adapters and quantised weights, told by their descriptions alone."""

from collections.abc import Mapping
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
