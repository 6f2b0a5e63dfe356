"""Mixers that are not part of radlads, in an exported folder: `radlads export` writes this file anew there.

In the package there are none: a mixer of one's own is found on the import path (registry.py). Functions, not tables:
the files that they import may import anything here, also what is not loaded yet when this file is.
"""


def time_mixers() -> dict[str, type]:
    """Time mixers by name."""
    return {}


def channel_mixers() -> dict[str, type]:
    """Channel mixers by name."""
    return {}
