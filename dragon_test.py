#!/usr/bin/env python3
"""Have a model continue the dragon prompt, streamed: a first look at whether it writes sense."""

import argparse
import sys

from radlads.cli import main as radlads

PROMPT = (
    "\nIn a shocking finding, scientist discovered a herd of dragons living in a remote, previously unexplored valley, "
    "in Tibet. Even more surprising to the researchers was the fact that the dragons spoke perfect Chinese."
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a model folder with tokenizer files")
    parser.add_argument("options", metavar="OPTION", nargs=argparse.REMAINDER, help="those of `radlads generate`")
    arguments = parser.parse_args(argv)
    print(PROMPT, end="", flush=True)
    return radlads(["generate", arguments.folder, "--prompt", PROMPT, *arguments.options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
