"""A Hugging Face folder that anybody can load: weights, configuration, tokenizer and the model's own code."""

import json
import shutil
from pathlib import Path

import torch

import radlads.model
from radlads.checkpoint.atomic import read_json, unfinished_folder, write_text
from radlads.checkpoint.model_folder import save_model
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import is_registered

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_AUTO_MAP = {
    "AutoConfig": "configuration.RadladsConfig",
    "AutoModel": "modeling.RadladsModel",
    "AutoModelForCausalLM": "modeling.RadladsForCausalLM",
}


def export(model: RadladsForCausalLM, teacher_folder: Path, target: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the model to `target`, loadable with `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`.

    The tokenizer's files are the teacher's, verbatim. The code is radlads/model, verbatim. Raises ValueError if
    `target` exists, or if the model has mixers of the user's own, whose code is not in radlads/model.
    """
    if not is_registered(model.config):
        raise ValueError(
            "a model with mixers of your own cannot be exported with code: load it with radlads and your files instead"
        )
    model.config.auto_map = _AUTO_MAP
    with unfinished_folder(target) as partial:
        save_model(model, partial, dtype=dtype)
        _copy_code(partial)
        copy_tokenizer(teacher_folder, partial)


def copy_all_but_weights(folder: Path, target: Path) -> None:
    """Copy what makes weights a model: config.json if there is one, tokenizer, and our code for a model of ours."""
    copy_tokenizer(folder, target)
    if not (folder / "config.json").is_file():
        return
    values = read_json(folder / "config.json")
    ours = RadladsForCausalLM.__name__ in (values.get("architectures") or ())
    if ours and is_registered(RadladsConfig.from_dict(dict(values))):
        values["auto_map"] = _AUTO_MAP
        _copy_code(target)
    write_text(target / "config.json", json.dumps(values, indent=2) + "\n")


def _copy_code(folder: Path) -> None:
    for source in Path(radlads.model.__file__).parent.glob("*.py"):
        if source.name != "__init__.py":
            shutil.copyfile(source, folder / source.name)


def copy_tokenizer(teacher_folder: Path, folder: Path) -> None:
    """Copy the tokenizer's files (and generation defaults) that the teacher's folder has."""
    for name in TOKENIZER_FILES:
        if (teacher_folder / name).is_file():
            shutil.copyfile(teacher_folder / name, folder / name)
