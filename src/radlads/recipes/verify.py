"""`radlads verify`: whether files are still what the hashes beside them say. Leaves the format to checksums.py."""

import os
from collections.abc import Iterator
from pathlib import Path

from radlads.checkpoint.manifest import MANIFEST
from radlads.checksums import CHECKSUMS, corpus_record, differences, read_checksums
from radlads.console import Console
from radlads.data.binidx import corpus_files, corpus_stem


def verify(path: Path, console: Console) -> bool:
    """Compare all that has hashes in a folder and below it, or a corpus, and say what is another. Whether nothing is.

    Raises ValueError if there is no such folder or corpus, or if nothing in it has hashes.
    """
    records = list(_records(path))
    if not records:
        raise ValueError(
            f"{path} has no hashes to compare with ({MANIFEST}, {CHECKSUMS}): it is older than they are, or not ours"
        )
    different = [record for record in records if not _is_as_recorded(record, console)]
    return not different


def _records(path: Path) -> Iterator[Path]:
    """A corpus's record, by its name or by one of its files; in a folder all there are, in order."""
    stem = corpus_stem(path)
    if corpus_record(stem).is_file():
        yield corpus_record(stem)
    elif not path.exists() and not corpus_files(stem)[0].is_file():
        raise ValueError(f"{path} does not exist: name a folder, or a corpus by its .bin file")
    for where, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(where) / name for name in sorted(names) if name == MANIFEST or name.endswith(CHECKSUMS))


def _is_as_recorded(record: Path, console: Console) -> bool:
    try:
        folder, hashes, _ = read_checksums(record)
    except ValueError as damage:
        console.line(str(damage))
        return False
    if not folder.is_dir():
        console.line(f"{folder} is not there, so that nothing is compared with {record}")
        return True
    console.progress(f"reading what {record} describes ...")
    found = list(differences(record))
    for difference in found:
        console.line(difference)
    if not found:
        console.line(f"{record}: all {len(hashes)} files are as described")
    return not found
