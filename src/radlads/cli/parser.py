"""All commands and their options, put together; each package's options are in its command.py."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from radlads.cli import commands
from radlads.cli.mixer_path import mixer_path_option

# The commands, beside train and bench, to which any mixer may be named, by an option or a config.json
_LOADING = ("demo", "generate", "chat", "serve", "eval", "longcontext", "select", "report", "export", "plan", "mixers")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` is what runs one. Of train only the name: configuration reads its options."""
    from radlads.bench.command import add_options as add_bench_options
    from radlads.convert.command import add_options as add_mixers_options
    from radlads.evaluation.command import add_options as add_eval_options
    from radlads.evaluation.long_context_options import add_options as add_long_context_options
    from radlads.inference.options import add_chat_options, add_generate_options, add_serve_options
    from radlads.planning.command import add_options as add_plan_options
    from radlads.recipes.command import add_demo_options, add_export_options, add_verify_options
    from radlads.selection.command import add_options as add_select_options

    parser = argparse.ArgumentParser(
        prog="radlads", description="Turn softmax transformers into linear-attention decoders."
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add = partial(_add, subparsers)
    add(
        "demo",
        commands.demo,
        add_demo_options,
        "convert a teacher (the bundled one by default) end to end and show the result",
    )
    subparsers.add_parser(
        "train", help="run one stage: -c FILE ... --train.KEY VALUE (radlads train --help)", add_help=False
    )
    _add_config(subparsers)
    _add_data(subparsers)
    add("generate", commands.generate, add_generate_options, "continue a prompt with a converted model")
    add("chat", commands.chat, add_chat_options, "talk with a converted model that has a chat template")
    add("serve", commands.serve, add_serve_options, "answer OpenAI clients with a converted model")
    add("eval", commands.evaluate, add_eval_options, "score models on lm-eval's tasks, beside their teacher")
    what = "what a model keeps of long texts, and what they cost it"
    add("longcontext", commands.long_context, add_long_context_options, what)
    add("select", commands.select, add_select_options, "which layers to keep as softmax, by swapping them back in")
    add("report", commands.report, _add_report_options, "one page on a conversion, with plots: RUN/report.html")
    add("export", commands.export, add_export_options, "write a finished model as a folder to publish, and upload it")
    what = "whether models and corpora are still what the hashes beside them say"
    add("verify", commands.verify, add_verify_options, what)
    add("bench", commands.bench, add_bench_options, "measure speed and memory on this machine, random weights")
    add("plan", commands.plan, add_plan_options, "memory, hours and cost of the stages on a machine, before renting it")
    add("mixers", commands.mixers, add_mixers_options, "the time mixers there are, or one of them and its settings")
    return parser


def _add(
    subparsers: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    add_options: Callable[[argparse.ArgumentParser], None],
    what: str,
) -> None:
    command = subparsers.add_parser(name, help=what, parents=[mixer_path_option()] if name in _LOADING else [])
    add_options(command)
    command.set_defaults(run=run)


def _add_config(subparsers: Any) -> None:
    command = subparsers.add_parser("config", help="write configuration files")
    kinds = command.add_subparsers(title="what to write", required=True, metavar="KIND")
    what = "print the sizes of a Hugging Face model, as a file for -c"
    _add(kinds, "from-hf", commands.config_from_hf, _add_config_options, what)


def _add_data(subparsers: Any) -> None:
    from radlads.data.command import add_build_options, add_corpus_options, add_info_options
    from radlads.inference.options import add_write_options

    command = subparsers.add_parser("data", help="build, check and describe token corpora")
    kinds = command.add_subparsers(title="what to do", required=True, metavar="KIND")
    add = partial(_add, kinds)
    add("info", commands.data_info, add_info_options, "documents, tokens, lengths and magic primes of a corpus")
    add("build", commands.data_build, add_build_options, "tokenise a dataset into NAME.bin and NAME.idx")
    add(
        "write", commands.data_write, add_write_options, "have a teacher answer prompts, as conversations to learn from"
    )
    add("check", commands.data_check, add_corpus_options, "read a built corpus as a whole")
    what = "replace a trailing token 0 by the tokenizer's EOS in every document"
    add("fixeos", commands.data_fixeos, add_corpus_options, what)


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder with a config.json: Qwen2, Qwen3, Llama...")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="a conversion's folder, or one of stage folders")
