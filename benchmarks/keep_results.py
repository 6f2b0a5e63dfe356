"""What benchmarks/keep_the_teacher.py makes of its rows' measurements: keep_the_teacher.json, the table, the goals."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from keep_measures import mean_of

from radlads.files import read_json, write_text

RESULTS = "keep_the_teacher.json"
ORDER = (
    *("teacher", "teacher_window_untrained", "window_untrained", "paper", "window", "window_third", "kept_third"),
    *("window_kept_third", "window_kept_tenth"),
)
_PARTS = ("model", "no_window", "no_recurrence", "no_kept_layers")


class Goal(NamedTuple):
    """A value of a row, as a share of that of another, that is to be at most, or at least, so much."""

    row: str
    value: str
    other: str
    bound: float
    at_least: bool = False


GOALS = (
    Goal("window", "kl", "paper", 0.60),
    Goal("window_third", "kl", "paper", 1.0),
    Goal("window_kept_third", "kl", "paper", 0.15),
    Goal("window_kept_third", "kl_recalled", "paper", 0.12),
    Goal("window_kept_third", "needle", "teacher", 0.9, at_least=True),
)


def write_row(path: Path, teacher: str, name: str, share: float, by_seed: Mapping[int, Mapping[str, Any]]) -> None:
    """Put a row, and its student without parts of it, among the results: means over the seeds, and each seed's own."""
    content = read_json(path) if path.is_file() else {}
    rows = content.setdefault(teacher, {})
    for part in _PARTS:
        measured = {str(seed): found[part] for seed, found in by_seed.items() if part in found}
        if not measured:
            continue
        facts = (
            {key: [found[key] for found in by_seed.values()] for key in ("layers", "tokens", "training_s")}
            if (share)
            else {}
        )
        rows[name if part == "model" else f"{name}/{part}"] = {
            "tokens_share": share,
            **mean_of(list(measured.values())),
            **{key: dict(zip(measured, values, strict=True)) for key, values in facts.items()},
            "seeds": measured,
            "run": next(iter(by_seed.values()))["run"],
        }
    for row in rows.values():
        row["ratios"] = ratios(row, rows)
    write_text(path, json.dumps(content, indent=1) + "\n")


def ratios(row: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, float | None]:
    """KL and KL at recalled positions as shares of the paper row's, needles of the teacher's; None: not there yet."""
    return {
        f"{value}_of_{other}": share_of(row, rows.get(other), value)
        for value, other in (("kl", "paper"), ("kl_recalled", "paper"), ("needle", "teacher"))
    }


def share_of(row: Mapping[str, Any] | None, other: Mapping[str, Any] | None, value: str) -> float | None:
    """A row's value as a share of another's, None if one has none."""
    if row is None or other is None or row[value] is None or not other[value]:
        return None
    return float(row[value] / other[value])


def table(rows: Mapping[str, Any]) -> Iterator[str]:
    """A line for each row, and one for each goal."""
    width = max((len(name) for name in rows), default=0) + 1
    yield (
        f"{'':{width}}{'tokens':>7}{'loss':>8}{'KL':>8}{'recalled':>10}{'rest':>8}{'top-1':>8}{'needle':>8}"
        f"{'KL/paper':>10}{'rec./paper':>12}{'needle/t.':>11}  kept"
    )
    for name in sorted(rows, key=_place):
        row = rows[name]
        shares = row["ratios"]
        kept = "; ".join(dict.fromkeys(",".join(map(str, layers)) for layers in row.get("layers", {}).values()))
        yield (
            f"{name:{width}}{row['tokens_share']:7.0%}{row['loss']:8.3f}{row['kl']:8.4f}"
            f"{_number(row['kl_recalled'], 10, 4)}{_number(row['kl_rest'], 8, 4)}{row['top1']:8.1%}{row['needle']:8.1%}"
            f"{_number(shares['kl_of_paper'], 10)}{_number(shares['kl_recalled_of_paper'], 12)}"
            f"{_number(shares['needle_of_teacher'], 11)}  {kept}"
        )
    for goal in GOALS:
        row, other, sign = rows.get(goal.row), rows.get(goal.other), ">=" if goal.at_least else "<="
        share = share_of(row, other, goal.value)
        told = f"{goal.row} {goal.value} / {goal.other} {sign} {goal.bound}"
        if row is None or other is None:
            yield f"{told}: not measured"
        elif share is None:
            yield f"{told}: undecided, as {goal.other}'s {goal.value} is {other[goal.value] or 0:.0f}"
        else:
            reached = share >= goal.bound if goal.at_least else share <= goal.bound
            yield f"{told}: {share:.3f}, {'reached' if reached else 'missed'}"


def _place(name: str) -> tuple[int, str]:
    """Rows in ORDER, each with its changed forms and ablations behind it."""
    base = name.partition("/")[0].partition(":")[0]
    return (ORDER.index(base), name)


def _number(value: float | None, width: int, digits: int = 3) -> str:
    return "-".rjust(width) if value is None else f"{value:{width}.{digits}f}"
