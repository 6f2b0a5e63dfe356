"""Mixers that are not part of radlads, in an exported folder: `radlads export` writes this file anew there.

In the package both tables are empty: a mixer of one's own is found on the import path (registry.py).
"""

TIME_MIXERS: dict[str, type] = {}
CHANNEL_MIXERS: dict[str, type] = {}
