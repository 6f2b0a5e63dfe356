"""An exported folder onto the Hugging Face hub: what would be uploaded, and the upload."""

import glob
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from radlads.checkpoint.foreign_folders import refuse_links_out

# What a refused or broken connection raises: the error of the HTTP library that this huggingface_hub is built on
_HTTP_ERROR = cast("type[Exception]", HfHubHTTPError.__mro__[1])


def check_repo(repo: str, *, needs_token: bool) -> None:
    """Raise ValueError for what is no name of a model on the hub, or without a token to upload with."""
    validate_repo_id(repo)
    if "/" not in repo:
        raise ValueError(f"--push-to-hub takes OWNER/NAME, not {repo!r}")
    if needs_token and get_token() is None:
        raise ValueError("there is no token for the hub: run hf auth login, or set HF_TOKEN")


def uploaded_files(folder: Path) -> list[Path]:
    """The files that an upload takes: all that lie in the folder itself, hidden ones left out.

    Raises ValueError if the folder is no export, or one of them is a link to somewhere else.
    """
    if not (folder / "config.json").is_file() or not (folder / "README.md").is_file():
        raise ValueError(f"{folder} is no exported model (config.json and README.md): name OUT too, to export it first")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    refuse_links_out(folder, [glob.escape(path.name) for path in files])
    return files


def listing(folder: Path, repo: str) -> list[str]:
    """Lines that say what an upload would take, with sizes."""
    sizes = {path.name: path.stat().st_size for path in uploaded_files(folder)}
    lines = [f"{num_bytes:>16,}  {name}" for name, num_bytes in sizes.items()]
    return [f"would upload to {repo}, in bytes:", *lines, f"{sum(sizes.values()):>16,}  in {len(sizes)} files"]


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Make the repository if it is not there, upload the folder's files and return the model's address.

    Raises ValueError if the hub refuses or cannot be reached; the same call goes on with what is not yet there.
    """
    names = [path.name for path in uploaded_files(folder)]
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=names, commit_message=f"Upload {folder.name} with radlads"
        )
    except (_HTTP_ERROR, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{repo} could not be uploaded: {reason}; {folder} is complete, try again from it") from error
    return str(address)
