"""Options of the commands that generate text. Imports neither torch nor transformers: help is quick."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radlads.inference.sampling import Sampling


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads generate`."""
    parser.add_argument("folder", type=Path, help="a model folder that radlads exported")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text that is one prompt; - is stdin")
    prompt.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='one prompt on each line, or in a .jsonl file objects with "prompt"; answers with JSON lines',
    )
    parser.add_argument("--batch-size", type=int, default=8, help="of --prompts, at a time (default 8)")
    parser.add_argument(
        "--save-state",
        type=Path,
        metavar="FILE",
        help="write the state after the prompt, to go on from later; --max-tokens 0 does nothing else",
    )
    parser.add_argument(
        "--load-state", type=Path, metavar="FILE", help="go on from such a state; a prompt is read after it, if given"
    )
    _add_sampling_options(parser, max_tokens=256)
    _add_loading_options(parser)


def add_write_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads data write`."""
    parser.add_argument(
        "--teacher", required=True, help="an instruct model: a folder, a hub name, a GGUF file, smollm2"
    )
    parser.add_argument("--out", type=Path, required=True, help="the corpus, without extension, such as data/chat")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='one prompt on each line, or in .jsonl objects with "prompt" or "messages" (default: our own 1,800)',
    )
    parser.add_argument("--max-prompts", type=int, metavar="N", help="take the first N prompts (default: all)")
    parser.add_argument("--answers", type=int, default=1, metavar="N", help="to each prompt (default 1)")
    parser.add_argument("--system", metavar="TEXT", help="what the teacher is told first, where a prompt does not say")
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="replies at a time (default 16 on a CPU, 1,024 on a GPU)"
    )
    _add_sampling_options(parser, max_tokens=512, temperature=1.0, top_p=1.0, seed=0)
    _add_device_option(parser)


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads chat`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model folder with a chat template")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    _add_sampling_options(parser, max_tokens=1024)
    _add_loading_options(parser)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads serve`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model folder that radlads exported")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="to listen on (default 8000; 0 = any free one)")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=1_000_000,
        help="refuse longer prompts (default 1000000; a model without softmax layers has no limit of its own)",
    )
    parser.add_argument("--max-tokens", type=int, default=32768, help="refuse longer answers (default 32768 tokens)")
    parser.add_argument(
        "--max-concurrent",
        type=int,
        metavar="N",
        help="answer as many requests at the same time (default 16 on a CPU, 32 on a GPU, fewer if memory is short)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="have as many more wait, and answer 503 beyond them (default 256)",
    )
    parser.add_argument(
        "--prefill-piece",
        type=int,
        metavar="TOKENS",
        help="of prompts, to read between two steps of the other answers (default 128 on a CPU, 512 on a GPU)",
    )
    parser.add_argument(
        "--state-memory",
        type=float,
        metavar="GB",
        help="for the states of all requests (default: half of the memory that is free at the start)",
    )
    parser.add_argument(
        "--grace-seconds",
        type=float,
        default=20,
        metavar="S",
        help="after Ctrl-C or SIGTERM, for requests to be answered (default 20); a second signal ends it within 3",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients may call this server by, beside localhost and --host; * is any; may be repeated",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="have clients send it (or set RADLADS_API_KEY); /health needs none"
    )
    _add_loading_options(parser)


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    """How tokens are chosen by the options of generate and chat. Raises ValueError for values out of range."""
    from radlads.inference.sampling import Sampling

    return Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
    )


def _add_sampling_options(
    parser: argparse.ArgumentParser,
    *,
    max_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
) -> None:
    what = f"0 = always the likeliest token (default {temperature:g})"
    parser.add_argument("--temperature", type=float, default=temperature, help=what)
    what = f"keep the likeliest tokens of this total probability (default {top_p:g})"
    parser.add_argument("--top-p", type=float, default=top_p, help=what)
    parser.add_argument("--top-k", type=int, default=0, help="keep this many likeliest tokens; 0 = all")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"at most (default {max_tokens})")
    parser.add_argument("--seed", type=int, default=seed, help="for a repeatable text")


def _add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="a GPU where there is one, by default"
    )


def _add_loading_options(parser: argparse.ArgumentParser) -> None:
    _add_device_option(parser)
    parser.add_argument(
        "--verify", action="store_true", help="compare every byte of the model with the hashes beside it"
    )
