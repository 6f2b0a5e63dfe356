#!/usr/bin/env python3
"""Build a token corpus (.bin and .idx) from a dataset, check one, or mend the ends of its documents."""

import argparse
import sys

from radlads.cli import main as radlads
from radlads.data.command import add_corpus_options


def main(argv: list[str]) -> int:
    action = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    action.add_argument("--action", choices=["build", "check", "fixeos"], default="build", help="(default build)")
    parser = argparse.ArgumentParser(description=__doc__, parents=[action], allow_abbrev=False)
    add_corpus_options(parser)
    parser.parse_args(argv)
    chosen, options = action.parse_known_args(argv)
    return radlads(["data", chosen.action, *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
