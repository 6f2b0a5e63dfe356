"""What a conversion's teacher was when it began: OUT/teacher.checksums.json, by which a later change is noticed."""

from pathlib import Path
from typing import Any

from radlads.checkpoint.tokenizer_files import TOKENIZER_FILES
from radlads.checksums import CHECKSUMS, checksums_of, differences, write_checksums

RECORD = f"teacher.{CHECKSUMS}"
_READ = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)


def teacher_checksums(folder: Path) -> dict[str, Any]:
    """The record of a teacher's folder: all files that a conversion reads, about two seconds a gigabyte."""
    files = {path for pattern in _READ for path in folder.glob(pattern)}
    return {"folder": str(folder.resolve()), **checksums_of(files)}


def record_teacher(out: Path, content: dict[str, Any]) -> None:
    """Keep a record in a conversion's folder, unless it has one."""
    if not (out / RECORD).is_file():
        write_checksums(out / RECORD, content)


def teacher_changes(out: Path) -> list[str]:
    """Which of the teacher's files are no longer what they were, one sentence for each without its end."""
    return list(differences(out / RECORD)) if (out / RECORD).is_file() else []


def check_teacher(out: Path) -> None:
    """Raise ValueError if the teacher has changed since the conversion began."""
    for change in teacher_changes(out):
        raise ValueError(f"{change}: put the teacher back as it was, and start the same command again")
