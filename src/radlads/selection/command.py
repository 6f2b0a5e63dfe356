"""The options of `radlads select`, and what they ask for. Imports no torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RECALL_DISTANCE = 64
"""Tokens that a pair of tokens lies back at least to count as recalled."""
Criterion = Literal["kl", "recalled", "needle"]
CRITERIA: tuple[Criterion, ...] = ("kl", "recalled", "needle")


@dataclass(frozen=True, kw_only=True)
class Select:
    """How many layers to keep, by what, of which student, on which text.

    run: a student's folder, or that of a conversion, whose aligned student is taken. teacher: None = the one that the
    run names. text: a text file or a .bin/.idx pair, None = the run's held-out text, else held-out sources of the
    running Python. num_tokens: in windows of context_tokens, for kl and recalled. needle_tokens: of each of num_prompts
    prompts. devices: processes, one GPU each. out: the file to write; None = layers.json in the run.
    """

    run: Path
    keep: int
    by: Criterion = "kl"
    teacher: str | None = None
    text: Path | None = None
    num_tokens: int = 65536
    context_tokens: int = 512
    needle_tokens: int = 1024
    num_prompts: int = 50
    tokenizer: str | None = None
    device: str = "auto"
    devices: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        for option, value in (
            ("--keep", self.keep),
            ("--tokens", self.num_tokens),
            ("--ctx-len", self.context_tokens),
            ("--needle-tokens", self.needle_tokens),
            ("--samples", self.num_prompts),
            ("--devices", self.devices),
        ):
            if value < 1:
                raise ValueError(f"{option} must be 1 or more, not {value}")
        if self.by == "recalled" and self.context_tokens <= RECALL_DISTANCE:
            raise ValueError(
                f"--by recalled needs windows of more than {RECALL_DISTANCE} tokens, as only pairs that stood so far "
                f"back count: give a longer --ctx-len than {self.context_tokens}"
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads select`."""
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="a student's folder, or a conversion's: its aligned student"
    )
    parser.add_argument("--keep", type=int, required=True, metavar="K", help="how many layers to choose")
    parser.add_argument(
        "--by",
        default="kl",
        choices=CRITERIA,
        help="kl = distance to the teacher (default); recalled = the same where a pair of tokens stood in the window "
        f"{RECALL_DISTANCE} tokens earlier or more; needle = facts found again in long prompts",
    )
    parser.add_argument("--teacher", metavar="DIR", help="its folder or hub name (default: the one that RUN names)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text file or a .bin/.idx pair (default: RUN's held-out text, else this Python's held-out sources)",
    )
    parser.add_argument(
        "--tokens", type=int, default=65536, help="tokens to measure kl and recalled on (default 65536)"
    )
    parser.add_argument("--ctx-len", type=int, default=512, help="tokens of one window of them (default 512)")
    parser.add_argument("--needle-tokens", type=int, default=1024, help="tokens of a prompt of needle (default 1024)")
    parser.add_argument("--samples", type=int, default=50, help="prompts of needle, at five depths (default 50)")
    parser.add_argument("--tokenizer", metavar="DIR", help="(default: the student's own, else the teacher's)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--devices", type=int, default=1, help="GPUs that share the layers (default 1)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default RUN/layers.json)")


def select_of(arguments: argparse.Namespace) -> Select:
    """What add_options' arguments ask for. Raises ValueError for values that make no selection."""
    return Select(
        run=arguments.run_folder,
        keep=arguments.keep,
        by=arguments.by,
        teacher=arguments.teacher,
        text=arguments.text,
        num_tokens=arguments.tokens,
        context_tokens=arguments.ctx_len,
        needle_tokens=arguments.needle_tokens,
        num_prompts=arguments.samples,
        tokenizer=arguments.tokenizer,
        device=arguments.device,
        devices=arguments.devices,
        out=arguments.out,
    )
