"""A conversion's folder: whose it is, and that one process at a time works in it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from radlads.checkpoint.atomic import locked
from radlads.checkpoint.manifest import joint_hash, versions
from radlads.checksums import sha256
from radlads.config.compare import HashedSection, deciding, differences
from radlads.config.schema import Config
from radlads.console import Console
from radlads.data.binidx import BinIdxReader, corpus_files
from radlads.data.mask import mask_file, read_mask
from radlads.data.python_text import Split
from radlads.files import read_json, write_text
from radlads.recipes.stage_configs import Conversion
from radlads.recipes.teacher_record import teacher_changes
from radlads.train.fit import recipe_hash

SUMMARY, MARKER = "summary.json", "conversion.json"
SPLITS: tuple[Split, Split] = ("train", "heldout")


def claim_folder(out: Path, identity: dict[str, str], settings: dict[str, Any], console: Console) -> None:
    """Mark `out` as this conversion's, or go on in it. Raises ValueError if it is another's, saying what differs; of
    the settings too, if its marker has them."""
    marker = out / MARKER
    if marker.is_file():
        held = read_json(marker)
        if different := [key for key in identity if held.get(key) != identity[key]]:
            changes = differences(held["settings"], settings) if "settings" in held else []
            changes += teacher_changes(out) if "teacher" in different else []
            raise ValueError(
                f"{out} holds another conversion (different: {', '.join(different)}): "
                f"{'; '.join([*changes, 'remove it'])}, or choose another --out"
            )
        if not (out / SUMMARY).is_file():
            console.line(f"going on with the unfinished conversion in {out}")
        return
    if out.exists() and any(not path.name.startswith(f".{MARKER}") for path in out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no conversion: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps({**identity, "settings": settings}, indent=2) + "\n")


@contextmanager
def only_process_in(out: Path) -> Iterator[None]:
    """Hold a lock on `out`. Raises ValueError while another process holds it."""
    lock = out / ".lock"
    lock.touch()
    with locked(lock, f"another process is converting into {out}: wait for it, or choose another --out"):
        yield


def identity_of(conversion: Conversion, teacher: Mapping[str, str], configs: dict[str, Config]) -> dict[str, str]:
    """What a folder's conversion is told apart by: each entry names one thing that decides the result. `teacher`:
    its files' hashes."""
    data = f"Python {versions()['python']}"
    if conversion.data is not None:
        stems = (BinIdxReader(conversion.corpus(split)).path_stem for split in SPLITS)
        data = recipe_hash(*(sha256(path) for stem in stems for path in reversed(corpus_files(stem))))
    return {
        "radlads": versions().get("radlads", ""),
        "teacher": recipe_hash(joint_hash(teacher), *(teacher[name] for name in ("config.json", "tokenizer.json"))),
        "data": data,
        "mixer": recipe_hash(HashedSection(configs["align"].model)),
        "stages": recipe_hash(*(deciding(config) for config in configs.values())),
        "retie": str(conversion.retie),
        **_conversations(conversion),
    }


def _conversations(conversion: Conversion) -> dict[str, str]:
    """What stage 4 learns from, if there is one."""
    if not conversion.instruct:
        return {}
    if conversion.chat is None:
        return {"chat": "written by the teacher"}
    reader = BinIdxReader(conversion.chat)
    read_mask(reader)
    return {
        "chat": recipe_hash(*(sha256(path) for path in (*corpus_files(reader.path_stem), mask_file(reader.path_stem))))
    }


def decisive_settings(configs: dict[str, Config]) -> dict[str, Any]:
    """What the configurations decide: each key's value, by stage where the stages' differ."""
    by_stage = {stage: deciding(config) for stage, config in configs.items()}
    keys = dict.fromkeys(key for held in by_stage.values() for key in held)
    values = {key: {stage: held.get(key) for stage, held in by_stage.items()} for key in keys}
    return {key: held if len(set(held.values())) > 1 else held["align"] for key, held in values.items()}
