"""What a benchmark leaves behind: a table row for every measurement, a JSON record, and the file of latest results."""

import datetime
import json
import subprocess
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from radlads.bench.measure import Ceilings, Timing
from radlads.checkpoint.manifest import versions
from radlads.console import Console
from radlads.files import read_json, write_text

# The cases that the file of latest results holds
LATEST = (
    "align_4x512",
    "align_32x512",
    "distill_12x512",
    "extend_1x16384",
    "prefill_8k",
    "decode_b1_8k",
    "decode_b1_64k",
    "decode_b32",
)
# What a training step's speed and memory depend on beside its shape
_SETTINGS = ("teacher_precision", "checkpointing")
GIB = 2**30
HEADER = f"{'case':<26}{'of':<22}{'tokens/s':>11}{'ms (min to max)':>30}{'peak GB':>9}{'ceiling':>9}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: whose (student, teacher, or a kernel's backend), how much work, and what it took.

    work: shape and settings. tokens: tokens per run. share: of this machine's ceiling for the same work. beside_bytes:
    peak memory beside the weights. problem: the sentence that stands in place of numbers; `failed` says whether the
    command failed by it, or merely left something out.
    """

    case: str
    of: str
    work: dict[str, Any]
    tokens: int = 0
    timing: Timing | None = None
    share: float | None = None
    peak_bytes: int | None = None
    beside_bytes: int | None = None
    problem: str | None = None
    failed: bool = False

    @property
    def tokens_per_s(self) -> float | None:
        """At the median time."""
        return None if self.timing is None else 1000 * self.tokens / self.timing.median_ms

    def text(self) -> str:
        """The row of the table."""
        if self.timing is None:
            return f"{self.case:<26}{self.of:<22}{self.problem}"
        timing = self.timing
        spread = f"{timing.median_ms:.2f} ({timing.min_ms:.2f} to {timing.max_ms:.2f})"
        peak = "" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.1f}"
        share = "" if self.share is None else f"{self.share:.1%}"
        return f"{self.case:<26}{self.of:<22}{self.tokens_per_s:>11,.0f}{spread:>30}{peak:>9}{share:>9}"

    def content(self) -> dict[str, Any]:
        """The row as JSON holds it: gb are 1e9 bytes, gib 2^30."""
        if self.timing is None:
            return {"case": self.case, "of": self.of, **self.work, "problem": self.problem, "failed": self.failed}
        memory: dict[str, float | None] = {}
        for name, value in (("peak", self.peak_bytes), ("beside_weights", self.beside_bytes)):
            memory |= {f"{name}_gb": _in(value, 1e9), f"{name}_gib": _in(value, GIB)}
        return {
            **{"case": self.case, "of": self.of},
            **self.work,
            **asdict(self.timing),
            **{"tokens_per_s": self.tokens_per_s, "share_of_ceiling": self.share},
            **memory,
        }


@dataclass
class Record:
    """Collects rows: prints each, and writes the JSON record and the latest results after each."""

    console: Console
    facts: dict[str, Any]
    commit: str | None
    json_path: Path | None = None
    results_path: Path | None = None
    results_suffix: str = ""
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def open(self, ceilings: Ceilings) -> Ceilings:
        """Say what the machine reaches at best, and begin the table. Returns the ceilings."""
        self.facts |= {"ceilings": asdict(ceilings)}
        self.say(
            f"{self.facts['device']}: copy {ceilings.copy_gb_per_s:,.0f} GB/s, "
            f"matrix-vector {ceilings.matvec_gb_per_s:,.0f} GB/s, matmul {ceilings.matmul_tflop_per_s:,.2f} TFLOP/s"
        )
        self.console.line(HEADER)
        self._flush()
        return ceilings

    def add(self, row: Row) -> None:
        """Print a row and bring the files up to date."""
        self.rows.append(row)
        self.console.line(row.text())
        self._flush()
        if self.results_path is not None:
            merge_results(self.results_path, [row], self.commit, self.results_suffix)

    def say(self, text: str) -> None:
        """A line with the seconds since the beginning."""
        self.console.line(f"[{time.monotonic() - self.began:5.0f} s] {text}")

    @contextmanager
    def attempt(self, row: Row, *, lower: str, optional: bool = False) -> Iterator[None]:
        """Run one case; if it fails, add `row` with a sentence that says why, and let the next cases go on.

        lower: what to do about lack of memory; without this case the command does not fail if it is `optional`. Another
        failure is printed with its traceback, too.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            problem, failed = f"out of memory: {lower}", not optional
        except _failures() as error:
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            failed = True
            self.console.line(traceback.format_exc())
        else:
            return
        self.add(replace(row, problem=problem, failed=failed))

    @property
    def num_failed(self) -> int:
        """Cases that were to be measured and could not be."""
        return sum(row.failed for row in self.rows)

    def _flush(self) -> None:
        if self.json_path is None:
            return
        content = {
            **self.facts,
            "commit": self.commit,
            "elapsed_s": round(time.monotonic() - self.began, 1),
            "cases": [row.content() for row in self.rows],
        }
        write_text(self.json_path, json.dumps(content, indent=2) + "\n")


def _failures() -> tuple[type[Exception], ...]:
    """What CUDA, the compiler, Triton and our own checks raise."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return RuntimeError, ValueError
    return RuntimeError, ValueError, TritonError


def merge_results(path: Path, rows: Sequence[Row], commit: str | None, suffix: str = "") -> None:
    """Replace what the file of latest results says of the student's cases among `rows`; the rest of it stays.

    suffix: goes behind the names of the cases, for a student other than the usual one.
    """
    measured = {row.case: row for row in rows if row.of == "student" and row.timing is not None and row.case in LATEST}
    if not measured:
        return
    results = read_json(path) if path.is_file() else {}
    for case, row in measured.items():
        assert row.tokens_per_s is not None
        results[case + suffix] = {
            "tokens_per_s": round(row.tokens_per_s, 1),
            "peak_gb": _in(row.peak_bytes, 1e9),
            "share_of_ceiling": None if row.share is None else round(row.share, 4),
            "commit": commit,
            **{name: row.work[name] for name in _SETTINGS if name in row.work},
        }
    ordered = {case: results[case] for case in (*LATEST, *results) if case in results}
    write_text(path, json.dumps(ordered, indent=2) + "\n")


def _in(value_bytes: int | None, unit: float) -> float | None:
    return None if value_bytes is None else round(value_bytes / unit, 3)


def environment(device_name: str) -> dict[str, Any]:
    """Versions, device and date."""
    found = versions()
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "not installed"
    found.setdefault("fla-core", "not installed")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": now, "device": device_name, "versions": found}


def checkout_commit() -> str | None:
    """The commit of the checkout that this code lies in, with "-dirty" after changes; None outside of one."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", "../__init__.py"], capture_output=True, check=False
        )
        if tracked.returncode:
            return None
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
