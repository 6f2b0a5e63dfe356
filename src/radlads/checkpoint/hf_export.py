"""A Hugging Face folder that anybody can load: weights, configuration, tokenizer and the model's own code."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

import radlads.model
from radlads.checkpoint.atomic import discard, unfinished_folder
from radlads.checkpoint.foreign_folders import refuse_links_out
from radlads.checkpoint.manifest import write_folder_checksums
from radlads.checkpoint.mixer_code import check_code, has_code, write_mixer_code
from radlads.checkpoint.model_folder import architectures_of, save_model
from radlads.checkpoint.own_files import check_names, refuse_links
from radlads.checkpoint.safetensors_writer import SHARD_BYTES
from radlads.checkpoint.tokenizer_files import copy_tokenizer
from radlads.checksums import CHECKSUMS, differences, read_checksums
from radlads.files import read_json, write_text
from radlads.model.configuration import RadladsConfig, names_code
from radlads.model.modeling import RadladsForCausalLM

_AUTO_MAP = {
    "AutoConfig": "configuration.RadladsConfig",
    "AutoModel": "modeling.RadladsModel",
    "AutoModelForCausalLM": "modeling.RadladsForCausalLM",
}


def export(model: RadladsForCausalLM, teacher_folder: Path, target: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the model to `target`, loadable with `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`.

    Raises ValueError if `target` exists, and as check_exportable.
    """
    check_exportable(model.config)
    with unfinished_folder(target) as partial:
        write_export(model, teacher_folder, partial, dtype=dtype)
        write_folder_checksums(partial)


def remove_export(folder: Path) -> None:
    """Remove what `export` wrote, if it is there, and no more. Raises ValueError, and leaves it, if it is a link, holds
    other files, or has been changed."""
    refuse_links(folder)
    if not folder.exists():
        return
    keep = f"move {folder} elsewhere, or remove it"
    if not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{folder} is in the way, and has no {CHECKSUMS} to tell what was exported: {keep}")
    for difference in differences(folder / CHECKSUMS):
        raise ValueError(f"{folder} is in the way, but {difference}: {keep}")
    check_names(folder, [CHECKSUMS, *read_checksums(folder / CHECKSUMS)[1]])
    discard(folder)


def write_export(
    model: RadladsForCausalLM,
    teacher_folder: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights (in `dtype`, default: their own), configuration, code and tokenizer into a folder that exists.

    The tokenizer's files are the teacher's, verbatim; generation_config.json is too, but for the rows that pad the
    embedding (copy_tokenizer). The code is radlads/model, verbatim, and the files of mixers of the user's own.
    """
    save_model(model, folder, dtype=dtype, shard_bytes=shard_bytes)
    _add_code(model.config, folder)
    copy_tokenizer(teacher_folder, folder)


def check_exportable(config: RadladsConfig) -> None:
    """Raise ValueError for a model with a mixer of the user's own that an export cannot hold (mixer_code.check_code),
    or whose code is not to be found."""
    check_code(config)


def copy_all_but_weights(
    folder: Path,
    target: Path,
    *,
    tokenizer_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    changed: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Copy what makes weights a model: config.json if there is one, tokenizer, and our code for a model of ours.

    Of config.json, keys that choose code are left out: the code that a folder brings along is not copied. A mixer of
    the user's own comes along if its file is found and an export can hold it; it is not run.

    `tokenizer_folder`: where the tokenizer is, if not in `folder`. `dtype`: what the weights have been cast to.
    `changed`: new values in config.json.
    """
    refuse_links_out(folder, ["config.json"])
    if (folder / "config.json").is_file():
        values = read_json(folder / "config.json") | dict(changed)
        values = {key: value for key, value in values.items() if key != "auto_map" and not names_code(key)}
        if dtype is not None:
            values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
        _write_config(values, target)
        if RadladsForCausalLM.__name__ in architectures_of(values):
            config = RadladsConfig.from_dict(dict(values))
            if has_code(config):
                _add_code(config, target)
    copy_tokenizer(tokenizer_folder or folder, target)


def _write_config(values: dict, folder: Path) -> None:
    write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")


def _add_code(config: RadladsConfig, folder: Path) -> None:
    """Put the model's code into its folder, and into its config.json where transformers finds it."""
    _write_config(read_json(folder / "config.json") | {"auto_map": _AUTO_MAP}, folder)
    for source in Path(radlads.model.__file__).parent.glob("*.py"):
        if source.name != "__init__.py":
            shutil.copyfile(source, folder / source.name)
    write_mixer_code(config, folder)
