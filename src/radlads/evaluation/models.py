"""A model to evaluate as it comes: a teacher, a stage of a conversion, an export, or a published checkpoint."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from radlads.checkpoint.model_folder import (
    STUDENT_ARCHITECTURES,
    architectures_of,
    config_of,
    load_model,
    read_config,
)
from radlads.convert.hf_source import SUPPORTED_ARCHITECTURES, open_teacher, teacher_config
from radlads.convert.student import build_teacher
from radlads.files import read_json
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM


def open_model(folder: Path, dtype: torch.dtype) -> RadladsForCausalLM:
    """A teacher's, a stage's, an exported or a published folder as our model, with its generation defaults.

    Every byte of a model with hashes is compared with them: what is measured takes longer.
    """
    if is_teacher(folder):
        model = build_teacher(open_teacher(folder), dtype=dtype)
    else:
        model = load_model(folder, dtype=dtype, verify=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def notes_on(folder: Path) -> tuple[str, ...]:
    """What a user should know of the folder's model, a sentence each."""
    return open_teacher(folder).notes if is_teacher(folder) else ()


def is_teacher(folder: Path) -> bool:
    """Whether the folder's architecture is one that we convert, not one that we made."""
    path = folder / "config.json"
    return path.is_file() and bool(set(architectures_of(read_json(path))) & set(SUPPORTED_ARCHITECTURES))


def model_config(folder: Path) -> RadladsConfig:
    """The configuration of any folder that open_model opens. Raises ValueError for a folder that is no model."""
    values = read_config(folder, *STUDENT_ARCHITECTURES, *SUPPORTED_ARCHITECTURES)
    return teacher_config(values, folder) if is_teacher(folder) else config_of(values, folder)
