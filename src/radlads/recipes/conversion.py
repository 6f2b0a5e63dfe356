"""A whole conversion in one folder: setup, its stages, measurements, export and report."""

import json
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from radlads.checkpoint.atomic import partial_name
from radlads.checkpoint.hf_export import check_exportable, export, remove_export
from radlads.checkpoint.manifest import MANIFEST, read_manifest, versions, weights_hash
from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.named_models import NAMED_MODELS, is_fetched
from radlads.checkpoint.tokenizer_files import check_copyable, locate_tokenizer, read_tokenizer
from radlads.config.compare import deciding
from radlads.config.schema import Config
from radlads.console import Console
from radlads.convert.hf_source import TeacherSource, end_of_text_id, load_tokenizer, open_teacher
from radlads.convert.student import build_student, build_teacher, retie, student_config
from radlads.data.binidx import BinIdxReader
from radlads.data.build import build_binidx
from radlads.data.loader import HeldoutWindows
from radlads.data.python_text import iter_documents
from radlads.distill.heldout import Heldout, measure
from radlads.evaluation.baselines import WINDOW, narrowed, without
from radlads.files import read_json, write_text
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.generate import Sampling, decode_ms, stream_text
from radlads.inference.writing.command import Teacher, write_corpus
from radlads.inference.writing.prompts import read_beginnings
from radlads.model.configuration import RadladsConfig, state_bytes
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.recurrent_mixer import RecurrentMixer
from radlads.recipes.auto_layers import select_in_conversion
from radlads.recipes.conversion_folder import (
    SPLITS,
    SUMMARY,
    claim_folder,
    decisive_settings,
    identity_of,
    only_process_in,
)
from radlads.recipes.demo_recipes import DemoRecipe
from radlads.recipes.reload_check import reload_max_abs_diff
from radlads.recipes.report import write_report
from radlads.recipes.stage_configs import INSTRUCT, Conversion, check_aligns, recipe_of, stage_configs
from radlads.recipes.teacher_record import check_teacher, record_teacher, teacher_checksums
from radlads.report.page import write_page
from radlads.train.checkpoints.resume import check_named
from radlads.train.fit import recipe_hash, run_stage
from radlads.train.hardware import check_hardware, only_device
from radlads.train.processes.group import ALONE, check_processes

RELOAD_TOLERANCE = 1e-4
HELDOUT_CONTEXT = 512
MEMORY_CONTEXTS = (1024, 8192, 65536)
PROMPT = "def main(argv=None):"


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
    check_aligns(source.config, configs["align"].model)
    if conversion.instruct:
        ChatTemplate(source.folder, source.config.vocab_size)
    _check_measurable(student_config(source.config, configs["align"].model))
    if not (conversion.out / SUMMARY).is_file():
        for config in configs.values():
            check_processes(config.train, ALONE)
            check_hardware(config.train)
    teacher_files = teacher_checksums(source.folder)
    claim_folder(
        conversion.out, identity_of(conversion, teacher_files["sha256"], configs), decisive_settings(configs), console
    )
    with only_process_in(conversion.out):
        if (conversion.out / SUMMARY).is_file():
            console.line(f"{conversion.out} holds this conversion already; remove the folder to run it again")
            return read_json(conversion.out / SUMMARY)
        record_teacher(conversion.out, teacher_files)
        return _convert(conversion, source, tokenizer, configs, console)


def _check_measurable(student: RadladsConfig) -> None:
    """Raise ValueError now, not after hours of training, if the end of a conversion would refuse the mixers."""
    check_exportable(student)
    state_bytes(student, context_tokens=1)


def _convert(
    conversion: Conversion, source: TeacherSource, tokenizer: Tokenizer, configs: dict[str, Config], console: Console
) -> dict[str, Any]:
    began, out = time.monotonic(), conversion.out
    if conversion.data is None:
        build_corpus(source, tokenizer, out, console)
    torch.manual_seed(configs["align"].train.seed_everything)
    device, recipe = only_device(configs["align"].train), recipe_of(conversion, configs)
    teacher = build_teacher(source)
    student, rows = build_student(source, configs["align"].model)
    for model in (teacher, student):
        model.to(device)  # type: ignore[arg-type]
    console.line("setup   " + ", ".join(f"{count} weights {_PAST[action]}" for action, count in sorted(rows.items())))
    heldout_reader = BinIdxReader(conversion.corpus("heldout"))
    heldout = heldout_batches(heldout_reader, recipe.heldout_tokens)
    console.progress("measuring teacher and setup ...")
    summary = _measure_untrained(student, teacher, heldout)
    parent, kept = f"setup of {source.folder.name}", False
    for number, stage in enumerate(conversion.stages, start=1):
        folder = out / f"{number}-{stage}"
        if stage == INSTRUCT:
            write_conversations(conversion, source, teacher, recipe, console)
        if stage == "distill":
            configs, student = select_in_conversion(configs, student, teacher, out, console)
        student, was_kept = _run_or_reuse(configs[stage], student, teacher, folder, parent, console)
        kept |= was_kept
        manifest = read_manifest(folder)
        parent = f"{folder.name} sha256:{weights_hash(folder)[:16]}"
        facts = {"tokens": manifest["tokens"], "seconds": round(manifest["seconds"], 2)}
        summary[stage] = _measured(measure(student, teacher, heldout)) | facts
        console.line(f"{stage:8}held-out loss {summary[stage]['loss']:.4f}, KL {summary[stage]['kl']:.4f}")
    setup, end = summary.get("setup_without_window", summary["setup"])["loss"], summary["extend"]["loss"]
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
    folders = {stage: out / f"{n}-{stage}" for n, stage in enumerate(conversion.stages, start=1)}
    write_report(folders, summary, out / "report.png")
    write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    write_page(out)
    return summary


_PAST = {"copy": "copied", "transform": "transformed", "fresh": "fresh", "drop": "dropped"}


def build_corpus(source: TeacherSource, tokenizer: Tokenizer, out: Path, console: Console) -> None:
    """Write out/data/{train,heldout}.{bin,idx} from the running Python's sources, unless they are there."""
    eos = end_of_text_id(source.folder, tokenizer)
    for split in SPLITS:
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


def write_conversations(
    conversion: Conversion,
    source: TeacherSource,
    teacher: RadladsForCausalLM,
    recipe: DemoRecipe,
    console: Console,
) -> None:
    """Have the teacher answer our own prompts into out/data/chat, unless it has, or the conversion names a corpus."""
    stem = conversion.conversations
    if conversion.chat is not None or stem.with_suffix(".idx").is_file():
        return
    answering = Teacher(source, teacher, ChatTemplate(source.folder, source.config.vocab_size))
    sampling = Sampling(temperature=1.0, max_tokens=recipe.reply_tokens, seed=0)
    written = write_corpus(answering, read_beginnings(None)[: recipe.num_prompts], stem, sampling, console)
    console.line(f"data    chat: {written}")


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
    check_named(Path(named))
    return replace(config, train=replace(config.train, resume="auto"))


def _measure_untrained(student: RadladsForCausalLM, teacher: RadladsForCausalLM, heldout: DataLoader) -> dict[str, Any]:
    """The rows before any training: also of the teacher with the student's window, or one of 64 + 4, and of a student
    with windows without them."""
    windows = [x.window for x in student.modules() if isinstance(x, RecurrentMixer) and x.window is not None]
    window = windows[0] if windows else WINDOW
    models = {"teacher": teacher, "teacher_window_untrained": narrowed(teacher, window), "setup": student}
    if windows:
        models["setup_without_window"] = without(student, "window")
    rows: dict[str, Any] = {name: _measured(measure(model, teacher, heldout)) for name, model in models.items()}
    rows["teacher_window_untrained"] |= asdict(window)
    return rows


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


def _measured(heldout: Heldout) -> dict[str, float]:
    assert heldout.kl is not None
    assert heldout.top1 is not None
    return {"loss": heldout.loss, "kl": heldout.kl, "top1": heldout.top1}


def _peak_rss_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 1e9
