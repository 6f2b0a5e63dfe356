"""layers.json: what a search found and on what, and its lines for people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from radlads.checkpoint.manifest import versions
from radlads.files import read_json
from radlads.model.modeling import RadladsForCausalLM
from radlads.report.selection import TITLES
from radlads.selection.probes import Values, rank
from radlads.selection.search import Measured, Selection, listed
from radlads.train.checkpoints.resume import fingerprint


def record_of(selection: Selection, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What layers.json holds. facts: on what text, which models, where."""
    return {
        "layers": list(selection.layers),
        "keep": len(selection.layers),
        "order": selection.order,
        "by": selection.by,
        "curve": [_row(each) for each in selection.curve],
        "uniform": [_row(each) for each in selection.uniform],
        "rounds": [
            {
                "kept": list(each.kept),
                "chosen": each.chosen,
                "values": {str(layer): dict(values) for layer, values in each.values.items()},
            }
            for each in selection.rounds
        ],
        **facts,
        "seconds": round(selection.seconds, 2),
        "block_runs": selection.block_runs,
        "versions": versions(),
    }


def model_facts(student: RadladsForCausalLM, teacher: RadladsForCausalLM) -> dict[str, Any]:
    """Of layers.json: which models these are, by values from all over their parameters in bf16, and where they ran."""
    device = student.device
    return {
        "student": fingerprint(student, torch.bfloat16),
        "teacher": fingerprint(teacher, torch.bfloat16),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(student.dtype).removeprefix("torch."),
    }


def _row(measured: Measured) -> dict[str, Any]:
    return {"layers": list(measured.layers), **measured.values}


def text_of(record: Mapping[str, Any]) -> str:
    """The file's text."""
    return json.dumps(record, indent=1) + "\n"


def read_layers(path: Path, expected: Mapping[str, Any]) -> list[int] | None:
    """The layers of a file whose entries are as expected; None if there is none, or one is another.

    Raises ValueError for a damaged file.
    """
    if not path.is_file():
        return None
    record = read_json(path)
    if any(record.get(key) != value for key, value in expected.items()):
        return None
    layers = record.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{path} is damaged: remove it to have the layers selected again")
    return layers


def table_lines(selection: Selection) -> Iterator[str]:
    """The first round's candidates, best first, then the curve beside uniform spacing."""
    first = selection.rounds[0]
    names = list(selection.none)
    yield "".join(["rank  layer", *(f"{TITLES[name]:>{_WIDTH}}" for name in names)])
    ranked = sorted(first.values.items(), key=lambda pair: rank(pair[1], selection.by))
    for place, (layer, values) in enumerate(ranked, start=1):
        yield f"{place:4}  {layer:5}" + _cells(values, names)
    yield ""
    yield "".join(["kept ", *(f"{TITLES[name]:>{_WIDTH}}" for name in names), "  layers"])
    for measured in selection.curve:
        yield f"{len(measured.layers):4} " + _cells(measured.values, names) + f"  {listed(measured.layers) or 'none'}"
    for measured in selection.uniform:
        layers = f"{listed(measured.layers)} (uniform spacing)"
        yield f"{len(measured.layers):4} " + _cells(measured.values, names) + f"  {layers}"


_WIDTH = 22


def _cells(values: Values, names: Sequence[str]) -> str:
    return "".join(f"{values[name]:{_WIDTH}.4f}" for name in names)
