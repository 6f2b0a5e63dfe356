"""A corpus's checksums: written with it, compared when it is read as a whole, gone before it becomes another."""

from pathlib import Path

from radlads.checksums import checksums_of, corpus_record, differences, write_checksums
from radlads.data.binidx import corpus_files
from radlads.data.mask import mask_file


def record_checksums(path_stem: Path) -> None:
    """Write NAME.checksums.json: hashes and sizes of NAME.bin and NAME.idx, and of NAME.mask if there is one."""
    masks = [path for path in (mask_file(path_stem),) if path.is_file()]
    write_checksums(corpus_record(path_stem), checksums_of([*corpus_files(path_stem), *masks]))


def forget_checksums(path_stem: Path) -> bool:
    """Remove a corpus's checksums; whether there were any."""
    had = corpus_record(path_stem).is_file()
    corpus_record(path_stem).unlink(missing_ok=True)
    return had


def check_checksums(path_stem: Path) -> None:
    """Read a corpus that has checksums as a whole. Raises ValueError if a file is not the one they describe."""
    record = corpus_record(path_stem)
    for difference in differences(record) if record.is_file() else ():
        raise ValueError(f"{difference}: copy or build the corpus again")
