"""`radlads longcontext`: what a model keeps of a long text, and what that costs it. Models are loaded one at a time."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from radlads.checkpoint.manifest import versions
from radlads.console import Console
from radlads.evaluation.long_context_options import FIRST_EDGE, RESULTS, LongContext
from radlads.files import write_text

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from radlads.data.binidx import BinIdxReader
    from radlads.model.modeling import RadladsForCausalLM


def measure_long_context(settings: LongContext, console: Console) -> dict[str, Any]:
    """Measure the model, then its teacher; write OUT/longcontext.json after every part, and return what it holds.

    Raises ValueError for folders that are no model, a text that is too short or not of the tokenizer, prompts too
    short for their fact, and states that would not fit into memory.
    """
    from radlads.checkpoint.tokenizer_files import choose_tokenizer
    from radlads.convert.hf_source import locate, open_tokenizer
    from radlads.evaluation.models import model_config, notes_on, open_model
    from radlads.evaluation.text_corpus import text_corpus
    from radlads.inference.generate import check_memory, choose_device
    from radlads.report.plots import long_context_charts

    folders = {"student": locate(settings.folder)}
    if settings.teacher is not None:
        folders["teacher"] = locate(settings.teacher)
    configs = {name: model_config(folder) for name, folder in folders.items()}
    device, dtype = choose_device(settings.device)
    for config in configs.values():
        check_memory(config, max(settings.lengths), device, rows=settings.batch_rows)
    settings.out.mkdir(parents=True, exist_ok=True)
    results = _head(settings, device, dtype)
    vocab_size = min(config.vocab_size for config in configs.values())
    tokenizer_folder = choose_tokenizer(settings.tokenizer, *folders.values())
    tokenizer = open_tokenizer(tokenizer_folder, vocab_size)._tokenizer
    with text_corpus(settings.text, tokenizer, tokenizer_folder, vocab_size) as corpus:
        _check_room(settings, tokenizer, corpus)
        for name, folder in folders.items():
            for line in (f"{name}: {folder}", *notes_on(folder)):
                console.line(line)
            model = open_model(folder, dtype).to(device)  # type: ignore[arg-type]
            measured: dict[str, Any] = {"folder": str(folder)}
            results["models"][name] = measured
            for part, values in _measure(settings, model, tokenizer, corpus, console):
                measured[part] = values
                write_text(settings.out / RESULTS, json.dumps(results, indent=1) + "\n")
            del model
    for chart in long_context_charts(results["models"]):
        chart.save_png(settings.out)
    return results


def _check_room(settings: LongContext, tokenizer: "Tokenizer", corpus: "BinIdxReader") -> None:
    """Have a text or a length that is too short for a later part told before the first one is measured."""
    from radlads.evaluation.retrieval import TASKS, PromptWriter

    for task in settings.parts:
        if task in TASKS:
            PromptWriter(task, tokenizer, corpus.tokens).write(min(settings.lengths), 0, seed=settings.seed)
    longest, num_tokens = max(settings.lengths), corpus.num_tokens
    if "loss" in settings.parts and num_tokens <= longest:
        raise ValueError(
            f"{settings.text or 'the held-out text'} has {num_tokens:,} tokens, too few for the loss in a window of "
            f"{longest:,}: give more --text, or shorter --lengths"
        )


def _head(settings: LongContext, device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    from radlads.evaluation.retrieval import TASKS
    from radlads.evaluation.text_corpus import HELDOUT_SOURCES

    return {
        "settings": {
            "num_samples": settings.num_samples,
            "seed": settings.seed,
            "text": HELDOUT_SOURCES if settings.text is None else str(settings.text),
            "device": _device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "tasks": {name: asdict(TASKS[name]) for name in settings.parts if name in TASKS},
        },
        "models": {},
        "versions": versions(),
    }


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _measure(
    settings: LongContext,
    model: "RadladsForCausalLM",
    tokenizer: "Tokenizer",
    corpus: "BinIdxReader",
    console: Console,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each part's name and rows."""
    for part in settings.parts:
        if part == "loss":
            yield part, _losses(settings, model, corpus, console)
        elif part == "costs":
            yield part, _costs(settings, model, corpus, console)
        else:
            yield part, _retrieval(part, settings, model, tokenizer, corpus, console)


def _retrieval(
    task: str,
    settings: LongContext,
    model: "RadladsForCausalLM",
    tokenizer: "Tokenizer",
    corpus: "BinIdxReader",
    console: Console,
) -> list[dict[str, Any]]:
    from radlads.evaluation.retrieval import Cell, PromptWriter, Recall, retrieval_grid

    def show(cell: Cell) -> None:
        where = f"{cell.length_tokens:,} tokens, depth {cell.depth:.0%}"
        console.progress(f"{task} at {where}: {cell.num_right} of {cell.num_samples} right")

    cells = retrieval_grid(
        Recall(model, tokenizer, batch_rows=settings.batch_rows),
        PromptWriter(task, tokenizer, corpus.tokens),
        lengths=settings.lengths,
        depths=settings.depths,
        num_samples=settings.num_samples,
        seed=settings.seed,
        on_cell=show,
    )
    right, asked = sum(cell.num_right for cell in cells), sum(cell.num_samples for cell in cells)
    console.line(f"{task:8} {right / asked:.1%} of {asked:,} right")
    return [asdict(cell) for cell in cells]


def _losses(
    settings: LongContext, model: "RadladsForCausalLM", corpus: "BinIdxReader", console: Console
) -> list[dict[str, Any]]:
    from radlads.evaluation.perplexity import loss_by_position

    console.progress("loss by position ...")
    longest = max(settings.lengths)
    bins = loss_by_position(
        model, corpus, context_tokens=longest, edges=position_edges(longest), max_tokens=settings.text_tokens
    )
    first, last = bins[0], bins[-1]
    console.line(f"loss     {first.loss:.3f} before token {first.end:,}, {last.loss:.3f} from token {last.first:,} on")
    return [asdict(each) for each in bins]


def _costs(
    settings: LongContext, model: "RadladsForCausalLM", corpus: "BinIdxReader", console: Console
) -> list[dict[str, Any]]:
    from radlads.evaluation.costs import cost_of_context

    costs = []
    for length in settings.lengths:
        console.progress(f"costs of {length:,} tokens ...")
        costs.append(cost_of_context(model, corpus.tokens.take(range(length), mode="wrap").tolist()))
    last = costs[-1]
    console.line(
        f"costs    after {last.context_tokens:,} tokens: {last.prefill_tokens_per_s:,.0f} tokens/s read, "
        f"{last.decode_ms:.2f} ms a token, {last.state_bytes / 1e6:.2f} MB held in the cache, peak beside the weights "
        + (f"{last.peak_bytes / 1e6:.2f} MB" if last.peak_bytes is not None else "not measured on a CPU")
    )
    return [asdict(cost) for cost in costs]


def position_edges(context_tokens: int) -> list[int]:
    """0, 16, 32, 64, ... up to the context: bins that double."""
    edges = [0]
    while (edge := max(FIRST_EDGE, 2 * edges[-1])) < context_tokens:
        edges.append(edge)
    return [*edges, context_tokens]
