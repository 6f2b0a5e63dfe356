"""The example mixers of docs/mixers.md as files: what the page shows is what is tested."""

import re
from pathlib import Path

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
