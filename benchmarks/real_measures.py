"""What benchmarks/real_conversion.py measures of a model: agreement, recall, RULER, costs and replies."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from radlads.convert.hf_source import load_tokenizer, open_tokenizer
from radlads.data.binidx import BinIdxReader
from radlads.evaluation.agreement import Agreement, agreement_by_position
from radlads.evaluation.costs import cost_of_context
from radlads.evaluation.harness import Settings, Tasks, open_tasks, run_tasks
from radlads.evaluation.retrieval import Cell, PromptWriter, Recall, retrieval_grid
from radlads.inference.chat import Conversation
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.sampling import Sampling
from radlads.model.modeling import RadladsForCausalLM

KINDS = ("english", "python")
# Those of RULER that need no network
RULER_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_cwe", "ruler_fwe")
# RULER makes so many questions for each length, in the order of the lengths
_RULER_QUESTIONS = 500
PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for staying healthy.",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "What is 17 plus 25?",
    "Translate to Spanish: Good morning, my friend.",
    "Write a Python function that returns the largest number in a list.",
    "Summarise in one sentence: The meeting began at nine. Sales were up, but costs had risen faster, so the team agreed "
    "to delay the new office until next year.",
    "List the first five planets of the solar system, one per line.",
    "My name is Ada and I live in Oslo. What is my name, and where do I live?",
)


def agreements(
    model: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    data: Path,
    *,
    context_tokens: int,
    edges: Sequence[int],
    measure_tokens: int,
    position_tokens: int,
) -> dict[str, dict[str, Any]]:
    """For each kind of held-out text: loss, KL and top-1 in windows of `context_tokens`, and all three by position."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        corpus = BinIdxReader(data / f"{kind}-heldout")

        def compare(context: int, edges: Sequence[int], tokens: int, corpus: BinIdxReader = corpus) -> list[Agreement]:
            return agreement_by_position(
                model,
                teacher,
                corpus,
                context_tokens=context,
                edges=edges,
                max_tokens=tokens,
                batch_windows=max(1, 8192 // context),
            )

        (whole,) = compare(context_tokens, (0, context_tokens), measure_tokens)
        bins = compare(edges[-1], edges, position_tokens)
        found[kind] = {"loss": whole.loss, "kl": whole.kl, "top1": whole.top1, "num_tokens": whole.num_tokens}
        found[kind]["by_position"] = [asdict(each) for each in bins]
    return found


def recall(
    model: RadladsForCausalLM,
    folder: Path,
    data: Path,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
) -> dict[str, list[dict[str, Any]]]:
    """The passkey's and the needle's grid, needles hidden in held-out English. folder: the tokenizer's."""
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    text = BinIdxReader(data / "english-heldout").tokens
    asker = Recall(model, tokenizer, batch_rows=samples)

    def grid(task: str) -> list[Cell]:
        writer = PromptWriter(task, tokenizer, text)
        return retrieval_grid(asker, writer, lengths=lengths, depths=depths, num_samples=samples, seed=0)

    return {task: [asdict(cell) for cell in grid(task)] for task in ("passkey", "needle")}


def ruler_tasks(names: Sequence[str], folder: Path, lengths: Sequence[int]) -> Tasks:
    """lm-eval's RULER tasks of these names, at these lengths of the folder's tokenizer."""
    return open_tasks(names, metadata={"max_seq_lengths": list(lengths), "tokenizer": str(folder)})


def ruler(
    model: RadladsForCausalLM, folder: Path, tasks: Tasks, *, lengths: Sequence[int], samples: int
) -> dict[str, dict[str, float]]:
    """The share of right answers of each task at each length, by lm-eval's own scoring."""
    first = [place * _RULER_QUESTIONS for place in range(len(lengths))]
    numbers = [start + number for start in first for number in range(samples)]
    settings = Settings(batch_rows=samples * len(tasks.names), questions=dict.fromkeys(tasks.names, numbers))
    results = run_tasks(model, open_tokenizer(folder, model.config.vocab_size), tasks, settings)
    assert results is not None
    return {task: _by_length(results["samples"][task], lengths) for task in tasks.names}


def _by_length(answers: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> dict[str, float]:
    scores = {
        str(length): [each[str(length)] for each in answers if each["doc"]["max_length"] == length]
        for length in lengths
    }
    return {length: sum(found) / len(found) for length, found in scores.items()}


def costs(model: RadladsForCausalLM, data: Path, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Speed of reading and of decoding, and bytes of state, after so many tokens of held-out English."""
    tokens = BinIdxReader(data / "english-heldout").tokens
    return [asdict(cost_of_context(model, tokens[:context].tolist())) for context in contexts]


def replies(model: RadladsForCausalLM, folder: Path, max_tokens: int) -> list[str]:
    """The greedy reply to each of PROMPTS, by the folder's own template."""
    template = ChatTemplate(folder, model.config.vocab_size)
    chat = Conversation(model, template, Sampling(temperature=0, max_tokens=max_tokens))
    said = []
    for prompt in PROMPTS:
        chat.reset()
        said.append("".join(chat.reply(prompt)).strip())
    return said
