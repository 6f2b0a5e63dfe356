"""Which files of a folder hold its weights, and why a folder without such files has none."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from radlads.files import read_json

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # git-lfs pointers are smaller
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder, or of one safetensors file, by the tensor's name.

    As transformers does: model.safetensors if there is one, whatever lies beside it, else all tensors in the shards
    that the index names. Every file's header is read, no tensor. Raises ValueError if there are no weights, a shard or
    one of its tensors is missing, or a file is truncated or not safetensors.
    """
    if folder.is_file():
        return dict.fromkeys(_names_in(folder), folder)
    if (folder / WEIGHTS_FILE).is_file():
        return dict.fromkeys(_names_in(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    if (folder / WEIGHTS_INDEX).is_file():
        return _indexed_files(folder)
    raise ValueError(f"{folder} holds no weights: {_reason(folder)}")


def shard_names(folder: Path) -> set[str]:
    """The files that a folder's index of shards names; none if it has no index. Raises ValueError for a bad index."""
    return set(_index(folder).values()) if (folder / WEIGHTS_INDEX).is_file() else set()


def opened(path: Path) -> safe_open:
    """A safetensors file to read tensors from. Raises ValueError if it is truncated or not safetensors."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        refuse_pointer(path)
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): copy it anew") from error


def refuse_pointer(path: Path) -> None:
    """Raise ValueError if git-lfs has left a note of where a file is, instead of the file."""
    if path.stat().st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in {path.parent}")


def _names_in(path: Path) -> list[str]:
    with opened(path) as file:
        return list(file.keys())


def _indexed_files(folder: Path) -> dict[str, Path]:
    index = _index(folder)
    found: dict[str, Path] = {}
    for shard in dict.fromkeys(index.values()):
        path = folder / shard
        if not path.is_file():
            raise ValueError(f"{path} is missing: {_download(folder) or f'copy all shards that {WEIGHTS_INDEX} names'}")
        names = _names_in(path)
        if lacking := sorted({name for name in index if index[name] == shard} - set(names)):
            raise ValueError(f"{path} lacks {lacking[0]}, which {WEIGHTS_INDEX} says it holds: copy the folder anew")
        found |= {name: path for name in names if index.get(name, shard) == shard}
    return found


def _index(folder: Path) -> dict[str, str]:
    path = folder / WEIGHTS_INDEX
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(_is_below(shard) for shard in shards.values()):
        raise ValueError(f"{path} is not an index of safetensors shards: copy it anew")
    return shards


def _is_below(shard: object) -> bool:
    return isinstance(shard, str) and not Path(shard).is_absolute() and ".." not in Path(shard).parts


def _reason(folder: Path) -> str:
    """Why a folder has no weights that can be read, and what helps."""
    if unfinished := _download(folder):
        return unfinished
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if any("-of-" in name for name in others):
        return f"{WEIGHTS_INDEX} is missing, which names its {len(others)} shards: copy it too"
    if others or (folder / "original").is_dir():
        named = others[0] if others else "original/"
        return f"{named} is not what transformers reads: take the {WEIGHTS_FILE} of the same model, or its shards"
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{pickles[0]} is a pickle, which could run code: save the model as safetensors, with transformers' "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    return f"{WEIGHTS_FILE} (or {WEIGHTS_INDEX} and its shards) is missing"


def _download(folder: Path) -> str | None:
    """What to do about a download that has not finished; None if there is none."""
    for path in _unfinished(folder):
        return f"its download has not finished ({path.name}): start it again"
    return None


def _unfinished(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.incomplete")
    yield from (folder / ".cache" / "huggingface" / "download").rglob("*.incomplete")
