"""One student of benchmarks/keep_the_teacher.py: trained, and measured whole and without its parts."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from conversion_runs import Budget, TimedConsole, stage_keys
from keep_measures import agreement, needle
from keep_plan import Plan, Row
from pretraining import autocast

from radlads.checkpoint.manifest import MANIFEST, read_manifest
from radlads.checkpoint.model_folder import load_model
from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.convert.hf_source import TeacherSource, load_tokenizer
from radlads.convert.kept_layers import kept_student
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.evaluation.baselines import limit_attention, without, without_kept_layers
from radlads.evaluation.perplexity import spread_windows
from radlads.files import read_json, write_text
from radlads.model.modeling import RadladsForCausalLM
from radlads.selection.probes import TextProbe
from radlads.selection.record import listed
from radlads.selection.search import search
from radlads.train.fit import run_stage

MIXER = Path(__file__).resolve().parents[1] / "configs" / "rad_rwkv7.yaml"
RESULT = "result.json"
STAGES = {"align": 1, "distill": 2}


class Found:
    """What has been found of a row, in its file, written anew whenever something is added."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = read_json(path) if path.is_file() else {}

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What the file has under this name; found now, and written, if it has nothing."""
        if name not in self.content:
            self.content[name] = find()
            write_text(self._path, json.dumps(self.content, indent=1) + "\n")
        return self.content[name]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all rows of one teacher share. corpora: for each kind of text, the stems of what is trained on and held out.

    overrides: configuration keys of all rows' stages. folder: where the rows' folders are. run: what a row's result
    tells of the command that found it.
    """

    plan: Plan
    folder: Path
    corpora: Mapping[str, tuple[Path, Path]]
    source: TeacherSource
    device: str
    overrides: Mapping[str, str]
    console: TimedConsole
    run: Mapping[str, Any]

    @cached_property
    def teacher(self) -> RadladsForCausalLM:
        """The teacher in fp32, on the device."""
        return build_teacher(self.source).to(self.device)  # type: ignore[arg-type]

    def row_folder(self, row: Row, seed: int) -> Path:
        """Where a row's student is."""
        name = "".join(letter if letter.isalnum() or letter in "_.=-" else "_" for letter in row.name)
        return self.folder / f"{name}-seed-{seed}"


def is_measured(work: Work, row: Row, seed: int) -> bool:
    """Whether nothing is left to do for a row."""
    return "seconds" in result_of(work, row, seed)


def result_of(work: Work, row: Row, seed: int) -> dict[str, Any]:
    """What has been found so far."""
    return Found(work.row_folder(row, seed) / RESULT).content


def run_row(work: Work, row: Row, seed: int) -> None:
    """Train a row's student, measure it, and leave all that in its folder; what is there is not made again."""
    began = time.monotonic()
    folder = work.row_folder(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = Found(folder / RESULT)
    found.once("run", lambda: dict(work.run))
    if not row.share:
        record(work, found, row.name, "model", untrained(work, row, seed))
    else:
        aligned = align(work, row, seed)
        layers = found.once("layers", lambda: kept_layers(work, row, aligned))
        model = distill(work, row, seed, aligned, layers)
        stages = [read_manifest(folder / stage) for stage in STAGES]
        found.once("tokens", lambda: sum(stage["tokens"] for stage in stages))
        found.once("training_s", lambda: sum(stage["seconds"] for stage in stages))
        record(work, found, row.name, "model", model)
        for name, ablated in ablations(row, model, aligned, layers):
            record(work, found, row.name, name, ablated())
    found.once("seconds", lambda: round(time.monotonic() - began, 1))


def untrained(work: Work, row: Row, seed: int) -> RadladsForCausalLM:
    """The model of a row without training."""
    if row.name.startswith("window_untrained"):
        return set_up(work, row, seed)
    if not row.window_tokens:
        return work.teacher
    model = build_teacher(work.source).to(work.device)  # type: ignore[arg-type]
    limit_attention(model, window_tokens=row.window_tokens, sink_tokens=row.sink_tokens)
    return model


def set_up(work: Work, row: Row, seed: int) -> RadladsForCausalLM:
    """A row's student before any training."""
    torch.manual_seed(seed)
    student, _ = build_student(work.source, stage_config(work, row, seed, "align", []).model)
    return student.to(work.device)  # type: ignore[arg-type]


def align(work: Work, row: Row, seed: int) -> RadladsForCausalLM:
    """A row's student after stage 1, all of its layers recurrent."""
    return trained(work, row, seed, "align", lambda: set_up(work, row, seed), [], f"setup of {work.source.folder.name}")


def distill(work: Work, row: Row, seed: int, aligned: RadladsForCausalLM, layers: list[int]) -> RadladsForCausalLM:
    """A row's student after stage 2, with the teacher's attention in these layers; `aligned` stays as it is."""
    return trained(work, row, seed, "distill", lambda: kept_student(aligned, work.teacher, layers), layers, "align")


def trained(
    work: Work,
    row: Row,
    seed: int,
    stage: str,
    begin: Callable[[], RadladsForCausalLM],
    layers: list[int],
    parent: str,
) -> RadladsForCausalLM:
    """The student of a finished stage; the stage is run, from `begin` or its last checkpoint, if it is not finished."""
    folder = work.row_folder(row, seed) / stage
    if not (folder / MANIFEST).is_file():
        config = stage_config(work, row, seed, stage, layers)
        run_stage(config, begin(), work.teacher, folder, work.console, parent=parent)
    return load_model(folder).to(work.device)  # type: ignore[arg-type]


def stage_config(work: Work, row: Row, seed: int, stage: str, layers: list[int]) -> Config:
    """A stage of a row. The text and its order depend on the seed alone: rows differ in how much of it they read."""
    plan, is_align = work.plan, stage == "align"
    full = plan.align_tokens if is_align else plan.distill_tokens
    tokens, lr = max(plan.batch_tokens, round(full * row.share)), row.align_lr if is_align else row.distill_lr
    mixer_lr = lr if is_align else row.mixer_lr
    weight = 1 / len(work.corpora)
    keys = stage_keys(
        Budget(tokens, lr, plan.context, plan.batch_tokens),
        seed=seed,
        data=",".join(f"{train}:{weight}" for train, _ in work.corpora.values()),
        folder=work.row_folder(row, seed),
        teacher=work.source.folder,
        device=work.device,
    )
    num_steps = tokens // plan.batch_tokens
    keys |= {
        "train.attention_distillation_stage": STAGES[stage],
        "train.lr_final": lr / 100,
        "train.lr2_init": mixer_lr,
        "train.lr2_final": mixer_lr / 100,
        "train.beta2": 0.95,
        "train.warmup_steps": max(1, round(num_steps * (0.025 if is_align else row.warmup))),
        "train.log_every_n_steps": 20,
        "train.checkpoint_every_minutes": 3,
        "model.softmax_layers": ",".join(map(str, layers)),
    }
    if row.window_tokens:
        keys |= {"model.mixer.window_tokens": row.window_tokens, "model.mixer.sink_tokens": row.sink_tokens}
    return load_config([MIXER], keys | dict(row.keys) | dict(work.overrides))


def kept_layers(work: Work, row: Row, aligned: RadladsForCausalLM) -> list[int]:
    """The layers that a row keeps as softmax: as named, or selected on text that is trained on, not measured on."""
    num_layers, plan = aligned.config.num_hidden_layers, work.plan
    if row.layers or not row.kept_of:
        return sorted(row.given_layers(num_layers))
    tokens = plan.select_tokens // len(work.corpora)
    stems = [train for train, _ in work.corpora.values()]
    windows = [each for stem in stems for each in spread_windows(BinIdxReader(stem), plan.context, tokens)]
    with autocast(work.device):
        selection = search(
            aligned.eval(),
            work.teacher,
            TextProbe(windows, "recalled" if row.by == "recalled" else "kl"),
            keep=row.num_kept(num_layers),
            candidates=range(num_layers),
            console=work.console,
        )
    work.console.line(f"{row.name}: layers {listed(selection.layers)} are kept")
    return list(selection.layers)


def ablations(
    row: Row, model: RadladsForCausalLM, aligned: RadladsForCausalLM, layers: list[int]
) -> Iterator[tuple[str, Callable[[], RadladsForCausalLM]]]:
    """The trained student without one of its parts, by name."""
    if row.window_tokens:
        yield "no_window", lambda: without(model, "window")
        yield "no_recurrence", lambda: without(model, "recurrence")
    if layers:
        yield "no_kept_layers", lambda: without_kept_layers(model, aligned)


def record(work: Work, found: Found, row: str, name: str, model: RadladsForCausalLM) -> None:
    """Measure a model and put that under `name`."""
    plan, began = work.plan, time.monotonic()

    def measure() -> dict[str, Any]:
        heldout = {kind: stem for kind, (_, stem) in work.corpora.items()}
        tokenizer = load_tokenizer(work.source.folder, model.config.vocab_size)
        text = BinIdxReader(next(iter(heldout.values())))
        with autocast(work.device):
            return agreement(
                model,
                work.teacher,
                heldout,
                edges=plan.edges,
                max_tokens=plan.measure_tokens,
                batch_windows=max(1, 8192 // plan.context),
            ) | needle(model, tokenizer, text, lengths=plan.needle_lengths, samples=plan.needle_samples)

    values = found.once(name, measure)
    title = row if name == "model" else f"{row}/{name}"
    recalled = "" if values["kl_recalled"] is None else f", recalled {values['kl_recalled']:.4f}"
    work.console.line(
        f"{title}: loss {values['loss']:.4f}, KL {values['kl']:.4f}{recalled}, top-1 {values['top1']:.1%}, "
        f"needle {values['needle']:.0%}, measured in {time.monotonic() - began:.0f} s"
    )
