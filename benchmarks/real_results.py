"""What benchmarks/real_conversion.py makes of its measurements: results.json, tables, replies, a report's summary."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import real_measures

from radlads.files import read_json, write_text


class Results:
    """results.json: what has been measured so far, and by which plan."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        self.content: dict[str, Any] = read_json(path) if path.is_file() else {**facts, "rows": {}, "seeds": {}}
        if self.content["plan"] != facts["plan"]:
            raise ValueError(f"{path} holds a run of another plan: remove its folder, or choose another --out")

    def once(self, *keys: str, measure: Callable[[], object]) -> None:
        """Put what `measure` gives at a path of keys, unless there is something."""
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        if keys[-1] not in place:
            place[keys[-1]] = measure()
            write_text(self._path, json.dumps(self.content, indent=1) + "\n")


def table(content: dict[str, Any]) -> Iterator[str]:
    """The rows' headline figures, KL by position, recall and RULER."""
    bins = [f"{each['first']}-{each['end']}" for each in content["rows"]["teacher"]["english"]["by_position"]]
    for kind in real_measures.KINDS:
        yield f"\n{kind:18}{'loss':>8}{'KL':>8}{'top-1':>8}" + "".join(f"KL {name}".rjust(14) for name in bins)
        second = {f"extend, seed {seed}": row for seed, row in content["seeds"].items()}
        for name, row in (content["rows"] | second).items():
            values = row[kind]
            yield f"{name:18}{values['loss']:8.3f}{values['kl']:8.3f}{values['top1']:8.1%}" + "".join(
                f"{each['kl']:14.3f}" for each in values["by_position"]
            )
    lengths = list(next(iter(content["rows"]["teacher"]["ruler"].values())))
    yield (
        f"\n{'':18}{'passkey':>9}{'needle':>9}"
        + "".join(f"RULER {length}".rjust(12) for length in lengths)
        + (f"{'ms a token':>12}{'state MB':>10}")
    )
    for name, row in content["rows"].items():
        ruler = [statistics.mean(task[length] for task in row["ruler"].values()) for length in lengths]
        grids = "".join(f"{share(row['recall'][task]):9.0%}" for task in ("passkey", "needle"))
        last = row["costs"][-1]
        yield (
            f"{name:18}{grids}"
            + "".join(f"{score:12.0%}" for score in ruler)
            + (f"{last['decode_ms']:12.2f}{last['state_bytes'] / 1e6:10.2f}")
        )


def conversations(content: dict[str, Any]) -> Iterator[str]:
    """Each prompt with the teacher's reply and the finished student's."""
    rows = content["rows"]
    for number, prompt in enumerate(real_measures.PROMPTS):
        yield f"\n> {prompt}"
        for name in ("teacher", "extend"):
            yield f"[{name}] {rows[name]['replies'][number]}"


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json of the first conversion's folder holds, for `radlads report`."""
    means = {
        name: {key: statistics.mean(row[kind][key] for kind in real_measures.KINDS) for key in ("loss", "kl", "top1")}
        for name, row in rows.items()
        if name != "window_untrained"
    }
    names = {"student": "extend", "teacher": "teacher"}
    costs = {name: rows[row]["costs"] for name, row in names.items()}
    return means | {
        "decode_ms": {name: {str(c["context_tokens"]): c["decode_ms"] for c in each} for name, each in costs.items()},
        "bytes": {name: {str(c["context_tokens"]): c["state_bytes"] for c in each} for name, each in costs.items()},
        "sample": {"prompt": real_measures.PROMPTS[0]} | {n: rows[row]["replies"][0] for n, row in names.items()},
    }


def share(cells: Sequence[Mapping[str, Any]]) -> float:
    """The share of prompts in a grid's cells that are answered right."""
    return sum(cell["num_right"] for cell in cells) / sum(cell["num_samples"] for cell in cells)
