"""A folder by its path or its hub name, of which a part is fetched."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from radlads.checkpoint.gguf_file import find_gguf, unpack_gguf
from radlads.checkpoint.named_models import NAMED_MODELS, fetch_named

# What says how a text becomes tokens, whose model it is and under which licence; no weights
DESCRIBING_FILES = ("*.json", "*.txt", "*.jinja", "README.md", "LICENSE*", "LICENCE*", "NOTICE*")


def locate_folder(path_or_name: str | Path, patterns: Sequence[str], what: str) -> Path:
    """The local folder of a path, of a GGUF file (see gguf_file.unpack_gguf), of a named model, or of a hub name
    (`owner/name`) whose files of these patterns are fetched.

    what: names what the folder has to hold. Raises ValueError if there is none of these.
    """
    folder, name = Path(path_or_name).expanduser(), str(path_or_name)
    if (file := find_gguf(folder)) is not None:
        return unpack_gguf(file)
    if folder.is_dir():
        return folder
    if name in NAMED_MODELS and not folder.exists():
        return unpack_gguf(fetch_named(name))
    if folder.exists():
        raise ValueError(f"{folder} is a file: give the folder that holds {what}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        named = ", ".join(NAMED_MODELS)
        raise ValueError(
            f"{name} is no folder, GGUF file, named model ({named}) or hub name such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is no local folder and could not be fetched from the hub: {reason}") from error
