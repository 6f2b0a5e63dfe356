"""A whole conversion in one folder: setup, align, distill, extend, measurements, export and report."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from radlads.checkpoint.atomic import locked, partial_name
from radlads.checkpoint.hf_export import check_exportable, export, remove_export
from radlads.checkpoint.manifest import MANIFEST, joint_hash, read_manifest, versions, weights_hash
from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.named_models import NAMED_MODELS, is_fetched
from radlads.checkpoint.tokenizer_files import check_copyable, locate_tokenizer, read_tokenizer
from radlads.checksums import sha256
from radlads.config.compare import Decisive, deciding, differences
from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.console import Console
from radlads.convert.hf_source import TeacherSource, end_of_text_id, load_tokenizer, open_teacher
from radlads.convert.student import build_student, build_teacher, retie
from radlads.data.binidx import BinIdxReader, corpus_files
from radlads.data.build import build_binidx
from radlads.data.loader import HeldoutWindows
from radlads.data.python_text import Split, iter_documents
from radlads.distill.heldout import Heldout, measure
from radlads.files import read_json, write_text
from radlads.inference.generate import Sampling, decode_ms, stream_text
from radlads.model.configuration import state_bytes
from radlads.model.modeling import RadladsForCausalLM
from radlads.recipes.demo_recipes import DemoRecipe, recipe_file, recipe_for
from radlads.recipes.reload_check import reload_max_abs_diff
from radlads.recipes.report import write_report
from radlads.recipes.teacher_record import check_teacher, record_teacher, teacher_changes, teacher_checksums
from radlads.report.page import write_page
from radlads.train.fit import recipe_hash, run_stage
from radlads.train.hardware import check_hardware, only_device
from radlads.train.processes import ALONE, check_processes

Variant = Literal["balanced", "group_norm"]

STAGES = ("align", "distill", "extend")
SUMMARY, MARKER = "summary.json", "conversion.json"
RELOAD_TOLERANCE = 1e-4
HELDOUT_CONTEXT = 512
MEMORY_CONTEXTS = (1024, 8192, 65536)
PROMPT = "def main(argv=None):"
_SPLITS: tuple[Split, Split] = ("train", "heldout")
BUNDLED_TEACHER = Path(str(files("radlads") / "assets" / "teacher"))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert into what, and where.

    data, heldout_data: .bin/.idx pairs without the extension; None = the text of the running Python, tokenised into
    `out/data`. overrides: dotted configuration keys for all stages. retie: end with the embedding as the head again, as
    a tied teacher has it.
    """

    teacher: str | Path = BUNDLED_TEACHER
    mixer: str = "rad_rwkv7"
    variant: Variant = "balanced"
    out: Path = Path("out/demo")
    data: Path | None = None
    heldout_data: Path | None = None
    overrides: Mapping[str, object] | None = None
    retie: bool = False

    def __post_init__(self) -> None:
        if (self.data is None) != (self.heldout_data is None):
            raise ValueError("--data and --heldout-data go together: name both .bin/.idx pairs, or neither")

    def corpus(self, split: Split) -> Path:
        """Stem of the split's .bin/.idx pair."""
        given = self.data if split == "train" else self.heldout_data
        return given or self.out / "data" / split


def run_conversion(conversion: Conversion, console: Console) -> dict[str, Any]:
    """Convert, measure, export to `out/hf`, write summary.json, report.png and report.html, and return the summary.

    Goes on where an earlier run of the same conversion stopped: a finished stage is kept, an unfinished one begins at
    its newest checkpoint. Raises ValueError if `out` holds another conversion or another process works in it, and for a
    teacher or data that do not fit.
    """
    if (name := str(conversion.teacher)) in NAMED_MODELS and not is_fetched(name):
        model = NAMED_MODELS[name]
        console.line(f"fetching {model.title} ({model.num_bytes / 1e6:.0f} MB, {model.licence}), once")
    described = locate_tokenizer(conversion.teacher)
    read_tokenizer(described)  # before any weights are fetched
    check_copyable(described)
    source = open_teacher(conversion.teacher)
    for note in source.notes:
        console.line(note)
    if conversion.retie and not source.config.tie_word_embeddings:
        raise ValueError(f"{source.folder} has a head of its own, not its embedding: convert it without --retie")
    tokenizer = load_tokenizer(source.folder, source.config.vocab_size)
    configs = stage_configs(conversion)
    if not (conversion.out / SUMMARY).is_file():
        for config in configs.values():
            check_processes(config.train, ALONE)
            check_hardware(config.train)
    teacher_files = teacher_checksums(source.folder)
    claim_folder(conversion.out, _identity(conversion, teacher_files["sha256"], configs), _settings(configs), console)
    with only_process_in(conversion.out):
        if (conversion.out / SUMMARY).is_file():
            console.line(f"{conversion.out} holds this conversion already; remove the folder to run it again")
            return read_json(conversion.out / SUMMARY)
        record_teacher(conversion.out, teacher_files)
        return _convert(conversion, source, tokenizer, configs, console)


def _convert(
    conversion: Conversion, source: TeacherSource, tokenizer: Tokenizer, configs: dict[str, Config], console: Console
) -> dict[str, Any]:
    began, out = time.monotonic(), conversion.out
    if conversion.data is None:
        build_corpus(source, tokenizer, out, console)
    torch.manual_seed(configs["align"].train.seed_everything)
    device, recipe = only_device(configs["align"].train), _recipe(conversion, configs)
    teacher = build_teacher(source)
    student, rows = build_student(source, configs["align"].model)
    check_exportable(student.config)  # now, not after hours of training
    for model in (teacher, student):
        model.to(device)  # type: ignore[arg-type]
    console.line("setup   " + ", ".join(f"{count} weights {_PAST[action]}" for action, count in sorted(rows.items())))
    heldout_reader = BinIdxReader(conversion.corpus("heldout"))
    heldout = heldout_batches(heldout_reader, recipe.heldout_tokens)
    console.progress("measuring teacher and setup ...")
    summary: dict[str, Any] = {
        "teacher": _measured(measure(teacher, teacher, heldout)),
        "setup": _measured(measure(student, teacher, heldout)),
    }
    parent, kept = f"setup of {source.folder.name}", False
    for number, stage in enumerate(STAGES, start=1):
        folder = out / f"{number}-{stage}"
        student, was_kept = _run_or_reuse(configs[stage], student, teacher, folder, parent, console)
        kept |= was_kept
        manifest = read_manifest(folder)
        parent = f"{folder.name} sha256:{weights_hash(folder)[:16]}"
        facts = {"tokens": manifest["tokens"], "seconds": round(manifest["seconds"], 2)}
        summary[stage] = _measured(measure(student, teacher, heldout)) | facts
        console.line(f"{stage:8}held-out loss {summary[stage]['loss']:.4f}, KL {summary[stage]['kl']:.4f}")
    setup, end = summary["setup"]["loss"], summary["extend"]["loss"]
    summary["gap_closed"] = (setup - end) / (setup - summary["teacher"]["loss"])
    console.progress("measuring decoding and the export ...")
    check_teacher(out)
    remove_export(out / "hf")  # it may be older than the last stage
    if conversion.retie:
        retie(student, source)
        summary["retied"] = _measured(measure(student, teacher, heldout))
    prompt_ids = torch.from_numpy(heldout_reader.tokens[: max(recipe.decode_positions)].astype("int64"))
    summary |= _measure_use(student, teacher, source, tokenizer, prompt_ids, recipe)
    student.cpu()  # as the process that reloads the export runs it
    export(student, source.folder, out / "hf")
    summary["reload_max_abs_diff"] = reload_max_abs_diff(student, (out / "hf").resolve(), prompt_ids[:64].tolist())
    if summary["reload_max_abs_diff"] > RELOAD_TOLERANCE:
        raise ValueError(f"{out / 'hf'} gives other logits than the student: please report this")
    summary["seconds"] = round(time.monotonic() - began, 1)
    summary["resumed"] = kept
    summary["peak_rss_gb"] = round(_peak_rss_gb(), 3)
    summary["versions"] = versions()
    write_report({stage: out / f"{n}-{stage}" for n, stage in enumerate(STAGES, start=1)}, summary, out / "report.png")
    write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    write_page(out)
    return summary


def stage_configs(conversion: Conversion) -> dict[str, Config]:
    """The three stages' configurations: the mixer's file, the variant's, the stage's, then the overrides.

    Raises ValueError for an unknown mixer, or a variant the mixer does not have.
    """
    known = ("rad_rwkv6", "rad_rwkv7")
    if conversion.mixer not in known:
        raise ValueError(f"--mixer must be one of {', '.join(known)}, not {conversion.mixer!r}")
    if conversion.variant != "balanced" and conversion.mixer != "rad_rwkv7":
        raise ValueError("--variant group_norm belongs to --mixer rad_rwkv7")
    overrides = dict(conversion.overrides or {})
    if owned := sorted(overrides.keys() & _OWNED_KEYS):
        raise ValueError(f"--set {owned[0]} is not possible: the conversion sets it itself")
    names = [conversion.mixer, *(["group_norm"] if conversion.variant == "group_norm" else [])]
    data = {"train.data_file": str(conversion.corpus("train"))}
    data |= {"train.validation_data_file": str(conversion.corpus("heldout"))}
    data |= {"train.teacher.hf_path": str(conversion.teacher), "train.proj_dir": str(conversion.out)}
    recipe = recipe_for(conversion.teacher, _device_type(overrides))
    return {
        stage: load_config(
            [*map(recipe_file, names), *recipe.stage_files(stage)],
            {**data, **_STAGE_KEYS.get(stage, {}), **overrides},
        )
        for stage in STAGES
    }


def _device_type(overrides: Mapping[str, object]) -> str:
    """`cuda` or `cpu`: where stages run, by train.accelerator or by what is there."""
    return only_device(load_config([recipe_file("align")], dict(overrides)).train).type


def _recipe(conversion: Conversion, configs: Mapping[str, Config]) -> DemoRecipe:
    return recipe_for(conversion.teacher, only_device(configs["align"].train).type)


# Stage 3 has the teacher for its held-out KL alone; its loss is the labels'.
_STAGE_KEYS: dict[str, dict[str, object]] = {"extend": {"train.teacher.kl_weight": 0.0, "train.teacher.ce_weight": 1.0}}
_OWNED_KEYS = {
    "train.data_file",
    "train.validation_data_file",
    "train.attention_distillation_stage",
    "train.load_model",
    "train.teacher.path",
    "train.teacher.hf_path",
    "train.teacher.model.hf_path",
    "model.tmix",
}
_PAST = {"copy": "copied", "transform": "transformed", "fresh": "fresh", "drop": "dropped"}


def claim_folder(out: Path, identity: dict[str, str], settings: dict[str, Any], console: Console) -> None:
    """Mark `out` as this conversion's, or go on in it. Raises ValueError if it is another's, saying what differs; of
    the settings too, if its marker has them."""
    marker = out / MARKER
    if marker.is_file():
        held = read_json(marker)
        if different := [key for key in identity if held.get(key) != identity[key]]:
            changes = differences(held["settings"], settings) if "settings" in held else []
            changes += teacher_changes(out) if "teacher" in different else []
            raise ValueError(
                f"{out} holds another conversion (different: {', '.join(different)}): "
                f"{'; '.join([*changes, 'remove it'])}, or choose another --out"
            )
        if not (out / SUMMARY).is_file():
            console.line(f"going on with the unfinished conversion in {out}")
        return
    if out.exists() and any(not path.name.startswith(f".{MARKER}") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no conversion: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps({**identity, "settings": settings}, indent=2) + "\n")


@contextmanager
def only_process_in(out: Path) -> Iterator[None]:
    """Hold a lock on `out`. Raises ValueError while another process holds it."""
    lock = out / ".lock"
    lock.touch()
    with locked(lock, f"another process is converting into {out}: wait for it, or choose another --out"):
        yield


def build_corpus(source: TeacherSource, tokenizer: Tokenizer, out: Path, console: Console) -> None:
    """Write out/data/{train,heldout}.{bin,idx} from the running Python's sources, unless they are there."""
    eos = end_of_text_id(source.folder, tokenizer)
    for split in _SPLITS:
        stem = out / "data" / split
        if stem.with_suffix(".idx").is_file():
            continue
        console.progress(f"reading the {split} text of this Python ...")
        texts = (text for _, text in iter_documents(split))
        built = build_binidx(texts, tokenizer, stem, vocab_size=source.config.vocab_size, eos_token_id=eos)
        console.line(
            f"data    {split}: {built.num_tokens:,} tokens of {built.num_documents:,} standard-library files "
            f"({built.num_bytes / 1e6:.1f} MB)"
        )


def heldout_batches(reader: BinIdxReader, num_tokens: int) -> DataLoader:
    """The held-out windows that every row of the summary is measured on."""
    windows = HeldoutWindows(reader, HELDOUT_CONTEXT, num_tokens)
    return DataLoader(windows, batch_size=8)


def _run_or_reuse(
    config: Config,
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    folder: Path,
    parent: str,
    console: Console,
) -> tuple[RadladsForCausalLM, bool]:
    """The student after a stage, and whether the stage was finished, or begun and gone on with, by an earlier run."""
    recipe = recipe_hash(deciding(config), parent)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if manifest["recipe"] != recipe:
            raise ValueError(
                f"{folder} was made by another recipe or from another parent: remove it to run the stage again"
            )
        console.line(f"{folder.name}: finished earlier, kept")
        return load_model(folder).to(teacher.device), True  # type: ignore[arg-type]
    torch.manual_seed(config.train.seed_everything)
    own = with_own_checkpoint(config, folder)
    result = run_stage(own, student, teacher, folder, console, parent=parent, recipe=recipe)
    return student, result.resumed


def with_own_checkpoint(config: Config, folder: Path) -> Config:
    """The configuration, less a train.resume that names a checkpoint of another stage."""
    named = config.train.resume
    if named in ("auto", "never") or Path(named).resolve().is_relative_to(partial_name(folder).resolve()):
        return config
    if not Path(named).is_dir():
        raise ValueError(f"train.resume {named} is not a checkpoint's folder: name one, or auto, or never")
    return replace(config, train=replace(config.train, resume="auto"))


def _measure_use(
    student: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    source: TeacherSource,
    tokenizer: Tokenizer,
    prompt: torch.Tensor,
    recipe: DemoRecipe,
) -> dict[str, Any]:
    """Decode times, state sizes (in bf16, as one would serve them) and one continuation, for both models."""
    models = {"student": student, "teacher": teacher}
    stop = frozenset({end_of_text_id(source.folder, tokenizer)})
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=80, seed=1)
    return {
        "decode_ms": {
            name: {
                str(position): decode_ms(model, prompt[None, :position].to(model.device))
                for position in recipe.decode_positions
            }
            for name, model in models.items()
        },
        "bytes": {
            name: {str(tokens): state_bytes(model.config, tokens) for tokens in MEMORY_CONTEXTS}
            for name, model in models.items()
        },
        "sample": {"prompt": PROMPT}
        | {name: "".join(stream_text(model, tokenizer, PROMPT, sampling, stop)) for name, model in models.items()},
    }


def _identity(conversion: Conversion, teacher: Mapping[str, str], configs: dict[str, Config]) -> dict[str, str]:
    """What a folder's conversion is told apart by: each entry names one thing that decides the result. `teacher`:
    its files' hashes."""
    data = f"Python {versions()['python']}"
    if conversion.data is not None:
        stems = (BinIdxReader(conversion.corpus(split)).path_stem for split in _SPLITS)
        data = recipe_hash(*(sha256(path) for stem in stems for path in reversed(corpus_files(stem))))
    return {
        "radlads": versions().get("radlads", ""),
        "teacher": recipe_hash(joint_hash(teacher), *(teacher[name] for name in ("config.json", "tokenizer.json"))),
        "data": data,
        "mixer": recipe_hash(Decisive(configs["align"].model)),
        "stages": recipe_hash(*(deciding(config) for config in configs.values())),
        "retie": str(conversion.retie),
    }


def _settings(configs: dict[str, Config]) -> dict[str, Any]:
    """What the configurations decide: each key's value, by stage where the stages' differ."""
    by_stage = {stage: deciding(config) for stage, config in configs.items()}
    keys = dict.fromkeys(key for held in by_stage.values() for key in held)
    values = {key: {stage: held.get(key) for stage, held in by_stage.items()} for key in keys}
    return {key: held if len(set(held.values())) > 1 else held["align"] for key, held in values.items()}


def _measured(heldout: Heldout) -> dict[str, float]:
    assert heldout.kl is not None
    assert heldout.top1 is not None
    return {"loss": heldout.loss, "kl": heldout.kl, "top1": heldout.top1}


def _peak_rss_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 1e9
