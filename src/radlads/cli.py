"""The command line: arguments in, sentences out, exit codes. The only module that prints."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radlads.config.schema import Config
    from radlads.data.command import CorpusTokenizer

FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
# The commands, beside train and bench, that any mixer may be named to, by an option or by a model's config.json
_LOADING = ("demo", "generate", "chat", "serve", "eval", "longcontext", "report", "export", "plan", "mixers")


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
        _find_mixers_in(vars(arguments).get("mixer_path"))
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
    from radlads.recipes.command import conversion_of, overrides_of, summary_lines
    from radlads.recipes.conversion import run_conversion

    _warn_of_idle_keys(load_config([], overrides_of(arguments)))
    conversion = conversion_of(arguments)
    print(*summary_lines(run_conversion(conversion, Terminal()), conversion.out), sep="\n")
    return 0


def train(argv: Sequence[str]) -> int:
    """Run one stage from configuration files and overrides."""
    from radlads.config.load import parse_config

    own, argv = _mixer_path_option().parse_known_args(argv)
    config = parse_config(argv, write=print)
    _find_mixers_in(own.mixer_path)
    from radlads.console import Silent
    from radlads.recipes.single_stage import train_stage
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
    from radlads.data.command import info_lines

    return _print(info_lines(arguments, _corpus_tokenizer))


def data_build(arguments: argparse.Namespace) -> int:
    """Tokenise a dataset into NAME.bin and NAME.idx, and say what came of it."""
    from radlads.data.command import build_lines

    return _print(build_lines(arguments, _corpus_tokenizer, Terminal()))


def data_check(arguments: argparse.Namespace) -> int:
    """Read a built corpus as a whole, and refuse one that its tokenizer cannot have made."""
    from radlads.data.command import check_lines

    return _print(check_lines(arguments, _corpus_tokenizer))


def data_fixeos(arguments: argparse.Namespace) -> int:
    """Replace the token 0 at the end of documents by the tokenizer's EOS."""
    from radlads.data.command import fixeos_lines

    return _print(fixeos_lines(arguments, _corpus_tokenizer))


def generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt, streaming, or each prompt of a file."""
    from radlads.inference.command import generate_text

    for piece in generate_text(arguments, _notice):
        print(piece, end="", flush=True)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with a model until the end of input; 2 if a piped message could not be answered."""
    from radlads.inference.chat import converse, line_reader, open_conversation

    conversation = open_conversation(arguments, _notice)
    is_typed = sys.stdin.isatty()
    if is_typed:
        _notice("/reset begins anew, Ctrl-C stops a reply, Ctrl-D ends")
    num_refused = converse(conversation, line_reader(), lambda text: print(text, end="", flush=True), _notice)
    return USER_ERROR if num_refused and not is_typed else 0


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
    from radlads.recipes.command import check_lines, export_of
    from radlads.recipes.export import export_run

    if arguments.check:
        can_run, lines = check_lines(arguments)
        print(*lines, sep="\n")
        return 0 if can_run else FAILED
    export_run(export_of(arguments), Terminal())
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare files with the hashes beside them, and say what differs; 1 if something does."""
    from radlads.recipes.verify import verify as verify_files

    return 0 if verify_files(arguments.path, Terminal()) else FAILED


def bench(arguments: argparse.Namespace) -> int:
    """Measure speed and memory on this machine; 1 if a case failed."""
    from radlads.bench.command import bench_of
    from radlads.bench.run import run_bench

    return FAILED if run_bench(bench_of(arguments, arguments.argv), Terminal()) else 0


def plan(arguments: argparse.Namespace) -> int:
    """Say what memory, hours and money the stages need on a machine."""
    from radlads.planning.command import plan_lines

    return _print(plan_lines(arguments))


def mixers(arguments: argparse.Namespace) -> int:
    """List the time mixers that are found, or say what one of them says about itself."""
    from radlads.convert.command import mixer_lines

    return _print(mixer_lines(arguments))


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
    from radlads.bench.command import add_options as add_bench_options
    from radlads.convert.command import add_options as add_mixers_options
    from radlads.evaluation.command import add_options as add_eval_options
    from radlads.evaluation.long_context import add_options as add_long_context_options
    from radlads.inference.options import add_chat_options, add_generate_options, add_serve_options
    from radlads.planning.command import add_options as add_plan_options
    from radlads.recipes.command import add_demo_options, add_export_options, add_verify_options

    parser = argparse.ArgumentParser(
        prog="radlads", description="Turn softmax transformers into linear-attention decoders."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = partial(_add, commands)
    add("demo", demo, add_demo_options, "convert a teacher (the bundled one by default) end to end and show the result")
    commands.add_parser(
        "train", help="run one stage: -c FILE ... --train.KEY VALUE (radlads train --help)", add_help=False
    )
    _add_config(commands)
    _add_data(commands)
    add("generate", generate, add_generate_options, "continue a prompt with a converted model")
    add("chat", chat, add_chat_options, "talk with a converted model that has a chat template")
    add("serve", serve, add_serve_options, "answer OpenAI clients with a converted model")
    add("eval", evaluate, add_eval_options, "score models on lm-eval's tasks, beside their teacher")
    what = "what a model keeps of long texts, and what they cost it"
    add("longcontext", long_context, add_long_context_options, what)
    add("report", report, _add_report_options, "one page on a conversion, with plots: RUN/report.html")
    add("export", export, add_export_options, "write a finished model as a folder to publish, and upload it")
    what = "whether models and corpora are still what the hashes beside them say"
    add("verify", verify, add_verify_options, what)
    add("bench", bench, add_bench_options, "measure speed and memory on this machine, random weights")
    add("plan", plan, add_plan_options, "memory, hours and cost of the stages on a machine, before renting it")
    add("mixers", mixers, add_mixers_options, "the time mixers there are, or one of them and its settings")
    return parser


def _mixer_path_option() -> argparse.ArgumentParser:
    """The option of all commands that load a model whose config.json may name mixers of the user's own."""
    parser = argparse.ArgumentParser(prog="radlads", add_help=False, allow_abbrev=False)
    what = "where mixers of your own are, in DIR/tmix and DIR/cmix (default: the import path)"
    parser.add_argument("--mixer-path", type=Path, metavar="DIR", help=what)
    return parser


def _find_mixers_in(folder: Path | None) -> None:
    if folder is None:
        return
    from radlads.model.registry import add_mixer_path

    add_mixer_path(folder)


def _add(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    add_options: Callable[[argparse.ArgumentParser], None],
    what: str,
) -> None:
    command = commands.add_parser(name, help=what, parents=[_mixer_path_option()] if name in _LOADING else [])
    add_options(command)
    command.set_defaults(run=run)


def _add_config(commands: Any) -> None:
    command = commands.add_parser("config", help="write configuration files")
    kinds = command.add_subparsers(title="what to write", required=True, metavar="KIND")
    what = "print the sizes of a Hugging Face model, as a file for -c"
    _add(kinds, "from-hf", config_from_hf, _add_config_options, what)


def _add_data(commands: Any) -> None:
    from radlads.data.command import add_corpus_options, add_info_options

    command = commands.add_parser("data", help="build, check and describe token corpora")
    kinds = command.add_subparsers(title="what to do", required=True, metavar="KIND")
    add = partial(_add, kinds)
    add("info", data_info, add_info_options, "documents, tokens, lengths and magic primes of a corpus")
    add("build", data_build, add_corpus_options, "tokenise a dataset into NAME.bin and NAME.idx")
    add("check", data_check, add_corpus_options, "read a built corpus as a whole")
    what = "replace a trailing token 0 by the tokenizer's EOS in every document"
    add("fixeos", data_fixeos, add_corpus_options, what)


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder with a config.json: Qwen2, Qwen3, Llama...")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a conversion's folder, or one of stage folders")


def _warn_of_idle_keys(config: "Config") -> None:
    from radlads.config.schema import without_effect

    if keys := without_effect(config):
        print(f"radlads: warning: no effect here: {', '.join(keys)}", file=sys.stderr)


def _corpus_tokenizer(path_or_name: str) -> "CorpusTokenizer":
    """The tokenizer in a folder or of a hub name, of which no weights are fetched."""
    from radlads.checkpoint.tokenizer_files import locate_tokenizer, num_ids
    from radlads.convert.hf_source import end_of_text_id, load_tokenizer
    from radlads.data.command import CorpusTokenizer

    folder = locate_tokenizer(path_or_name)
    tokenizer = load_tokenizer(folder, 2**31)
    eos = end_of_text_id(folder, tokenizer)
    return CorpusTokenizer(tokenizer, eos, max(eos + 1, num_ids(tokenizer)))


def _print(lines: Iterable[str]) -> int:
    for line in lines:
        print(line)
    return 0


def _notice(text: str) -> None:
    print(f"radlads: {text}", file=sys.stderr, flush=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return str(error).strip()


if __name__ == "__main__":
    sys.exit(main())
