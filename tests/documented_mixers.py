"""The example mixers of docs/mixers.md as files: what the page shows is what is tested."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from radlads.model import registry

PAGE = Path(__file__).parents[1] / "docs" / "mixers.md"


def write_mixers(folder: Path) -> Path:
    """Write the page's mixers below the folder, which --mixer-path then takes."""
    for name, source in examples().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return folder


def examples() -> dict[str, str]:
    """The source of each mixer by the file name that its first line has."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = [(block.partition("\n")[0].removeprefix("# "), block) for block in blocks]
    return {name: block for name, block in named if name.endswith(".py")}


@contextmanager
def nothing_known() -> Iterator[None]:
    """Have no mixers but ours found, and forget afterwards what was found all the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for name, empty in (("_named_by_user", set()), ("_mixer_paths", set()), ("_exports", [])):
            patch.setattr(registry, name, empty)
        try:
            yield
        finally:
            forget()


@contextmanager
def known(folder: Path) -> Iterator[None]:
    """Have the mixers of this folder found as --mixer-path has them found, and forget all of it afterwards."""
    with nothing_known():
        registry.add_mixer_path(folder)
        yield


def forget() -> None:
    """Forget what was imported of mixers' own files."""
    for name in [name for name in sys.modules if name.startswith(("tmix", "cmix", "radlads.model.tmix_"))]:
        del sys.modules[name]
