"""What benchmarks/keep_the_teacher.py measures of a model: agreement with its teacher, where recalled too; needles."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from radlads.checkpoint.tokenizer_files import num_ids
from radlads.data.binidx import BinIdxReader
from radlads.evaluation.agreement import compared_windows
from radlads.evaluation.perplexity import spread_windows
from radlads.evaluation.retrieval import PromptWriter
from radlads.model.modeling import RadladsForCausalLM
from radlads.selection.probes import NeedleProbe, recalled

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEANS = ("loss", "kl", "top1")


def agreement(
    model: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    corpora: Mapping[str, Path],
    *,
    edges: Sequence[int],
    max_tokens: int,
    batch_windows: int,
) -> dict[str, Any]:
    """Means over the kinds of text, and each kind's own under `texts`; windows have edges[-1] tokens.

    loss, kl in nats; top1 a share. kl_recalled: KL where the pair (token, next token) stood in the same window at least
    64 tokens earlier, kl_rest: elsewhere; both None if there are no such pairs. by_position: bins between the edges.
    """
    texts = {
        kind: _agreement(model, teacher, BinIdxReader(stem), edges, max_tokens, batch_windows)
        for kind, stem in corpora.items()
    }
    return mean_of(list(texts.values())) | {"texts": texts}


def _agreement(
    model: RadladsForCausalLM,
    teacher: RadladsForCausalLM,
    corpus: BinIdxReader,
    edges: Sequence[int],
    max_tokens: int,
    batch_windows: int,
) -> dict[str, Any]:
    windows = spread_windows(corpus, edges[-1], max_tokens)
    by_position = torch.zeros(3, edges[-1], dtype=torch.float64, device=model.device)
    kl_recalled, num_recalled = 0.0, 0
    for tokens, values_3BT in compared_windows(model, teacher, windows, batch_windows=batch_windows):
        by_position += values_3BT.sum(1)
        marked = recalled(tokens)
        kl_recalled += float(values_3BT[1][marked].sum())
        num_recalled += int(marked.sum())
    num_tokens = len(windows) * edges[-1]
    kl_sum = float(by_position[1].sum())
    bins = [
        {"first": first, "end": end} | _named(by_position[:, first:end].sum(1) / (len(windows) * (end - first)))
        for first, end in pairwise(edges)
    ]
    return _named(by_position.sum(1) / num_tokens) | {
        "kl_recalled": kl_recalled / num_recalled if num_recalled else None,
        "kl_rest": (kl_sum - kl_recalled) / (num_tokens - num_recalled) if num_recalled else None,
        "recalled_share": num_recalled / num_tokens,
        "num_tokens": num_tokens,
        "by_position": bins,
    }


def _named(means: torch.Tensor) -> dict[str, float]:
    return dict(zip(MEANS, means.tolist(), strict=True))


@torch.no_grad()
def needle(
    model: RadladsForCausalLM, tokenizer: Tokenizer, text: BinIdxReader, *, lengths: Sequence[int], samples: int
) -> dict[str, Any]:
    """The share of needles that greedy decoding finds, of all prompts and by length and depth, and the answers' loss in
    nats per token. Nothing is generated."""
    writer, cells = PromptWriter("needle", tokenizer, text.tokens), []
    for length in lengths:
        for depth in DEPTHS:
            prompts = [writer.write(length, depth, seed=seed) for seed in range(samples)]
            probe = NeedleProbe(prompts, num_ids(tokenizer))
            sums = [
                batch.sums(model.model(batch.tokens, use_cache=False).last_hidden_state)
                for batch in probe.asked(model, model)
            ]
            values = probe.values(torch.stack(sums).sum(0))
            cells.append({"length_tokens": length, "depth": depth, "num_samples": samples} | dict(values))
    means = {name: statistics.mean(cell[name] for cell in cells) for name in ("needle", "answer_loss")}
    return means | {"needle_cells": cells}


def mean_of(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several measurements of the same form: of seeds, or of kinds of text; None where one has none."""
    first = measured[0]
    means: dict[str, Any] = {}
    for name in ("loss", "kl", "kl_recalled", "kl_rest", "recalled_share", "top1", "needle", "answer_loss"):
        if name in first:
            values = [each[name] for each in measured]
            means[name] = None if None in values else statistics.mean(values)
    means["by_position"] = [
        {"first": bins[0]["first"], "end": bins[0]["end"]}
        | {name: statistics.mean(each[name] for each in bins) for name in MEANS}
        for bins in zip(*(each["by_position"] for each in measured), strict=True)
    ]
    return means
