"""Starting stages.py, and reading what came of it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

# Of a program whose processes share a core with other tests
AT_MOST_S = 600
PROGRAM = Path(__file__).with_name("stages.py")


def start(
    folder: Path, entries: list[dict], directory: Path | None = None, **environment: str
) -> subprocess.Popen[str]:
    """The program on these entries, in this working directory, its output in pipes."""
    spec = folder / f"spec-{len(list(folder.glob('spec-*')))}.json"
    spec.write_text(json.dumps(entries))
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(spec)],
        cwd=directory,
        env=kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, entries: list[dict], *, code: int = 0, directory: Path | None = None) -> tuple[str, str]:
    """Output and errors of the program, which has to end with this code."""
    process = start(folder, entries, directory)
    out, err = process.communicate(timeout=AT_MOST_S)
    assert process.returncode == code, (out, err)
    return out, err


def curve(folder: Path, name: str, column: str = "loss") -> list[float]:
    with (folder / name / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file)]
