"""Running the repository root's scripts in the tests' own process, and a disk that is full."""

import resource
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_script(monkeypatch, script, *arguments):
    """Run a script as Python would, up to its exit code, which is returned."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stopped.value.code


@contextmanager
def largest_file(num_bytes):
    """Have the system refuse to write files beyond this size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
