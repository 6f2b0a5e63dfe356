"""Code of mixers that are not radlads' own: what an export ships of it, and who brings it along.

An export holds tmix_NAME.py or cmix_NAME.py beside the model's code. In it `from radlads.model.X import Y` reads
`from .X import Y`, and own_mixers.py names its class: so the folder runs without radlads.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import radlads.model
from radlads.files import write_text
from radlads.model.configuration import RadladsConfig
from radlads.model.registry import Kind, build_channel_mixer, build_time_mixer, class_name, own_file, own_mixers

OWN_MIXERS = "own_mixers.py"
_MODEL = Path(radlads.model.__file__).parent
_IMPORT = re.compile(rb"from\s+radlads\.model\.(\w+)\s+import\b")
_REMEDY = "write `from radlads.model.X import Y`, and put what else it needs into the file"


def check_brought(config: RadladsConfig, folder: Path) -> None:
    """Raise ValueError for a mixer that is not to be found, but whose code lies in the model's folder: it is not run
    for that."""
    for kind, name in own_mixers(config):
        file = folder / f"{kind}_{name}.py"
        if own_file(kind, name) is None and file.is_file():
            raise ValueError(
                f"the model's folder has the code of its mixer {name!r}, but that is not run because config.json names "
                f"it: if you trust {file}, give --mixer-path {folder}"
            )


def check_code(config: RadladsConfig) -> None:
    """Raise ValueError for a mixer of the user's own that an export cannot hold: one that is not to be found, imports
    what the folder has not, has buffers, or cannot be built on the meta device."""
    for kind, name in own_mixers(config):
        is_time = kind == "tmix"
        for layer, each in enumerate(config.time_mixers if is_time else config.channel_mixers):
            if each == name:
                _check_built(build_time_mixer if is_time else build_channel_mixer, config, layer, name)
        _shipped_source(_file(kind, name))


def write_mixer_code(config: RadladsConfig, folder: Path) -> None:
    """Put the files of the model's own mixers into a folder that has the model's code, and their classes into its
    own_mixers.py. Raises ValueError as check_code does of imports."""
    own = own_mixers(config)
    for kind, name in own:
        (folder / f"{kind}_{name}.py").write_bytes(_shipped_source(_file(kind, name)))
    if own:
        write_text(folder / OWN_MIXERS, _table(own))


def has_code(config: RadladsConfig) -> bool:
    """Whether an export can hold the files of all of the model's own mixers. None is run to find out."""
    try:
        for kind, name in own_mixers(config):
            _shipped_source(_file(kind, name))
    except ValueError:
        return False
    return True


def _file(kind: Kind, name: str) -> Path:
    file = own_file(kind, name)
    if file is None:
        raise ValueError(f"the code of the mixer {name!r} is not to be found: put {kind}/{kind}_{name}.py on the path")
    return file


def _check_built(
    build: Callable[[RadladsConfig, int], nn.Module], config: RadladsConfig, layer: int, name: str
) -> None:
    """Build a mixer as from_pretrained does, without memory, and refuse what would have no value then."""
    with torch.device("meta"):
        try:
            mixer = build(config, layer)
        except Exception as error:  # anybody's code
            raise ValueError(
                f"the mixer {name!r} cannot be exported: transformers builds it on the meta device, which fails with "
                f"{type(error).__name__}: {error}"
            ) from error
    for each in mixer.modules():
        tensors = [key for key, value in vars(each).items() if isinstance(value, torch.Tensor)]
        if without_value := [*each._buffers, *tensors]:
            raise ValueError(
                f"the mixer {name!r} cannot be exported: {without_value[0]} is no parameter, so no file of weights has "
                "its value: make it an nn.Parameter, or compute it in forward"
            )


def _shipped_source(file: Path) -> bytes:
    """The file's content, its imports of radlads.model as those of its siblings and all else unchanged.

    Raises ValueError for an import of what an export does not hold.
    """
    source = file.read_bytes()
    lines = source.splitlines(keepends=True)
    places = []
    for node in _imports(source, file):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and _is_shipped(file) and _is_module(node.module):
            continue
        foreign = [name for name in _imported(node) if _is_foreign(name)]
        if not foreign:
            continue
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        match = _IMPORT.match(source, start)
        if match is None or not _is_module(match[1].decode()):
            raise ValueError(f"{file}, line {node.lineno} imports {foreign[0]}, which no export holds: {_REMEDY}")
        places.append(match)
    for match in sorted(places, key=re.Match.start, reverse=True):
        source = source[: match.start()] + b"from ." + match[1] + b" import" + source[match.end() :]
    return source


def _imports(source: bytes, file: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    try:
        tree = ast.parse(source, str(file))
    except SyntaxError as error:
        raise ValueError(f"{file}, line {error.lineno} is no Python: {error.msg}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Names of the modules that a statement imports; relative ones with their dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return ["." * node.level + (node.module or "")]


def _is_foreign(module: str) -> bool:
    """Whether a module is of radlads or another mixer's file, not a package that can be installed."""
    top = module.partition(".")[0]
    return top in ("", "radlads", "tmix", "cmix") or top.startswith(("tmix_", "cmix_"))


def _is_shipped(file: Path) -> bool:
    """Whether a mixer's file lies in an export already, where its imports are relative."""
    return (file.parent / OWN_MIXERS).is_file()


def _is_module(name: str | None) -> bool:
    return (_MODEL / f"{name}.py").is_file()


def _table(own: list[tuple[Kind, str]]) -> str:
    text = '"""Mixers that are not part of radlads, whose files are beside this one: written by `radlads export`."""\n'
    return "\n\n".join([text, _function("time", "tmix", own), _function("channel", "cmix", own)])


def _function(title: str, kind: Kind, own: list[tuple[Kind, str]]) -> str:
    names = [name for each, name in own if each == kind]
    imports = [f"    from .{kind}_{name} import {class_name(kind, name)}\n" for name in names]
    table = ", ".join(f'"{name}": {class_name(kind, name)}' for name in names)
    body = "".join(imports) + ("\n" if imports else "") + f"    return {{{table}}}\n"
    return f'def {title}_mixers() -> dict[str, type]:\n    """{title.capitalize()} mixers by name."""\n{body}'
