"""--mixer-path: where mixers of the user's own are."""

import argparse
from pathlib import Path


def mixer_path_option() -> argparse.ArgumentParser:
    """The option of all commands that load a model whose config.json may name mixers of the user's own."""
    parser = argparse.ArgumentParser(prog="radlads", add_help=False, allow_abbrev=False)
    what = "where mixers of your own are, in DIR/tmix and DIR/cmix (default: the import path)"
    parser.add_argument("--mixer-path", type=Path, metavar="DIR", help=what)
    return parser


def find_mixers_in(folder: Path | None) -> None:
    """Add a folder, if there is one, to where mixers are looked for."""
    if folder is None:
        return
    from radlads.model.registry import add_mixer_path

    add_mixer_path(folder)
