"""From the words of a command to its exit code: every error becomes a sentence on stderr."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from radlads.cli.commands import train
from radlads.cli.exit_codes import INTERRUPTED, USER_ERROR
from radlads.cli.mixer_path import find_mixers_in
from radlads.cli.parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (exit_codes.py)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if command == "train":
            return train(rest)
        arguments = build_parser().parse_args(argv or ["--help"])
        arguments.argv = argv
        find_mixers_in(vars(arguments).get("mixer_path"))
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


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return str(error).strip()
