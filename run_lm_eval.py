#!/usr/bin/env python3
"""lm-eval's tasks on converted models: `python3 run_lm_eval.py DIR --tasks ...`, the same as `radlads eval`."""

import sys

from radlads.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
