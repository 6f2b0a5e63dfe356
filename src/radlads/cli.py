"""The command line: arguments in, sentences out, exit codes. The only module that prints."""

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from radlads.config.schema import Config

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a benchmark's case or a check failed, 2 the user can mend it
    (one sentence on stderr), 130, 138 or 143 Ctrl-C, SIGUSR1 or SIGTERM
    (docs/reliability.md)."""
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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name alone
            raise
        print(
            "radlads: the GPU's memory is full: give shorter prompts, fewer at a time, or --device cpu", file=sys.stderr
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("radlads: interrupted; start the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def demo(arguments: argparse.Namespace) -> int:
    """Convert a teacher through all stages and print what came of it."""
    from radlads.config.load import load_config
    from radlads.recipes.conversion import BUNDLED_TEACHER, Conversion, run_conversion

    out = arguments.out or Path("out") / ("demo" if arguments.teacher is None else "conversion")
    overrides = dict(_override(text) for text in arguments.set)
    _warn_of_idle_keys(load_config([], overrides))
    conversion = Conversion(
        teacher=arguments.teacher or BUNDLED_TEACHER,
        mixer=arguments.mixer,
        variant=arguments.variant,
        out=out,
        data=arguments.data,
        heldout_data=arguments.heldout_data,
        overrides=overrides,
        retie=arguments.retie,
    )
    summary = run_conversion(conversion, Terminal())
    _print_summary(summary, out)
    return 0


def train(argv: Sequence[str]) -> int:
    """Run one stage from configuration files and overrides."""
    from radlads.config.load import parse_config

    config = parse_config(argv, write=print)
    from radlads.recipes.single_stage import train_stage
    from radlads.train.callbacks import Silent
    from radlads.train.processes import joined

    with joined(config.train) as processes:
        if processes.is_first:
            _warn_of_idle_keys(config)
        result = train_stage(config, Terminal() if processes.is_first else Silent(), processes)
    if not processes.is_first:
        return 0
    print(f"wrote {result.folder} ({result.tokens:,} tokens, {result.seconds:.0f} s)")
    if result.heldout is not None:
        kl = "" if result.heldout.kl is None else f", KL {result.heldout.kl:.4f}, top-1 {result.heldout.top1:.1%}"
        print(f"held-out loss {result.heldout.loss:.4f}{kl}")
    return 0


def config_from_hf(arguments: argparse.Namespace) -> int:
    """Print the model section that has the sizes of a Hugging Face model."""
    from radlads.config.sizes import sizes_from_hf

    print(sizes_from_hf(arguments.folder), end="")
    return 0


def data_info(arguments: argparse.Namespace) -> int:
    """Say what a token corpus holds."""
    from radlads.data.binidx import BinIdxReader
    from radlads.data.inspect_corpus import USUAL_CONTEXTS, describe, length_histogram

    reader = BinIdxReader(arguments.file)
    decode = _decoder(_tokenizer(arguments.tokenizer)[0]) if arguments.tokenizer else None
    print(*describe(reader, USUAL_CONTEXTS, decode), sep="\n")
    histogram = length_histogram(reader)
    widest = max(each.num_documents for each in histogram)
    print("documents by tokens")
    for each in histogram:
        bar = "#" * -(-40 * each.num_documents // widest)
        print(f"{each.first:>12,} to {each.last:>12,} {each.num_documents:>12,} {bar}")
    return 0


def data_build(arguments: argparse.Namespace) -> int:
    """Tokenise a dataset into NAME.bin and NAME.idx, and say what came of it."""
    import signal
    import time

    from radlads.data.binidx import BinIdxReader
    from radlads.data.build import BuiltCorpus, build_binidx
    from radlads.data.datasets_source import open_documents
    from radlads.data.inspect_corpus import describe

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill removes temporary files, as Ctrl-C does
    limits = {"--ctxlen": (arguments.ctxlen, 1), "--processes": (arguments.processes, 1)}
    for option, (value, least) in (limits | {"--max_tokens": (arguments.max_tokens, 2)}).items():
        if value is not None and value < least:
            raise ValueError(f"{option} must be {least} or more, not {value}")
    tokenizer, eos, vocab_size = _tokenizer(arguments.tokenizer)
    source = open_documents(
        arguments.dataset,
        column=arguments.column_name,
        split=arguments.split,
        subset=arguments.subset,
        text_unit=arguments.text_unit,
    )
    terminal, began = Terminal(), time.monotonic()

    def show(so_far: BuiltCorpus) -> None:
        done = max(
            so_far.num_documents / source.num_rows if source.num_rows else 0.0,
            so_far.num_tokens / arguments.max_tokens if arguments.max_tokens else 0.0,
        )
        terminal.progress(_build_progress(so_far.num_documents, so_far.num_tokens, done, time.monotonic() - began))

    stem = _corpus_stem(arguments)
    built = build_binidx(
        source.documents,
        tokenizer,
        stem,
        vocab_size=vocab_size,
        eos_token_id=eos,
        max_tokens=arguments.max_tokens,
        processes=arguments.processes,
        on_progress=show,
    )
    terminal.line(_build_progress(built.num_documents, built.num_tokens, 0.0, time.monotonic() - began))
    print(*describe(BinIdxReader(stem), (arguments.ctxlen,), _decoder(tokenizer)), sep="\n")
    return 0


def data_check(arguments: argparse.Namespace) -> int:
    """Read a built corpus as a whole, and refuse one that its tokenizer cannot have made."""
    from radlads.data.binidx import BinIdxReader
    from radlads.data.inspect_corpus import describe, documents_ending_in
    from radlads.data.loader import check_vocabulary

    tokenizer, eos, vocab_size = _tokenizer(arguments.tokenizer)
    stem = _corpus_stem(arguments)
    reader = BinIdxReader(stem)
    check_vocabulary(reader, vocab_size, f"{stem}.bin")
    print(*describe(reader, (arguments.ctxlen,), _decoder(tokenizer)), sep="\n")
    ended = documents_ending_in(reader, eos)
    if ended < reader.num_documents:
        raise ValueError(
            f"{stem}.bin: {reader.num_documents - ended:,} of {reader.num_documents:,} documents do not end in the "
            f"tokenizer's EOS, {eos}: run fixeos if they end in 0, else build it again"
        )
    return 0


def data_fixeos(arguments: argparse.Namespace) -> int:
    """Replace the token 0 at the end of documents by the tokenizer's EOS."""
    from radlads.data.binidx import BinIdxReader
    from radlads.data.inspect_corpus import replace_trailing

    _, eos, _ = _tokenizer(arguments.tokenizer)
    stem = _corpus_stem(arguments)
    reader = BinIdxReader(stem)
    changed = replace_trailing(reader, old=0, new=eos)
    print(f"{stem}.bin: {changed:,} of {reader.num_documents:,} documents ended in 0 and now end in {eos}")
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt, streaming, or each prompt of a file."""
    from radlads.inference.command import generate_text

    for piece in generate_text(arguments, _notice):
        print(piece, end="", flush=True)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with a model until the end of input."""
    from radlads.inference.chat import converse, line_reader, open_conversation

    conversation = open_conversation(arguments, _notice)
    if sys.stdin.isatty():
        _notice("/reset begins anew, Ctrl-C stops a reply, Ctrl-D ends")
    converse(conversation, line_reader(), lambda text: print(text, end="", flush=True), _notice)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Answer OpenAI clients until Ctrl-C."""
    from radlads.inference.serve import serve as serve_model

    serve_model(arguments, _notice)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Run lm-eval's tasks on models and print their scores side by side."""
    from radlads.evaluation.command import evaluate as evaluate_models
    from radlads.evaluation.command import evaluation_of

    if lines := evaluate_models(evaluation_of(arguments), Terminal()):
        print(*lines, sep="\n")
    return 0


def long_context(arguments: argparse.Namespace) -> int:
    """Measure what a model keeps of long texts and what they cost it."""
    from radlads.evaluation.long_context import RESULTS, long_context_of, measure_long_context

    settings = long_context_of(arguments)
    measure_long_context(settings, Terminal())
    print(f"wrote {settings.out / RESULTS} and its plots")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write a run's page and plots."""
    from radlads.report.page import PLOTS, write_page

    print(f"wrote {write_page(arguments.folder)}, plots in {arguments.folder / PLOTS}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a run's model to publish, or say what llama.cpp makes of it; 1 if llama.cpp cannot run it."""
    from radlads.recipes.export import Export, check_gguf, export_run

    if arguments.check:
        if arguments.out is not None or arguments.push_to_hub is not None:
            raise ValueError("--check writes nothing: leave out OUT and --push-to-hub, or --check")
        can_run, lines = check_gguf(arguments.run_folder, arguments.teacher)
        print(*lines, sep="\n")
        return 0 if can_run else FAILED
    settings = Export(
        run=arguments.run_folder,
        out=arguments.out,
        teacher=arguments.teacher,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        for_llama_cpp=arguments.for_llama_cpp,
        repo=arguments.push_to_hub,
        private=arguments.private,
        dry_run=arguments.dry_run,
    )
    export_run(settings, Terminal())
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
        teacher_precision=arguments.teacher_precision,
        backends=arguments.backends,
        compiled=arguments.compile,
        teacher=arguments.teacher,
        json=arguments.json,
        results=arguments.results,
        commit=arguments.commit,
        command=shlex.join(["radlads", *arguments.argv]),
    )
    return FAILED if run_bench(settings, Terminal()) else 0


def plan(arguments: argparse.Namespace) -> int:
    """Say what memory, hours and money the stages need on a machine."""
    from radlads.planning.command import plan_lines

    print(*plan_lines(arguments), sep="\n")
    return 0


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
    _add_config(commands)
    _add_data(commands)
    _add_generate(commands)
    _add_eval(commands)
    _add_long_context(commands)
    _add_report(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_plan(commands)
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
    command.add_argument(
        "--retie", action="store_true", help="end with the embedding as the head again (teachers whose head is tied)"
    )
    command.set_defaults(run=demo)


def _add_config(commands: Any) -> None:
    command = commands.add_parser("config", help="write configuration files")
    kinds = command.add_subparsers(title="what to write", required=True, metavar="KIND")
    from_hf = kinds.add_parser("from-hf", help="print the sizes of a Hugging Face model, as a file for -c")
    from_hf.add_argument("folder", type=Path, metavar="DIR", help="a folder with a config.json: Qwen2, Qwen3, Llama...")
    from_hf.set_defaults(run=config_from_hf)


def _add_data(commands: Any) -> None:
    command = commands.add_parser("data", help="build, check and describe token corpora")
    kinds = command.add_subparsers(title="what to do", required=True, metavar="KIND")
    info = kinds.add_parser("info", help="documents, tokens, lengths and magic primes of a corpus")
    info.add_argument("file", type=Path, metavar="FILE", help="a .bin/.idx pair, with or without the extension")
    info.add_argument("--tokenizer", help="folder or hub name, to show the first and last document as text")
    info.set_defaults(run=data_info)
    for name, run, what in (
        ("build", data_build, "tokenise a dataset into NAME.bin and NAME.idx"),
        ("check", data_check, "read a built corpus as a whole"),
        ("fixeos", data_fixeos, "replace a trailing token 0 by the tokenizer's EOS in every document"),
    ):
        kind = kinds.add_parser(name, help=what)
        add_corpus_options(kind)
        kind.set_defaults(run=run)


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads data build`, `check` and `fixeos`, for a command of another name."""
    parser.add_argument("--dataset", required=True, help="a jsonl, csv, parquet or text file, a folder, or a hub name")
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json, or a hub name")
    parser.add_argument("--ctxlen", type=int, default=512, help="tokens a sample, for the magic prime (default 512)")
    parser.add_argument("--column_name", default="text", help="where the dataset's text is (default text)")
    parser.add_argument("--max_tokens", type=int, help="stop there, cutting the last document short")
    parser.add_argument("--out", type=Path, help="the corpus, without extension (default: the dataset's name, here)")
    parser.add_argument("--split", default="train", help="of a dataset that has several (default train)")
    parser.add_argument("--subset", help="the configuration of a hub dataset that has several")
    parser.add_argument("--processes", type=int, default=1, help="that tokenise (default 1, with tokenizers' threads)")
    parser.add_argument(
        "--text_unit",
        default="document",
        choices=["document", "paragraph", "line"],
        help="what of a plain text file is one document (default: all of it)",
    )


def _add_generate(commands: Any) -> None:
    from radlads.inference.options import add_chat_options, add_generate_options, add_serve_options

    command = commands.add_parser("generate", help="continue a prompt with a converted model")
    add_generate_options(command)
    command.set_defaults(run=generate)
    command = commands.add_parser("chat", help="talk with a converted model that has a chat template")
    add_chat_options(command)
    command.set_defaults(run=chat)
    command = commands.add_parser("serve", help="answer OpenAI clients with a converted model")
    add_serve_options(command)
    command.set_defaults(run=serve)


def _add_eval(commands: Any) -> None:
    from radlads.evaluation.command import add_options

    command = commands.add_parser("eval", help="score models on lm-eval's tasks, beside their teacher")
    add_options(command)
    command.set_defaults(run=evaluate)


def _add_long_context(commands: Any) -> None:
    from radlads.evaluation.long_context import add_options

    command = commands.add_parser("longcontext", help="what a model keeps of long texts, and what they cost it")
    add_options(command)
    command.set_defaults(run=long_context)


def _add_report(commands: Any) -> None:
    command = commands.add_parser("report", help="one page on a conversion, with plots: RUN/report.html")
    command.add_argument("folder", type=Path, metavar="RUN", help="a conversion's folder, or one of stage folders")
    command.set_defaults(run=report)


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="write a finished model as a folder to publish, and upload it")
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a conversion's folder, a stage's, or a model's")
    command.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder to write; without it RUN is uploaded")
    command.add_argument("--teacher", metavar="DIR", help="whose tokenizer the model gets, where RUN does not say")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: RUN's)")
    command.add_argument("--shard-size", default="5GB", help="largest file of weights, such as 5GB (default) or 500MB")
    command.add_argument("--check", choices=["gguf"], help="write nothing; say whether llama.cpp can run the model")
    command.add_argument("--for-llama-cpp", action="store_true", help="write what llama.cpp's converter reads")
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload to the Hugging Face hub")
    command.add_argument("--private", action="store_true", help="make the repository a private one, if it is new")
    command.add_argument("--dry-run", action="store_true", help="list what would be uploaded instead")
    command.set_defaults(run=export)


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
        "--teacher-precision",
        default="same",
        choices=["same", "fp8"],
        help="fp8: the frozen teacher's matrices in 8 bits (Hopper and newer)",
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
    kernels = _add_bench_kind(kinds, "kernels", "the recurrences alone, by every backend that is there")
    kernels.add_argument(
        "--backends", help="comma-separated, of triton, fla (which tunes itself for minutes) and chunked (default: all)"
    )
    command.set_defaults(run=bench)


def _add_plan(commands: Any) -> None:
    from radlads.planning.command import add_options

    command = commands.add_parser("plan", help="memory, hours and cost of the stages on a machine, before renting it")
    add_options(command)
    command.set_defaults(run=plan)


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
    kind.set_defaults(checkpointing="auto", teacher_precision="same", compile=None, teacher=True)
    kind.set_defaults(stage=None, batch=None, tokens=None, piece=None, backends=None)
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


def _warn_of_idle_keys(config: "Config") -> None:
    from radlads.config.schema import without_effect

    if keys := without_effect(config):
        print(f"radlads: warning: no effect here: {', '.join(keys)}", file=sys.stderr)


def _tokenizer(path_or_name: str) -> "tuple[Tokenizer, int, int]":
    """A tokenizer, the id that ends its documents, and how many ids there are; of a hub name no weights are fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from radlads.convert.hf_source import end_of_text_id, load_tokenizer

    folder = Path(path_or_name).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path_or_name, allow_patterns=["*.json"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{path_or_name} is neither a folder nor a tokenizer that the hub hands out: {reason}"
            ) from error
    tokenizer = load_tokenizer(folder, 2**31)
    eos = end_of_text_id(folder, tokenizer)
    return tokenizer, eos, max(eos, *tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _decoder(tokenizer: "Tokenizer") -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def _corpus_stem(arguments: argparse.Namespace) -> Path:
    """--out, or the dataset's name less its suffixes, in the working folder."""
    return arguments.out or Path(Path(arguments.dataset).expanduser().resolve().name.split(".")[0])


def _build_progress(num_documents: int, num_tokens: int, done: float, seconds: float) -> str:
    """`done`: the share of the work that lies behind, 0 if it is not known."""
    text = f"{num_documents:,} documents ({num_documents / seconds:,.0f}/s), "
    text += f"{num_tokens:,} tokens ({num_tokens / seconds:,.0f}/s)"
    left_s = seconds / done - seconds if 0 < done <= 1 else None
    return text if left_s is None else f"{text}, {left_s // 60:.0f} min {left_s % 60:.0f} s left"


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, not {text!r}")
    return key, value


def _notice(text: str) -> None:
    print(f"radlads: {text}", file=sys.stderr, flush=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return str(error).strip()


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    print(f"\n{'held out':12}{'loss':>9}{'KL':>9}{'top-1':>8}{'tokens':>12}{'seconds':>9}")
    for row in ("teacher", "setup", "align", "distill", "extend", *(["retied"] if "retied" in summary else [])):
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
    print(f"{summary['seconds']:.0f} s, at most {summary['peak_rss_gb']:.1f} GB")
    print(f"model: {out}/hf, report: {out}/report.html")


if __name__ == "__main__":
    sys.exit(main())
