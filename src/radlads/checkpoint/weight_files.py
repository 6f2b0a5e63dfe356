"""Weights from one file format into another, tensor by tensor: memory holds one, whatever the checkpoint's size."""

import re
from pathlib import Path

import torch

from radlads.checkpoint.atomic import unfinished_file, unfinished_folder
from radlads.checkpoint.hf_export import copy_all_but_weights
from radlads.checkpoint.manifest import MANIFEST, check_model_files, write_folder_checksums
from radlads.checkpoint.model_folder import STUDENT_ARCHITECTURES, architectures_of, open_model
from radlads.checkpoint.pth import PthFile, write_pth
from radlads.checkpoint.published_export import released_tensors
from radlads.checkpoint.safetensors_writer import SHARD_BYTES, write_safetensors, write_shards
from radlads.checkpoint.tokenizer_files import check_copyable, copy_tokenizer, read_tokenizer
from radlads.checkpoint.weights import EMBEDDING, HEAD, CastWeights, SafetensorsFolder, StoredWeights, TiedWeights
from radlads.files import read_json

# Two unrelated matrices of equal size are 1.4 of it apart; training moves a head by a few hundredths
FURTHEST_HEAD = 0.7
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def open_weights(path: Path) -> StoredWeights:
    """The tensors of a `.pth` file, a `.safetensors` file or a folder of the latter. Raises ValueError for others."""
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return SafetensorsFolder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a .pth file, a .safetensors file or a model folder")
    return PthFile(path)


def is_weights_file(path: Path) -> bool:
    """True for the name of a weights file, as against a model folder's or a hub name."""
    return path.suffix in (".pth", ".safetensors") and not path.is_dir()


def starting_point(named: str) -> Path | None:
    """The weights file or model folder that train.load_model names; None for "" and "auto": the stage knows.

    FOLDER/rwkv-final.pth is the name under which the released system leaves a stage's result: where there is no such
    file, but a finished stage of ours, it means FOLDER.
    """
    path = Path(named)
    if named in ("", "auto"):
        return None
    if path.name == "rwkv-final.pth" and not path.exists() and (path.parent / MANIFEST).is_file():
        return path.parent
    return path


def convert_to_pth(source: Path, target: Path) -> None:
    """Write the weights of a folder or file as a `.pth` file. Errors as open_weights, check_model_files, write_pth.

    A student's folder gives a file that the released training code loads strictly: with the tensors that its mixers
    store only, and a head. Everything else is written as it is.
    """
    check_model_files(source, whole=True)
    if _is_students_folder(source):
        stored = open_model(source)
        weights = released_tensors(stored.weights, stored.config)
    else:
        weights = open_weights(source)
    write_pth(weights, target)


def _is_students_folder(source: Path) -> bool:
    path = source / "config.json"
    found = architectures_of(read_json(path)) if path.is_file() else []
    return bool(set(STUDENT_ARCHITECTURES) & set(found))


def convert_to_safetensors(
    source: Path,
    target: Path,
    *,
    tokenizer_folder: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    retie: bool = False,
) -> None:
    """Write the weights of a `.pth` file, or others, as `target`: a `.safetensors` file or else a folder of shards.

    `dtype` is what floating-point tensors are cast to (default: none). A folder's shards hold at most `shard_bytes`
    (one tensor at least); where the source is a model folder too, the rest of the model comes along, so that
    AutoModelForCausalLM can load it, with the tokenizer of `tokenizer_folder` if it is given. `retie`: drop the head of
    a model folder whose teacher's head was its embedding, which is the head again from then on.

    Raises ValueError if `target` exists, the weights cannot be read or are not those that hashes beside them describe,
    or there is no head to be tied, and OSError if the disk is full; nothing is left then.
    """
    check_model_files(source, whole=True)
    weights: StoredWeights = CastWeights(open_weights(source), dtype)
    if retie:
        _check_can_be_tied(weights, source, target)
        weights = TiedWeights(weights)
    if tokenizer_folder is not None:
        read_tokenizer(tokenizer_folder)
    if source.is_dir() or tokenizer_folder is not None:
        check_copyable(tokenizer_folder or source)
    if target.suffix == ".safetensors":
        if tokenizer_folder is not None:
            raise ValueError(f"{target} is one file, which holds no tokenizer: name a folder to write, or leave it out")
        with unfinished_file(target) as partial:
            write_safetensors(weights, list(weights), partial)
        return
    with unfinished_folder(target, keep_failed=False) as partial:
        write_shards(weights, partial, shard_bytes=shard_bytes)
        if source.is_dir():
            changed = {"tie_word_embeddings": True} if retie else {}
            copy_all_but_weights(source, partial, tokenizer_folder=tokenizer_folder, dtype=dtype, changed=changed)
        elif tokenizer_folder is not None:
            copy_tokenizer(tokenizer_folder, partial)
        write_folder_checksums(partial)


def _check_can_be_tied(weights: StoredWeights, source: Path, target: Path) -> None:
    """Raise ValueError unless the head of a model folder began as its embedding and is still close to it."""
    if target.suffix == ".safetensors" or not (source / "config.json").is_file():
        raise ValueError("a head is tied in a model's configuration: name a model folder, and a folder to write")
    if HEAD not in weights or EMBEDDING not in weights:
        raise ValueError(f"{source} has no head beside its embedding: it is tied already")
    if weights.info(HEAD).shape != weights.info(EMBEDDING).shape or _distance(weights) > FURTHEST_HEAD:
        raise ValueError(
            f"the head of {source} is another matrix than its embedding: its teacher was not tied, keep it"
        )


def _distance(weights: StoredWeights) -> float:
    """How far the head is from the embedding, relative to the embedding."""
    head, embedding = weights[HEAD].float(), weights[EMBEDDING].float()
    return float(torch.linalg.vector_norm(head - embedding) / torch.linalg.vector_norm(embedding))


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 1000000. Raises ValueError for other text and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", text.strip().upper())
    num_bytes = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if num_bytes < 1:
        raise ValueError(f"a shard's size is given as 5GB, 500MB or a number of bytes, not {text!r}")
    return num_bytes
