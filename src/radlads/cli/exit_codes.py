"""How a command ends: 0 it is done, or one of these. 138 and 143 are SIGUSR1's and SIGTERM's (docs/reliability.md)."""

FAILED = 1
"""A benchmark's case or a check failed."""
USER_ERROR = 2
"""The user can mend it; one sentence on stderr says how."""
INTERRUPTED = 130
"""Ctrl-C."""
