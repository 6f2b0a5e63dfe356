"""A model folder's tokenizer: where it is, its files and its ids, which may be fewer than the embedding's rows."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from radlads.checkpoint.foreign_folders import refuse_links_out
from radlads.checkpoint.hub_folder import DESCRIBING_FILES, locate_folder
from radlads.checkpoint.safetensors_files import refuse_pointer
from radlads.files import read_json, write_text

TOKENIZER_FILE = "tokenizer.json"
_SENTENCEPIECE_FILE = "tokenizer.model"
GENERATION_FILE = "generation_config.json"
_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    _CONFIG_FILE,
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_FILE,
)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def locate_tokenizer(path_or_name: str | Path) -> Path:
    """The local folder of a path, or of a hub name, whose tokenizer, configuration and licence are fetched, no weights.

    Raises ValueError if there is neither.
    """
    return locate_folder(path_or_name, DESCRIBING_FILES, TOKENIZER_FILE)


def choose_tokenizer(named: str | Path | None, *folders: Path) -> Path:
    """Where a tokenizer is taken from: the folder or hub name that is named, else the first of `folders` that has one.

    Raises ValueError if none has.
    """
    if named is not None:
        return locate_tokenizer(named)
    for folder in folders:
        if (folder / TOKENIZER_FILE).is_file():
            return folder
    raise ValueError(f"{folders[0]} has no {TOKENIZER_FILE}: name the teacher's folder with --tokenizer")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, which neither cuts texts short nor fills them up, whatever its file asks for.

    Raises ValueError if it is missing, unreadable or empty.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file() and (folder / _SENTENCEPIECE_FILE).is_file():
        raise ValueError(
            f"{folder} has a {_SENTENCEPIECE_FILE} but no {TOKENIZER_FILE}: make it, with transformers' "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    if not path.is_file():
        raise ValueError(f"{folder} has no {TOKENIZER_FILE}: copy the teacher's tokenizer files into it")
    refuse_pointer(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{path} is not a readable tokenizer: copy it anew") from error
    if num_ids(tokenizer) == 0:
        raise ValueError(f"{path} has no tokens: copy it anew")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id that the tokenizer has a token for; rows of an embedding from there on pad it."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def check_copyable(source: Path) -> None:
    """Raise ValueError if a file that exports take from the folder `source` is a link to somewhere else."""
    refuse_links_out(source, (*TOKENIZER_FILES, *LICENCE_FILES))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files (and generation defaults) that the folder `source` has, without its own code.

    `folder` holds the model's config.json already. Where its embedding is padded, generation_config.json will have
    transformers' generate suppress the ids that are no tokens. Raises ValueError as check_copyable.
    """
    check_copyable(source)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _drop_code(folder / _CONFIG_FILE)
    if (folder / TOKENIZER_FILE).is_file() and (folder / "config.json").is_file():
        _suppress_padding(folder, read_json(folder / "config.json"))


def _drop_code(path: Path) -> None:
    """Have a tokenizer_config.json name no code, which is not copied: transformers' own class reads tokenizer.json."""
    values = read_json(path) if path.is_file() else {}
    if "auto_map" in values:
        kept = {key: value for key, value in values.items() if key != "auto_map"}
        write_text(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def _suppress_padding(folder: Path, config: dict) -> None:
    ids, path = num_ids(read_tokenizer(folder)), folder / GENERATION_FILE
    padding = range(ids, config.get("vocab_size") or ids)
    if not padding:
        return
    if path.is_file():
        values = read_json(path)
    else:  # transformers takes them from config.json only where this file does not exist
        values = {name: config[name] for name in _SPECIAL_IDS if config.get(name) is not None}
    values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), *padding})
    write_text(path, json.dumps(values) + "\n")
