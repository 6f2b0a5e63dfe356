"""Several corpora as one: which corpus sample n comes from, and which of that corpus's samples it is.

Owns the notation `a:0.9,b:0.1` and the arithmetic, in fractions. Leaves reading to `loader.py`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


def parse_mixture(text: str) -> list[tuple[Path, Fraction]]:
    """Return the corpora that `text` names, with shares that add up to 1: a path, or `a:0.9,b:0.1` with any weights.

    Raises ValueError if one of several corpora has no weight above 0, or is named twice.
    """
    entries = [entry.strip() for entry in text.split(",")]
    found = [_WEIGHTED.fullmatch(entry) for entry in entries]
    if len(entries) == 1 and found[0] is None:
        return [(Path(text), Fraction(1))]
    corpora: list[tuple[Path, Fraction]] = []
    for entry, match in zip(entries, found, strict=True):
        if match is None or not Fraction(match["weight"]):
            raise ValueError(f"{text}: {entry!r} is not PATH:WEIGHT with a weight above 0, as in a:0.9,b:0.1")
        corpora.append((Path(match["path"]), Fraction(match["weight"])))
    if len({path for path, _ in corpora}) < len(corpora):
        raise ValueError(f"{text} names a corpus twice: add its weights up")
    total = sum(weight for _, weight in corpora)
    return [(path, weight / total) for path, weight in corpora]


def locate(n: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Return (i, m): sample `n` of the mixture is sample `m` of corpus `i`, all from 0.

    After any number of samples corpus i has given its share of what the corpora before it left, within one; each gives
    its samples in order, none twice.
    """
    rest = Fraction(1)
    for i, share in enumerate(shares):
        before, after = int(n * share / rest), int((n + 1) * share / rest)
        if after > before:
            return i, before
        n -= before
        rest -= share
    raise AssertionError("the last corpus takes all that is left")
