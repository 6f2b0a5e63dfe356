"""The commands: each runs what its arguments ask for, prints what came of it, and returns its exit code."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from radlads.cli.exit_codes import FAILED, USER_ERROR
from radlads.cli.mixer_path import find_mixers_in, mixer_path_option
from radlads.cli.terminal import Terminal, notice, print_lines

if TYPE_CHECKING:
    from radlads.config.schema import Config
    from radlads.data.build_chat import Renderer
    from radlads.data.command import CorpusTokenizer


def demo(arguments: argparse.Namespace) -> int:
    """Convert a teacher through all stages and print what came of it."""
    from radlads.config.load import load_config
    from radlads.recipes.command import conversion_of, overrides_of, summary_lines
    from radlads.recipes.comparison import comparison_lines, run_comparison
    from radlads.recipes.conversion import run_conversion

    _warn_of_idle_keys(load_config([], overrides_of(arguments)))
    conversion = conversion_of(arguments)
    if arguments.compare:
        summaries = run_comparison(conversion, Terminal())
        print(*summary_lines(summaries["window"], conversion.out), *comparison_lines(summaries), sep="\n")
    else:
        print(*summary_lines(run_conversion(conversion, Terminal()), conversion.out), sep="\n")
    return 0


def train(argv: Sequence[str]) -> int:
    """Run one stage from configuration files and overrides."""
    from radlads.config.load import parse_config

    own, argv = mixer_path_option().parse_known_args(argv)
    config = parse_config(argv, write=print)
    find_mixers_in(own.mixer_path)
    from radlads.console import Silent
    from radlads.recipes.single_stage import train_stage
    from radlads.train.processes.joining import joined

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

    return print_lines(info_lines(arguments, _corpus_tokenizer))


def data_build(arguments: argparse.Namespace) -> int:
    """Tokenise a dataset into NAME.bin and NAME.idx, or conversations with a mask, and say what came of it."""
    from radlads.data.command import build_lines, chat_lines

    if arguments.skip_faulty and not arguments.chat:
        raise ValueError("--skip_faulty is for conversations: give it with --chat")
    if arguments.chat:
        return print_lines(chat_lines(arguments, _renderer, Terminal()))
    return print_lines(build_lines(arguments, _corpus_tokenizer, Terminal()))


def data_write(arguments: argparse.Namespace) -> int:
    """Have a teacher answer prompts, and write its conversations as a corpus with a mask."""
    from radlads.inference.writing.command import write_lines

    return print_lines(write_lines(arguments, Terminal()))


def data_check(arguments: argparse.Namespace) -> int:
    """Read a built corpus as a whole, and refuse one that its tokenizer cannot have made."""
    from radlads.data.command import check_lines

    return print_lines(check_lines(arguments, _corpus_tokenizer))


def data_fixeos(arguments: argparse.Namespace) -> int:
    """Replace the token 0 at the end of documents by the tokenizer's EOS."""
    from radlads.data.command import fixeos_lines

    return print_lines(fixeos_lines(arguments, _corpus_tokenizer))


def generate(arguments: argparse.Namespace) -> int:
    """Continue a prompt, streaming, or each prompt of a file."""
    from radlads.inference.command import generate_text

    for piece in generate_text(arguments, notice):
        print(piece, end="", flush=True)
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """Talk with a model until the end of input; 2 if a piped message could not be answered."""
    from radlads.inference.chat import converse, line_reader, open_conversation

    conversation = open_conversation(arguments, notice)
    is_typed = sys.stdin.isatty()
    if is_typed:
        notice("/reset begins anew, Ctrl-C stops a reply, Ctrl-D ends")
    num_refused = converse(conversation, line_reader(), lambda text: print(text, end="", flush=True), notice)
    return USER_ERROR if num_refused and not is_typed else 0


def serve(arguments: argparse.Namespace) -> int:
    """Answer OpenAI clients until Ctrl-C."""
    from radlads.inference.serve import serve as serve_model

    serve_model(arguments, notice)
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
    from radlads.evaluation.long_context import measure_long_context
    from radlads.evaluation.long_context_options import RESULTS, long_context_of

    settings = long_context_of(arguments)
    measure_long_context(settings, Terminal())
    print(f"wrote {settings.out / RESULTS} and its plots")
    return 0


def select(arguments: argparse.Namespace) -> int:
    """Find the layers worth keeping as softmax."""
    from radlads.console import Silent
    from radlads.recipes.selecting import select_layers, sharing
    from radlads.selection.command import select_of

    request = select_of(arguments)
    with sharing(request) as processes:
        return print_lines(select_layers(request, Terminal() if processes.is_first else Silent(), processes))


def report(arguments: argparse.Namespace) -> int:
    """Write a run's page and plots."""
    from radlads.report.page import PLOTS, write_page

    print(f"wrote {write_page(arguments.folder)}, plots in {arguments.folder / PLOTS}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a run's model to publish, or say what llama.cpp or vLLM makes of it; 1 if that cannot run it."""
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

    return print_lines(plan_lines(arguments))


def mixers(arguments: argparse.Namespace) -> int:
    """List the time mixers that are found, or say what one of them says about itself."""
    from radlads.convert.command import mixer_lines

    return print_lines(mixer_lines(arguments))


def _warn_of_idle_keys(config: "Config") -> None:
    from radlads.config.schema import without_effect

    if keys := without_effect(config):
        print(f"radlads: warning: no effect here: {', '.join(keys)}", file=sys.stderr)


def _renderer(path_or_name: str) -> "Renderer":
    """The chat template in a folder or of a hub name, of which no weights are fetched."""
    from radlads.checkpoint.tokenizer_files import locate_tokenizer
    from radlads.inference.chat_template import ChatTemplate

    return ChatTemplate(locate_tokenizer(path_or_name), 2**31)


def _corpus_tokenizer(path_or_name: str) -> "CorpusTokenizer":
    """The tokenizer in a folder or of a hub name, of which no weights are fetched."""
    from radlads.checkpoint.tokenizer_files import locate_tokenizer, num_ids
    from radlads.convert.hf_source import end_of_text_id, load_tokenizer
    from radlads.data.command import CorpusTokenizer

    folder = locate_tokenizer(path_or_name)
    tokenizer = load_tokenizer(folder, 2**31)
    eos = end_of_text_id(folder, tokenizer)
    return CorpusTokenizer(tokenizer, eos, max(eos + 1, num_ids(tokenizer)))
