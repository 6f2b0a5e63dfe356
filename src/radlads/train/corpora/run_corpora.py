"""The corpora that a run trains on and is measured on, as run.json records them, and where two runs' corpora differ."""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from radlads.data.binidx import BinIdxReader
from radlads.data.identity import describe_corpus

TRAINING, HELDOUT = "training tokens", "held-out tokens"
"""The keys of run.json. Runs older than the samples' hash have text under the first and nothing under the second."""


def describe_corpora(
    corpora: Iterable[tuple[BinIdxReader, Fraction]], heldout: BinIdxReader | None
) -> dict[str, list[dict[str, Any]] | None]:
    """What run.json holds of the corpora to train on, with their shares, and of the held-out corpus, if there is one.

    Held-out tokens at the end of the training corpus are no corpus of their own.
    """
    training = [{"share": str(share), **describe_corpus(reader)} for reader, share in corpora]
    return {TRAINING: training, HELDOUT: [describe_corpus(heldout)] if heldout else None}


def corpus_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A phrase for each of the two keys whose corpora hold something else, wherever they lie, with both names.

    A run that was not measured on a held-out corpus may be from now on; the other way round is a difference.
    """
    found = []
    for key, option in ((TRAINING, "train.data_file"), (HELDOUT, "train.validation_data_file")):
        if there.get(key) and _known_by(there[key]) != _known_by(here[key], old=isinstance(there[key], str)):
            found.append(f"{option} is {_named(there[key])} there and {_named(here[key])} here")
    return found


def _known_by(corpora: Any, *, old: bool = False) -> Any:
    """All but the names; old: as older runs had it."""
    if corpora is None or isinstance(corpora, str):
        return corpora
    if old:
        return ", ".join(f"{each['share']} of {each['tokens']} tokens, index {each['index']}" for each in corpora)
    return [{key: value for key, value in each.items() if key != "name"} for each in corpora]


def _named(corpora: Any) -> str:
    if corpora is None or isinstance(corpora, str):
        return corpora or "not set"
    return ", ".join(
        f"{each['name']}{_share(each)} ({each['tokens']} {each['dtype']} tokens, index {each['index']}, "
        f"samples {each['samples']})"
        for each in corpora
    )


def _share(corpus: Mapping[str, Any]) -> str:
    return f":{corpus['share']}" if corpus.get("share", "1") != "1" else ""
