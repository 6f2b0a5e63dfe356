"""`radlads bench`: its options, and the benchmark that they ask for. Imports no torch before it has to."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radlads.recipes.command import add_model_options, overrides_of

if TYPE_CHECKING:
    from radlads.bench.run import Bench


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads bench`, by what is measured."""
    kinds = parser.add_subparsers(title="what to measure", required=True, metavar="KIND", dest="kind")
    _add_train(kinds)
    _add_prefill(kinds)
    _add_decode(kinds)
    kernels = _add_kind(kinds, "kernels", "the recurrences alone, by every backend that is there")
    kernels.add_argument(
        "--backends", help="comma-separated, of triton, fla (which tunes itself for minutes) and chunked (default: all)"
    )


def bench_of(arguments: argparse.Namespace, argv: Sequence[str]) -> "Bench":
    """The benchmark that add_options' arguments describe. Raises ValueError for values that make none."""
    from radlads.bench.run import Bench

    return Bench(
        kind=arguments.kind,
        shape=arguments.shape,
        layers=arguments.layers,
        mixer=arguments.mixer,
        variant=arguments.variant,
        overrides=overrides_of(arguments),
        device=arguments.device,
        cases=_cases(arguments),
        checkpointing=arguments.checkpointing,
        teacher_precision=arguments.teacher_precision,
        backends=arguments.backends,
        compiled=arguments.compile,
        teacher=arguments.teacher,
        json=arguments.json,
        results=arguments.results,
        commit=arguments.commit,
        command=shlex.join(["radlads", *argv]),
    )


def _add_train(kinds: Any) -> None:
    train = _add_kind(kinds, "train", "training steps of the three stages, teacher included")
    train.add_argument(
        "--stage", choices=["align", "distill", "extend"], help="one case of this stage (--batch, --tokens)"
    )
    train.add_argument("--batch", type=int, help="sequences per step of that case")
    train.add_argument("--tokens", help="tokens per sequence of that case, such as 512 or 16k")
    train.add_argument(
        "--checkpointing",
        default="auto",
        choices=["auto", "none", "selective", "full"],
        help="what is recomputed in the backward pass (default: selective when extending)",
    )
    train.add_argument(
        "--teacher-precision",
        default="same",
        choices=["same", "fp8"],
        help="fp8: the frozen teacher's matrices in 8 bits (Hopper and newer)",
    )
    train.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks (default: on CUDA)"
    )


def _add_prefill(kinds: Any) -> None:
    prefill = _add_kind(kinds, "prefill", "reading a prompt, transformers' Qwen2 beside the student")
    prefill.add_argument("--tokens", help="one case of this length, such as 8k or 128k")
    prefill.add_argument("--piece", help="tokens read at a time in that case (default: all at once)")
    prefill.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the student's blocks (default: on CUDA)"
    )
    _add_teacher_option(prefill)


def _add_decode(kinds: Any) -> None:
    decode = _add_kind(kinds, "decode", "generating, transformers' Qwen2 beside the student")
    decode.add_argument("--batch", type=int, help="one case of this many sequences")
    decode.add_argument("--tokens", help="length of that case's prompts, such as 512 (default) or 64k")
    _add_teacher_option(decode)


def _add_teacher_option(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--no-teacher", dest="teacher", action="store_false", help="measure the student alone")


def _add_kind(kinds: Any, name: str, what: str) -> argparse.ArgumentParser:
    """Options that all kinds of benchmarks share."""
    kind: argparse.ArgumentParser = kinds.add_parser(name, help=what)
    kind.add_argument("--cases", help="comma-separated names, or all (default); unknown names list the known ones")
    kind.add_argument(
        "--shape", help="7b (default on CUDA), tiny (elsewhere), another size of Qwen2.5, or a Hugging Face folder"
    )
    kind.add_argument("--layers", type=int, help="instead of the shape's own number")
    add_model_options(kind, default_variant="group_norm, the released 7B's")
    kind.add_argument(
        "--mixer-path", type=Path, metavar="DIR", help="where mixers of your own are, in DIR/tmix and DIR/cmix"
    )
    kind.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    kind.add_argument("--json", type=Path, metavar="FILE", help="write the full record, case by case")
    kind.add_argument("--results", type=Path, metavar="FILE", help="bring this file of latest results up to date")
    kind.add_argument("--commit", help="commit to record where the code lies in no checkout")
    kind.set_defaults(checkpointing="auto", teacher_precision="same", compile=None, teacher=True)
    kind.set_defaults(stage=None, batch=None, tokens=None, piece=None, backends=None)
    return kind


def _cases(arguments: argparse.Namespace) -> str:
    """--cases, or the one case that --stage, --batch, --tokens and --piece describe."""
    described = [arguments.stage, arguments.batch, arguments.tokens, arguments.piece]
    if all(value is None for value in described):
        return arguments.cases or "all"
    if arguments.cases is not None:
        raise ValueError("--cases names cases whole: leave out --stage, --batch, --tokens and --piece, or --cases")
    batch, tokens = arguments.batch or 1, arguments.tokens
    if arguments.kind == "decode":
        return f"decode_b{batch}_{tokens or 512}"
    if tokens is None:
        raise ValueError("--tokens is needed beside --stage, --batch or --piece: give a number such as 512 or 8k")
    if arguments.kind == "prefill":
        return f"prefill_{tokens}" + (f"_by_{arguments.piece}" if arguments.piece else "")
    if arguments.stage is None:
        raise ValueError("--stage is needed beside --batch and --tokens: give align, distill or extend")
    return f"{arguments.stage}_{batch}x{tokens}"
