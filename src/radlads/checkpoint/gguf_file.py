"""A GGUF file as an ordinary model folder: config.json, safetensors, tokenizer, generation settings.

transformers reads the file, which takes half a minute and memory for the whole model. So it happens once: the folder is
kept in the user's cache by the file's hash, and everything else reads it as it reads any folder.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from radlads.checkpoint.gguf_parts import SUFFIX, check_gguf_package, file_and_parts, is_later_part, joined, open_parts
from radlads.checkpoint.safetensors_writer import SHARD_BYTES, write_shards
from radlads.checkpoint.user_cache import cache_folder, made_once
from radlads.checkpoint.weights import ModelWeights
from radlads.checksums import sha256
from radlads.files import read_json, write_text

if TYPE_CHECKING:
    from gguf import GGUFReader

ORIGIN = "gguf.json"
# Part of a cached folder's name: raise it when files come out otherwise than before
_LAYOUT = 1
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FLOAT_TYPES = {"F32", "F16", "BF16"}
# Keys that change the model, and that the reader of transformers leaves out without a word
_LEFT_OUT = {
    "rope.scaling.type": "a RoPE scaling",
    "rope.scaling.factor": "a RoPE scaling",
    "expert_count": "experts",
    "attention.sliding_window": "a sliding window",
}
_TOKENIZER_KEYS_OF_THIS_MACHINE = ("backend", "is_local", "local_files_only")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder without safetensors; None if it means none.

    The first part of a split file stands for all. Raises ValueError for a folder that holds several files.
    """
    if path.suffix == SUFFIX and not path.is_dir():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if not is_later_part(file))
    if len(files) > 1:
        raise ValueError(
            f"{path} holds several GGUF files ({', '.join(file.name for file in files)}): name one of them"
        )
    return files[0] if files else None


def unpack_gguf(file: Path) -> Path:
    """The model folder of a GGUF file, in the user's cache; it is made now if it is not there.

    Weights are stored as fp32, which loses nothing. Raises ValueError for a missing file or part, a
    truncated or damaged one, an architecture or feature that is not supported, and a missing gguf package.
    """
    check_gguf_package()
    stem, parts = file_and_parts(file)
    digest = hashlib.sha256("".join(sha256(part) for part in parts).encode()).hexdigest()[:16]
    return made_once(cache_folder() / "gguf" / f"{stem}-{digest}-{_LAYOUT}", lambda partial: _unpack(parts, partial))


def origin_note(folder: Path) -> str | None:
    """One line on the GGUF file that a folder was made from; None for any other folder."""
    if not (folder / ORIGIN).is_file():
        return None
    origin = read_json(folder / ORIGIN)
    types = ", ".join(f"{count} {name}" for name, count in origin["types"].items())
    how = "read" if set(origin["types"]) <= _FLOAT_TYPES else "dequantised"
    return f"{origin['file']}: {how} to fp32 ({types})"


def _unpack(parts: list[Path], folder: Path) -> None:
    readers = open_parts(parts)
    _check_supported(readers, parts[0])
    types = Counter(tensor.tensor_type.name for reader in readers for tensor in reader.tensors)
    with TemporaryDirectory(dir=folder.parent) as temporary, _quiet_transformers():
        file = parts[0] if len(parts) == 1 else joined(readers, Path(temporary) / parts[0].name)
        model = _read_model(file, readers[0])
        _check_all_used(model, types.total(), parts[0])
        _write_model(model, folder)
        _write_tokenizer(file, folder)
        _write_generation(model, readers[0], folder)
    if licence := _text(readers[0], "general.license"):
        write_text(folder / "README.md", f"---\nlicense: {licence}\n---\n")
    origin = {"file": parts[0].name, "types": dict(types.most_common())}
    write_text(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")


def _check_supported(readers: "list[GGUFReader]", file: Path) -> None:
    """Raise ValueError for an architecture or a feature that would be lost."""
    architecture = _text(readers[0], "general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{file} holds the architecture {architecture!r}: only {known} can be converted")
    fields = readers[0].fields
    lost = [what for key, what in _LEFT_OUT.items() if _is_set(fields.get(f"{architecture}.{key}"))]
    if any(tensor.name.startswith("rope_freqs") for reader in readers for tensor in reader.tensors):
        lost.append("a RoPE scaling")
    if lost:
        raise ValueError(
            f"{file} has {lost[0]}, which transformers does not read from GGUF: take the model's Hugging Face folder"
        )


def _is_set(field: Any) -> bool:
    return field is not None and field.contents() not in (0, "none", 1.0)


def _read_model(file: Path, reader: "GGUFReader") -> PreTrainedModel:
    """The model as transformers reads it, in fp32, with every weight from the file."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    architecture = _text(reader, "general.architecture")
    if (head_size := reader.fields.get(f"{architecture}.attention.key_length")) is not None:
        config.head_dim = int(head_size.contents())
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{file} has tensors of a type that cannot be dequantised ({error}): take another file"
        ) from error
    model, info = read
    if missing := sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"])):
        raise ValueError(f"{file} lacks {missing[0]} ({len(missing)} such): it is incomplete, or of another model")
    found: PreTrainedModel = model
    return found


def _check_all_used(model: PreTrainedModel, num_tensors: int, file: Path) -> None:
    """Raise ValueError if a file has weights that the model has no place for, which transformers drops silently."""
    num_used = len(list(model.parameters()))
    if num_used < num_tensors:
        raise ValueError(
            f"{file} has {num_tensors} tensors, but a {type(model).__name__} takes only {num_used}, so that some would "
            "be lost, such as biases: take the model's Hugging Face folder"
        )


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    values = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        values.pop(name, None)
    values |= {"architectures": [type(model).__name__], "dtype": "float32"}
    write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")
    write_shards(ModelWeights(model), folder, shard_bytes=SHARD_BYTES)


def _write_tokenizer(file: Path, folder: Path) -> None:
    """The tokenizer's files and its chat template, under a class name that every transformers knows."""
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    invented = _drop_invented_tokens(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    values = {
        key: value
        for key, value in read_json(path).items()
        if key not in _TOKENIZER_KEYS_OF_THIS_MACHINE and not (key.endswith("_token") and value in invented)
    }
    write_text(path, json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _drop_invented_tokens(path: Path) -> set[str]:
    """Take tokens out of tokenizer.json that its vocabulary lacks, such as a default <|endoftext|>, and return them."""
    tokenizer = read_json(path)
    known = tokenizer["model"]["vocab"]
    invented = {token["content"] for token in tokenizer["added_tokens"] if token["content"] not in known}
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in invented]
    write_text(path, json.dumps(tokenizer, ensure_ascii=False))
    return invented


def _write_generation(model: PreTrainedModel, reader: "GGUFReader", folder: Path) -> None:
    """generation_config.json, whose end-of-text ids include the end of a turn where the file names one."""
    config: PreTrainedConfig = model.config
    ends = [config.eos_token_id]
    for name in ("eot_token_id", "eom_token_id"):
        field = reader.fields.get(f"tokenizer.ggml.{name}")
        ends += [] if field is None else [int(field.contents())]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    values = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    values |= {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    known = {name: value for name, value in values.items() if value is not None}
    write_text(folder / "generation_config.json", json.dumps(known, indent=2) + "\n")


def _text(reader: "GGUFReader", key: str) -> str:
    """A field's text; empty if there is no such field."""
    field = reader.fields.get(key)
    return "" if field is None else str(field.contents())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings, and no progress bars, which go to stderr whatever transformers is told."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
