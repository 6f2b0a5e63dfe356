"""The user's cache: folders that are made once from something else, and can be made again."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from radlads.checkpoint.atomic import unfinished_folder

CACHE_VARIABLE = "RADLADS_CACHE"


def cache_folder() -> Path:
    """$RADLADS_CACHE, else radlads in the user's cache folder ($XDG_CACHE_HOME or ~/.cache). It may not exist yet."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "radlads"


def made_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """`folder`, which `fill` is given to fill if it does not exist. Of several processes one fills it, the others wait.

    It appears under its name when it is complete; nothing is left of one that failed.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with unfinished_folder(folder, keep_failed=False) as partial:
                fill(partial)
    return folder
