"""The command line: arguments in, sentences out, exit codes. The only package that prints."""

from radlads.cli.entry import main
from radlads.cli.exit_codes import FAILED, INTERRUPTED, USER_ERROR

__all__ = ["FAILED", "INTERRUPTED", "USER_ERROR", "main"]
