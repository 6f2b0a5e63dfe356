"""The options of `radlads longcontext`, and what they ask for."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = "longcontext.json"
PARTS = ("passkey", "needle", "loss", "costs")
FIRST_EDGE = 16
"""Tokens of the first bin of losses by position, and so of the shortest length."""


@dataclass(frozen=True, kw_only=True)
class LongContext:
    """What to measure, and how. lengths: tokens of the prompts. depths: where in them the fact is told, 0 .. 1.

    text: a text file or a .bin/.idx pair, None for held-out sources of the running Python. text_tokens: how much of it
    the loss is taken on. tokenizer: a folder or hub name, instead of the model's own.
    """

    folder: str
    teacher: str | None = None
    parts: Sequence[str] = PARTS
    lengths: Sequence[int]
    depths: Sequence[float]
    num_samples: int = 100
    batch_rows: int = 8
    seed: int = 0
    text: Path | None = None
    text_tokens: int = 131072
    tokenizer: str | None = None
    device: str = "auto"
    out: Path

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise ValueError(f"--parts knows {', '.join(PARTS)}, not {unknown[0]!r}")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"--parts takes one or more of {', '.join(PARTS)}, each once")
        if not self.lengths or min(self.lengths) < FIRST_EDGE or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"--lengths must be different numbers of {FIRST_EDGE} tokens or more")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError("--depths must be percentages from 0 (the start) to 100 (just before the question)")
        if len(set(self.depths)) < len(self.depths):
            raise ValueError("--depths must be different from each other")
        for option, value in (
            ("--samples", self.num_samples),
            ("--batch-size", self.batch_rows),
            ("--text-tokens", self.text_tokens),
        ):
            if value < 1:
                raise ValueError(f"{option} must be 1 or more, not {value}")
        if (self.out / RESULTS).exists():
            raise ValueError(f"{self.out / RESULTS} exists already: remove it, or choose another --out")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads longcontext`."""
    parser.add_argument("folder", metavar="DIR", help="a model: a folder of any stage or export, or a hub name")
    parser.add_argument("--teacher", metavar="DIR", help="measure it too, on the same prompts")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)} (default all)"
    )
    parser.add_argument("--lengths", default="1k,2k,4k,8k", help="tokens of prompts (default 1k,2k,4k,8k)")
    parser.add_argument("--depths", default="0,25,50,75,100", help="where the fact is told, in percent of the prompt")
    parser.add_argument("--samples", type=int, default=100, help="prompts for each length and depth (default 100)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt of each length and depth (default 0)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text file or a .bin/.idx pair, for needle, loss and costs (default: this Python's held-out sources)",
    )
    parser.add_argument(
        "--text-tokens", type=int, default=131072, help="tokens that the loss is taken on (default 131072)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="(default: the model's own, else the teacher's)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/longcontext"),
        metavar="DIR",
        help=f"folder for {RESULTS} and plots (default out/longcontext); RUN/longcontext is found by radlads report",
    )


def long_context_of(arguments: argparse.Namespace) -> LongContext:
    """What add_options' arguments ask for. Raises ValueError for values that make no measurement."""
    return LongContext(
        folder=arguments.folder,
        teacher=arguments.teacher,
        parts=_words(arguments.parts),
        lengths=sorted(_tokens(word) for word in _words(arguments.lengths)),
        depths=[_share(word) for word in _words(arguments.depths)],
        num_samples=arguments.samples,
        batch_rows=arguments.batch_size,
        seed=arguments.seed,
        text=arguments.text,
        text_tokens=arguments.text_tokens,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        out=arguments.out,
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tokens(word: str) -> int:
    """512, or 8k for 8192."""
    number, factor = (word[:-1], 1024) if word[-1] in "kK" else (word, 1)
    if not number.isdecimal():
        raise ValueError(f"--lengths takes numbers such as 512 or 8k, not {word!r}")
    return int(number) * factor


def _share(word: str) -> float:
    try:
        return float(word) / 100
    except ValueError as error:
        raise ValueError(f"--depths takes percentages such as 0,50,100, not {word!r}") from error
