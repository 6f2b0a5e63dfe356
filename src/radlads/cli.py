"""The command line: arguments in, sentences out, exit codes. The only module that prints."""

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a benchmark's case failed, 2 the user can mend it (one sentence
    on stderr), 130 Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if command == "train":
            return train(rest)
        arguments = _parser().parse_args(argv or ["--help"])
        arguments.argv = argv
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"radlads: {_sentence(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("radlads: interrupted; start the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def demo(arguments: argparse.Namespace) -> int:
    """Convert a teacher through all stages and print what came of it."""
    from radlads.recipes.conversion import BUNDLED_TEACHER, Conversion, run_conversion

    out = arguments.out or Path("out") / ("demo" if arguments.teacher is None else "conversion")
    conversion = Conversion(
        teacher=arguments.teacher or BUNDLED_TEACHER,
        mixer=arguments.mixer,
        variant=arguments.variant,
        out=out,
        data=arguments.data,
        heldout_data=arguments.heldout_data,
        overrides=dict(_override(text) for text in arguments.set),
    )
    summary = run_conversion(conversion, Terminal())
    _print_summary(summary, out)
    return 0


def train(argv: Sequence[str]) -> int:
    """Run one stage from configuration files and overrides."""
    from radlads.config.load import parse_config

    config = parse_config(argv, write=print)
    from radlads.recipes.single_stage import train_stage

    result = train_stage(config, Terminal())
    print(f"wrote {result.folder} ({result.tokens:,} tokens, {result.seconds:.0f} s)")
    if result.heldout is not None:
        kl = "" if result.heldout.kl is None else f", KL {result.heldout.kl:.4f}, top-1 {result.heldout.top1:.1%}"
        print(f"held-out loss {result.heldout.loss:.4f}{kl}")
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt, streaming."""
    from radlads.checkpoint.model_folder import load_model
    from radlads.convert.hf_source import end_of_text_id, load_tokenizer
    from radlads.inference.generate import Sampling, choose_device, stream_text

    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )
    device, dtype = choose_device(arguments.device)
    model = load_model(arguments.folder, dtype=dtype).to(device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(arguments.folder, model.config.vocab_size)
    stop = frozenset({end_of_text_id(arguments.folder, tokenizer)})
    for piece in stream_text(model, tokenizer, arguments.prompt, sampling, stop):
        print(piece, end="", flush=True)
    print()
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure speed and memory on this machine; 1 if a case failed."""
    from radlads.bench.run import Bench, run_bench

    settings = Bench(
        kind=arguments.kind,
        shape=arguments.shape,
        layers=arguments.layers,
        mixer=arguments.mixer,
        variant=arguments.variant,
        device=arguments.device,
        cases=_bench_cases(arguments),
        checkpointing=arguments.checkpointing,
        compiled=arguments.compile,
        teacher=arguments.teacher,
        json=arguments.json,
        results=arguments.results,
        commit=arguments.commit,
        command=shlex.join(["radlads", *arguments.argv]),
    )
    return FAILED if run_bench(settings, Terminal()) else 0


class Terminal:
    """Progress on one line that is rewritten where stdout is a terminal, and as a line every ten seconds elsewhere."""

    QUIET_S = 10.0

    def __init__(self) -> None:
        self._in_place, self._open, self._last = sys.stdout.isatty(), False, 0.0

    def line(self, text: str) -> None:
        self._close()
        print(text, flush=True)

    def progress(self, text: str) -> None:
        import time

        if self._in_place:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self._open = True
        elif time.monotonic() - self._last >= self.QUIET_S:
            self._last = time.monotonic()
            print(text, flush=True)

    def _close(self) -> None:
        if self._open:
            print("\r\x1b[2K", end="")
            self._open = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="radlads", description="Turn softmax transformers into linear-attention decoders."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    commands.add_parser(
        "train", help="run one stage: -c FILE ... --train.KEY VALUE (radlads train --help)", add_help=False
    )
    _add_generate(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo", help="convert a teacher (the bundled one by default) end to end and show the result"
    )
    command.add_argument("--teacher", help="a Hugging Face folder or hub name such as Qwen/Qwen2.5-0.5B-Instruct")
    command.add_argument("--mixer", default="rad_rwkv7", help="rad_rwkv7 (default) or rad_rwkv6")
    command.add_argument(
        "--variant",
        default="balanced",
        choices=["balanced", "group_norm"],
        help="of rad_rwkv7: the paper's or the released 7B's",
    )
    command.add_argument("--out", type=Path, help="folder to write (default out/demo, out/conversion with --teacher)")
    command.add_argument(
        "--data", type=Path, help="training tokens, a .bin/.idx pair (default: this Python's own text)"
    )
    command.add_argument("--heldout-data", type=Path, help="held-out tokens, a .bin/.idx pair; goes with --data")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a configuration key of all stages, e.g. train.micro_bsz=4",
    )
    command.set_defaults(run=demo)


def _add_generate(commands: Any) -> None:
    command = commands.add_parser("generate", help="continue a prompt with a converted model")
    command.add_argument("folder", type=Path, help="a model folder that radlads exported")
    command.add_argument("--prompt", required=True)
    command.add_argument("--temperature", type=float, default=0.8, help="0 = always the likeliest token")
    command.add_argument(
        "--top-p", type=float, default=0.95, help="keep the likeliest tokens of this total probability"
    )
    command.add_argument("--top-k", type=int, default=0, help="keep this many likeliest tokens; 0 = all")
    command.add_argument("--max-tokens", type=int, default=256)
    command.add_argument("--seed", type=int, help="for a repeatable text")
    command.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="a GPU where there is one, by default"
    )
    command.set_defaults(run=generate)


def _add_bench(commands: Any) -> None:
    command = commands.add_parser("bench", help="measure speed and memory on this machine, random weights")
    kinds = command.add_subparsers(title="what to measure", required=True, metavar="KIND", dest="kind")
    train = _add_bench_kind(kinds, "train", "training steps of the three stages, teacher included")
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
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks (default: on CUDA)"
    )
    prefill = _add_bench_kind(kinds, "prefill", "reading a prompt, transformers' Qwen2 beside the student")
    prefill.add_argument("--tokens", help="one case of this length, such as 8k or 128k")
    prefill.add_argument("--piece", help="tokens read at a time in that case (default: all at once)")
    prefill.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the student's blocks (default: on CUDA)"
    )
    decode = _add_bench_kind(kinds, "decode", "generating, transformers' Qwen2 beside the student")
    decode.add_argument("--batch", type=int, help="one case of this many sequences")
    decode.add_argument("--tokens", help="length of that case's prompts, such as 512 (default) or 64k")
    for kind in (prefill, decode):
        kind.add_argument("--no-teacher", dest="teacher", action="store_false", help="measure the student alone")
    _add_bench_kind(kinds, "kernels", "the recurrences alone, by every backend that is there")
    command.set_defaults(run=bench)


def _add_bench_kind(kinds: Any, name: str, what: str) -> argparse.ArgumentParser:
    """Options that all kinds of benchmarks share."""
    kind: argparse.ArgumentParser = kinds.add_parser(name, help=what)
    kind.add_argument("--cases", help="comma-separated names, or all (default); unknown names list the known ones")
    kind.add_argument("--shape", help="7b (default on CUDA), tiny (elsewhere), or a Hugging Face folder")
    kind.add_argument("--layers", type=int, help="instead of the shape's own number")
    kind.add_argument("--mixer", default="rad_rwkv7", help="rad_rwkv7 (default) or rad_rwkv6")
    kind.add_argument(
        "--variant",
        default="group_norm",
        choices=["group_norm", "balanced"],
        help="of rad_rwkv7: the released 7B's (default) or the paper's",
    )
    kind.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    kind.add_argument("--json", type=Path, metavar="FILE", help="write the full record, case by case")
    kind.add_argument("--results", type=Path, metavar="FILE", help="bring this file of latest results up to date")
    kind.add_argument("--commit", help="commit to record where the code lies in no checkout")
    kind.set_defaults(checkpointing="auto", compile=None, teacher=True, stage=None, batch=None, tokens=None, piece=None)
    return kind


def _bench_cases(arguments: argparse.Namespace) -> str:
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


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, not {text!r}")
    return key, value


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return str(error).strip()


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    print(f"\n{'held out':12}{'loss':>9}{'KL':>9}{'top-1':>8}{'tokens':>12}{'seconds':>9}")
    for row in ("teacher", "setup", "align", "distill", "extend"):
        values = summary[row]
        cost = f"{values['tokens']:12,}{values['seconds']:9.0f}" if "tokens" in values else ""
        print(f"{row:12}{values['loss']:9.4f}{values['kl']:9.4f}{values['top1']:8.1%}{cost}")
    print(f"\n{summary['gap_closed']:.1%} of the gap between setup and teacher is closed")
    print(f"\n{'':12}{'state in kB at 1k, 8k, 64k tokens':>36}{'ms per token at position 100, 8000':>40}")
    for name in ("teacher", "student"):
        state = " ".join(f"{value / 1000:10,.0f}" for value in summary["bytes"][name].values())
        decode = " ".join(f"{value:8.2f}" for value in summary["decode_ms"][name].values())
        print(f"{name:12}{state:>36}{decode:>40}")
    for name in ("teacher", "student"):
        print(f"\n--- the {name} continues {summary['sample']['prompt']!r}\n{summary['sample'][name]}")
    print(f"\nexport reloads without radlads: logits differ by at most {summary['reload_max_abs_diff']:.1e}")
    print(
        f"{summary['seconds']:.0f} s, at most {summary['peak_rss_gb']:.1f} GB; model: {out}/hf, plots: {out}/report.png"
    )


if __name__ == "__main__":
    sys.exit(main())
