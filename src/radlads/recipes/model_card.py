"""README.md of an exported model: what it is, how it was made, what was measured, whose licence it is under.

Every number comes from files in the run's folder or from the export itself; what is not there is 'not measured'.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from radlads.checkpoint.manifest import versions
from radlads.files import read_json
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.window import window_of
from radlads.report.run_folder import Measurements, Stage, by_name
from radlads.report.wording import (
    NOT_MEASURED,
    NOT_RECORDED,
    UNTRAINED_ROWS,
    heldout_title,
    mixer_title,
    number_text,
    score_text,
)

CARD = "README.md"
UNKNOWN_LICENCE = "unknown: ask"
_PAPER = "https://arxiv.org/abs/2505.03005"
_DESCRIPTION, _VERSIONS = "What it is", "Made with"
_CAST, _CAST_END = ", cast from ", " after the measurements"
_CONTEXTS_TOKENS = (1024, 8192, 65536)


@dataclass(frozen=True)
class Licence:
    """The teacher's licence, by the hub's identifier; name and link where that is `other`. None: it does not say."""

    identifier: str | None
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        if self.identifier is None:
            return f"{UNKNOWN_LICENCE} whoever published the teacher before you pass this model on"
        text = self.identifier if self.name is None else f"{self.identifier} ({self.name})"
        return text if self.link is None else f"{text}, {self.link}"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card is made of. name: of the repository or folder. teacher: its hub name or its folder's own.

    convert: llama.cpp's command where the folder is for its converter. difference: of the logits after reloading.
    cast_from: the types that the weights had before this one, the latest first. earlier: the run's own card, of an
    export.
    """

    name: str
    teacher: str | None
    base_model: str | None
    licence: Licence
    config: RadladsConfig
    num_parameters: int
    difference: float
    stages: Sequence[Stage]
    measured: Measurements
    convert: str | None
    cast_from: Sequence[str]
    earlier: "EarlierCard | None" = None


@dataclass(frozen=True)
class EarlierCard:
    """The card of an export that is exported again. sections: the lines under each heading."""

    base_model: str | None
    sections: Mapping[str, list[str]]

    @property
    def teacher(self) -> str | None:
        return self._described("teacher", unknown=NOT_RECORDED)

    @property
    def cast_from(self) -> list[str]:
        """The types that the weights had before their present one; when they were measured, the last of these."""
        return (self._described("weights") or "").removesuffix(_CAST_END).split(_CAST)[1:]

    def _described(self, row: str, *, unknown: str = "") -> str | None:
        """What the description's table has beside a name."""
        start = f"| {row} | "
        lines = [line for line in self.sections.get(_DESCRIPTION, ()) if line.startswith(start)]
        text = lines[0].removeprefix(start).removesuffix(" |").replace("\\|", "|") if lines else ""
        return text if text and text != unknown else None


def read_licence(folder: Path) -> Licence:
    """The licence that a model's README.md or config.json names; none if neither can be read as naming one."""
    values = _metadata_of(folder / CARD)
    if not values.get("license") and (folder / "config.json").is_file():
        values = read_json(folder / "config.json")
    texts = {key: values.get(key) for key in ("license", "license_name", "license_link")}
    identifier, name, link = (value if isinstance(value, str) and value else None for value in texts.values())
    return Licence(identifier if identifier != "unknown" else None, name, link)


def _metadata_of(card: Path) -> Mapping[str, Any]:
    """What stands between the dashes of a README.md; nothing if there is none, or it is no YAML."""
    try:
        return (metadata_load(card) if card.is_file() else None) or {}
    except (yaml.YAMLError, ValueError):
        return {}


def read_card(path: Path) -> EarlierCard | None:
    """A card that model_card wrote, whoever has edited it since; None for any other file."""
    metadata = _metadata_of(path)
    if "radlads" not in (metadata.get("tags") or ()):
        return None
    base_model, sections = metadata.get("base_model"), dict[str, list[str]]()
    for part in path.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, *lines = part.split("\n")
        sections[title.strip()] = "\n".join(lines).strip("\n").split("\n")
    return EarlierCard(base_model if isinstance(base_model, str) else None, sections)


def model_card(facts: CardFacts) -> str:
    """The card's text: metadata for the hub, then Markdown."""
    measured = {
        "Held-out text": _heldout(facts),
        "Tasks": _tasks(facts.measured.evaluation),
        "Long context": _long_context(facts.measured.long_context),
        "Speed": _speed(facts.measured.summary),
    }
    versions_made_with = [", ".join(f"{name} {version}" for name, version in _versions(facts).items())]
    if facts.earlier is not None:  # what was measured of the model was measured before it was exported
        known = facts.earlier.sections
        measured |= {title: known[title] for title in measured.keys() & known if measured[title] == [NOT_MEASURED]}
        versions_made_with = known.get(_VERSIONS, versions_made_with)
    sections = {
        "Use": _use(facts),
        _DESCRIPTION: _description(facts),
        **measured,
        "Licence": [f"The teacher's: {facts.licence}."],
        _VERSIONS: versions_made_with,
    }
    lines = ["---", _metadata(facts).to_yaml(), "---", "", f"# {facts.name}", "", _summary(facts)]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def _metadata(facts: CardFacts) -> ModelCardData:
    licence = facts.licence
    return ModelCardData(
        license=licence.identifier or "unknown",
        license_name=licence.name,
        license_link=licence.link,
        base_model=facts.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["radlads", "linear-attention", "rwkv", *([] if facts.convert else ["custom_code"])],
    )


def _summary(facts: CardFacts) -> str:
    teacher = facts.teacher or "a softmax decoder"
    memory = "constant time and memory per token"
    if "full_attention" in facts.config.layer_types:
        memory = "constant time and memory per token in its recurrent layers"
    return f"Made from {teacher} by the RADLADS recipe ({_PAPER}): a decoder that needs {memory}."


def _versions(facts: CardFacts) -> Mapping[str, str]:
    """Those of the last stage; without one, of this export."""
    return (facts.stages and facts.stages[-1].manifest.get("versions")) or versions()


def _use(facts: CardFacts) -> list[str]:
    if facts.convert is not None:
        return ["For llama.cpp, whose converter reads this folder:", "", "```", facts.convert, "```"]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{facts.name}", trust_remote_code=True)',
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}", trust_remote_code=True)',
        'tokens = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=50)',
        "print(tokenizer.decode(tokens[0]))",
        "```",
    ]


def _description(facts: CardFacts) -> list[str]:
    config = facts.config
    mixers = Counter(config.time_mixers).items()
    sizes = ", ".join(f"{state_bytes(config, tokens) / 1e6:,.1f}" for tokens in _CONTEXTS_TOKENS)
    dtype = str(config.dtype).removeprefix("torch.")
    rows = [
        ["teacher", facts.teacher or NOT_RECORDED],
        ["layers", ", ".join(f"{count} x {mixer_title(name)}" for name, count in mixers)],
        *_window_rows(config),
        ["parameters", f"{facts.num_parameters:,}"],
        ["hidden size", str(config.hidden_size)],
        ["vocabulary", f"{config.vocab_size:,}"],
        [
            "weights",
            _CAST.join([dtype, *facts.cast_from]) + (_CAST_END if facts.cast_from else ""),
        ],
        ["state of a sequence after 1k, 8k, 64k tokens", f"{sizes} MB"],
        ["logits after reloading, largest difference", f"{facts.difference:.1e}"],
    ]
    told = "What such a student recalls and holds, and which others there are: docs/which_student.md of radlads."
    return [*_table(["", ""], rows), "", told]


def _window_rows(config: RadladsConfig) -> list[list[str]]:
    """A row for the softmax windows beside recurrences, if there are any."""
    windows = {window_of(config, layer) for layer in config.recurrent_layers} - {None}
    sizes = ", ".join(f"{each.window_tokens} + {each.sink_tokens} tokens" for each in windows if each)
    return [["softmax window beside each recurrence", sizes]] if sizes else []


def _heldout(facts: CardFacts) -> list[str]:
    """Loss, KL and top-1 of the teacher, of the setup and after each stage; a stage's own figures without a summary."""
    summary = facts.measured.summary or {}
    found = {heldout_title(name, summary[name]): summary[name] for name in UNTRAINED_ROWS if name in summary}
    for name, stage in by_name(facts.stages).items():
        measured = summary.get(stage.name) or stage.manifest.get("heldout") or {}
        costs = {key: stage.manifest.get(key) for key in ("tokens", "seconds")}
        found[name] = {**costs, **measured}
    found |= {"retied": summary["retied"]} if "retied" in summary else {}
    if not found:
        return [NOT_MEASURED]
    formats = {"loss": ".4f", "kl": ".4f", "top1": ".1%", "tokens": ",", "seconds": ",.0f"}
    rows = [[name, *(_number(values, key, form) for key, form in formats.items())] for name, values in found.items()]
    heads = ["", "loss, nats per token", "KL from the teacher", "same likeliest token", "trained on tokens", "seconds"]
    return _table(heads, rows)


def _number(values: Mapping[str, Any], key: str, form: str) -> str:
    is_untrained = key in ("tokens", "seconds") and key not in values  # a stage has the key, if only with None
    return "none" if is_untrained else number_text(values.get(key), form)


def _tasks(evaluation: Mapping[str, Any] | None) -> list[str]:
    """lm-eval's scores, a column for each model."""
    scores = (evaluation or {}).get("scores") or []
    if not scores:
        return [NOT_MEASURED]
    models = list(dict.fromkeys(score["model"] for score in scores))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        cells.setdefault((score["task"], score["metric"]), {})[score["model"]] = _score(score)
    rows = [
        [task, metric, *(found.get(model, NOT_MEASURED) for model in models)] for (task, metric), found in cells.items()
    ]
    note = "lm-eval's score ± its standard error; in brackets the share of the teacher's score above chance."
    return [note, "", *_table(["task", "metric", *models], rows)]


def _score(score: Mapping[str, Any]) -> str:
    return score_text(score["value"], score["stderr"], score.get("relative"), is_share=score["chance"] is not None)


def _long_context(measured: Mapping[str, Any] | None) -> list[str]:
    """Right answers by length, over all depths, of what radlads longcontext measured."""
    rows = []
    for model, parts in ((measured or {}).get("models") or {}).items():
        for task in ("passkey", "needle"):
            for length in sorted({cell["length_tokens"] for cell in parts.get(task) or ()}):
                cells = [cell for cell in parts[task] if cell["length_tokens"] == length]
                right, asked = (sum(cell[key] for cell in cells) for key in ("num_right", "num_samples"))
                rows.append([model, task, f"{length:,}", f"{right / asked:.1%} of {asked:,}"])
    return _table(["model", "task", "tokens", "right"], rows) if rows else [NOT_MEASURED]


def _speed(summary: Mapping[str, Any] | None) -> list[str]:
    """ms per token while decoding, on the machine that converted the model."""
    measured = (summary or {}).get("decode_ms")
    if not measured:
        return [NOT_MEASURED]
    positions = list(measured["student"])
    rows = [[name, *(f"{each[position]:.2f}" for position in positions)] for name, each in measured.items()]
    heads = ["", *(f"ms per token at position {position}" for position in positions)]
    return ["On the machine that converted the model:", "", *_table(heads, rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]
