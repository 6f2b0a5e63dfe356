"""`radlads export`: a run's model as a folder to publish, which has proved that it loads alone.

Owns the order of checks. Leaves which model a folder stands for to export_source.py, formats to checkpoint/, the card's
words to model_card.py, llama.cpp to llama_cpp.py and the hub to hub_upload.py.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from radlads.checkpoint.atomic import check_new, unfinished_folder
from radlads.checkpoint.hf_export import check_exportable, write_export
from radlads.checkpoint.manifest import (
    check_every_file,
    write_folder_checksums,
)
from radlads.checkpoint.mixer_code import check_brought
from radlads.checkpoint.model_folder import StoredModel, load_model, open_model
from radlads.checkpoint.tokenizer_files import (
    GENERATION_FILE,
    LICENCE_FILES,
    check_copyable,
    num_ids,
)
from radlads.checkpoint.weight_files import parse_size
from radlads.checkpoint.weights import EMBEDDING, StoredWeights
from radlads.console import Console
from radlads.convert.hf_source import load_tokenizer
from radlads.files import write_text
from radlads.recipes.conversion import RELOAD_TOLERANCE
from radlads.recipes.export_source import Source, find_source
from radlads.recipes.hub_upload import check_repo, listing, upload
from radlads.recipes.llama_cpp import CONVERT, check_runs, verdict, write_for_llama_cpp
from radlads.recipes.model_card import CARD, CardFacts, model_card, read_licence
from radlads.recipes.reload_check import logits_of, reloaded_logits
from radlads.recipes.vllm_check import vllm_verdict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHECKED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to export, and how. run: a conversion's folder, a stage's, or a model's; out: None to upload `run` as it is.

    teacher: whose tokenizer the model gets, where the run does not say. dtype: None for the weights' own.
    """

    run: Path
    out: Path | None = None
    teacher: str | None = None
    dtype: str | None = None
    shard_size: str = "5GB"
    for_llama_cpp: bool = False
    repo: str | None = None
    private: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.out is None and self.repo is None:
            raise ValueError("name the folder to write: radlads export RUN OUT")
        if self.repo is None and (self.dry_run or self.private):
            raise ValueError("--dry-run and --private belong to --push-to-hub OWNER/NAME")
        parse_size(self.shard_size)
        of_files = (self.teacher, self.dtype, self.for_llama_cpp, self.shard_size != Export.shard_size)
        if self.out is None and any(of_files):
            raise ValueError(
                "without OUT the folder is uploaded as it is: name OUT, or leave out --teacher, --dtype, --shard-size "
                "and --for-llama-cpp"
            )
        if self.out is not None:
            check_new(self.out)


def export_run(export: Export, console: Console) -> None:
    """Write the model to `out`, verified, and upload it if a repository is named.

    `out` appears only when the model has been loaded from it and gave the same logits. Raises ValueError if `run` holds
    no finished model or its weights are not those of the manifest, the teacher is not to be found, or as upload.
    """
    if export.repo is not None:
        check_repo(export.repo, needs_token=not export.dry_run)
    folder = export.run
    if export.out is not None:
        folder = export.out
        _write(export, folder, console)
    if export.repo is not None and export.dry_run:
        for line in listing(folder, export.repo):
            console.line(line)
    elif export.repo is not None:
        check_every_file(folder)
        console.line(f"uploaded to {upload(folder, export.repo, private=export.private)}")


def check_vllm(run: Path, teacher: str | None) -> tuple[bool, list[str]]:
    """Whether vLLM can serve the model of a run, and the sentences that say so."""
    return vllm_verdict(open_model(find_source(run, teacher).folder).config, run)


def check_gguf(run: Path, teacher: str | None) -> tuple[bool, list[str]]:
    """Whether llama.cpp can run the model of a run, and the sentences that say so."""
    source = find_source(run, teacher)
    stored = open_model(source.folder)
    found = verdict(stored.config, stored.weights, source.tokenizer_folder)
    return not found.obstacles, found.lines(run)


def _write(export: Export, out: Path, console: Console) -> None:
    """Write OUT, its model card last, once the model in it has proved to be the run's."""
    source = find_source(export.run, export.teacher)
    stored = open_model(source.folder)
    check_brought(stored.config, source.folder)
    check_exportable(stored.config)
    check_copyable(source.tokenizer_folder)
    if export.for_llama_cpp:
        check_runs(stored.config)
    dtype = DTYPES[export.dtype] if export.dtype else stored.weights.info(EMBEDDING).dtype
    token_ids = _some_tokens(num_ids(load_tokenizer(source.tokenizer_folder, stored.config.vocab_size)))
    with unfinished_folder(out, keep_failed=False) as partial:
        console.progress(f"reading {source.folder} and writing {out} ...")
        expected = _write_model(export, source, partial, dtype, token_ids)
        write_folder_checksums(partial)  # before the card and licences, which their reader may edit
        console.progress("loading what was written ...")
        difference = _difference(expected, partial.resolve(), dtype, token_ids, for_llama_cpp=export.for_llama_cpp)
        _add_licence_files(source.tokenizer_folder, partial)
        write_text(partial / CARD, model_card(_card_facts(export, source, open_model(partial), out.name, difference)))
    how = "read again" if export.for_llama_cpp else "loaded without radlads"
    console.line(f"wrote {out}; {how}, its logits differ from the model's by at most {difference:.1e}")
    if export.for_llama_cpp:
        console.line(f"convert it with {CONVERT.format(folder=out)}")
        for note in verdict(stored.config, stored.weights, source.tokenizer_folder).notes:
            console.line(f"- {note}")


def _write_model(
    export: Export, source: Source, folder: Path, dtype: torch.dtype, token_ids: list[int]
) -> torch.Tensor:
    """Write the model, which is in memory for no longer than that, and return its logits."""
    model = load_model(source.folder, dtype=dtype)
    if source.retied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    write = write_for_llama_cpp if export.for_llama_cpp else write_export
    write(model, source.tokenizer_folder, folder, shard_bytes=parse_size(export.shard_size))
    if not (folder / GENERATION_FILE).is_file():
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    return logits_of(model, token_ids)


def _difference(
    expected: torch.Tensor, folder: Path, dtype: torch.dtype, token_ids: list[int], *, for_llama_cpp: bool
) -> float:
    """How far the logits of what was written are from the model's. Raises ValueError if that is more than rounding."""
    if for_llama_cpp:  # a published checkpoint, which brings no code along
        found = logits_of(load_model(folder, dtype=dtype), token_ids)
    else:
        found = reloaded_logits(folder, token_ids, dtype)
    difference = (expected - found).abs().max().item()
    if not difference <= max(RELOAD_TOLERANCE, 4 * torch.finfo(dtype).eps * expected.abs().max().item()):
        raise ValueError(
            f"what was written gives other logits than the model (by {difference:.1e}): please report this"
        )
    return difference


def _some_tokens(num_tokens: int) -> list[int]:
    """Ids that both models are asked about, always the same."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(num_tokens, (_CHECKED_TOKENS,), generator=draw).tolist()


def _add_licence_files(teacher_folder: Path, folder: Path) -> None:
    for path in (path for pattern in LICENCE_FILES for path in teacher_folder.glob(pattern) if path.is_file()):
        shutil.copyfile(path, folder / path.name)


def _card_facts(export: Export, source: Source, written: StoredModel, name: str, difference: float) -> CardFacts:
    """The card's facts."""
    (teacher, base_model), earlier = _names_of_teacher(source), source.earlier
    weights, dtype = written.used, _dtype_of(written.used)
    before = [_dtype_of(open_model(source.folder).weights), *(earlier.cast_from if earlier else ())]
    return CardFacts(
        name=export.repo or name,
        teacher=teacher,
        base_model=base_model,
        licence=read_licence(source.tokenizer_folder),
        config=written.config,
        num_parameters=sum(math.prod(weights.info(each).shape) for each in weights),
        difference=difference,
        stages=source.stages,
        measured=source.measured,
        convert=CONVERT.format(folder=name) if export.for_llama_cpp else None,
        cast_from=before if before[0] != dtype else before[1:],
        earlier=earlier,
    )


def _names_of_teacher(source: Source) -> tuple[str | None, str | None]:
    """What it is called, and its name on the hub; a local folder is called by its own name alone."""
    name = source.teacher_name
    if name is None:
        return (None, None) if source.earlier is None else (source.earlier.teacher, source.earlier.base_model)
    folder = Path(name).expanduser()
    return (folder.resolve().name, None) if folder.is_dir() else (name, name)


def _dtype_of(weights: StoredWeights) -> str:
    return str(weights.info(EMBEDDING).dtype).removeprefix("torch.")
