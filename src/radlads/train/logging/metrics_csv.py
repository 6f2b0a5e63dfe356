"""metrics.csv, speed.csv: a row as soon as it is known, after the rows of the run that is gone on with."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

METRICS, SPEED = "metrics.csv", "speed.csv"


class MetricsCsv(Logger):
    """Appends rows to a CSV file, after those it holds; columns are the names met so far that it takes, sorted.

    Lightning's own logger deletes the rows that are there, and keeps new ones in memory for a hundred steps.
    """

    def __init__(self, path: Path, takes: Callable[[str], bool] = lambda name: True):
        super().__init__()
        self._path, self._takes, self._columns = path, takes, list[str]()
        if path.is_file():
            with path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row at once, if it has something to take. The step is among the metrics."""
        metrics = {name: value for name, value in metrics.items() if self._takes(name)}
        if not metrics:
            return
        if metrics.keys() - set(self._columns):
            self._widen(metrics)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(metrics)

    @rank_zero_only
    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """None: config.yaml has them."""

    def _widen(self, metrics: Mapping[str, float]) -> None:
        """Write the file anew with columns for these metrics too."""
        rows: list[dict[str, str]] = []
        if self._path.is_file():
            with self._path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self._columns = sorted(metrics.keys() | set(self._columns))
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
