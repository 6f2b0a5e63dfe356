"""Who may import whom (docs/architecture.md), read from the source, imports inside functions included."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.dynamic_module_utils import get_imports

SOURCE = Path(__file__).parents[2] / "src"
# A package imports only from packages before it
ORDER = [
    *("console", "files", "checksums", "config", "data", "model", "checkpoint", "convert", "inference", "distill"),
    *("train", "report", "evaluation", "selection", "recipes", "bench", "planning", "cli", "vllm_plugin"),
]
MODEL_MAY_IMPORT = {"torch", "transformers", "triton", *sys.stdlib_module_names}
ONE_DOOR = {
    "datasets": "radlads.data.datasets_source",
    "fla": "radlads.model.recurrence",
    "lm_eval": "radlads.evaluation.harness",
}
# Modules that may import a package which takes seconds, or whose parts change without notice
FEW_DOORS = {
    "lightning": {
        *("radlads.train.callbacks", "radlads.train.checkpointing", "radlads.train.fit", "radlads.train.trainer"),
        *("radlads.train.lightning_internals", "radlads.train.lightning_module", "radlads.train.engines.strategies"),
        *("radlads.train.logging.loggers", "radlads.train.logging.metrics_csv", "radlads.train.processes.joining"),
    },
    "deepspeed": {f"radlads.train.engines.{name}" for name in ("zero", "zero3", "zero_state")},
}


class Import(NamedTuple):
    """`module` imports the absolute name `target`; `relative` if it was written with dots."""

    module: str
    target: str
    relative: bool
    line: int

    def __str__(self):
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path, source: str) -> Iterator[Import]:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, False, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            # `from radlads import data` names a package, `from radlads.data import x` is told by its origin
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "radlads" else [origin]
            yield from (Import(module, name, node.level > 0, node.lineno) for name in names)


def package_of(name: str) -> str | None:
    """The package under radlads that a module belongs to; None outside, and for radlads itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "radlads" and len(parts) > 1 and not parts[1].startswith("__") else None


def violations(imports: list[Import]) -> list[str]:
    return [f"{x}: {problem}" for x in imports for problem in problems(x)]


def problems(x: Import) -> Iterator[str]:
    own, other, top = package_of(x.module), package_of(x.target), x.target.partition(".")[0]
    if own is not None and other is not None and own != other:
        if other not in ORDER:
            yield f"{other} is not one of the packages"
        elif own in ORDER and ORDER.index(other) > ORDER.index(own):
            yield f"{own} comes before {other}"
    if own is None and other is not None and x.module == "radlads":
        yield "radlads/__init__.py holds the version and nothing else"
    if own == "model" and (other not in (None, "model") or (other == "model" and not x.relative)):
        yield "model imports its siblings as `from .x import y` and nothing else of radlads"
    if own == "model" and x.relative and x.target.count(".") != 2:
        yield "model is flat: `from .x import y`"
    if own == "model" and other is None and top not in MODEL_MAY_IMPORT | {"fla"}:
        yield "model imports torch, transformers, fla and the standard library only"
    if own == "vllm_plugin" and other not in (None, "model", "vllm_plugin"):
        yield "vllm_plugin imports radlads.model and nothing else of radlads"
    if top == "vllm" and own != "vllm_plugin":
        yield "only vllm_plugin imports vllm"
    if top in ONE_DOOR and not f"{x.module}.".startswith(f"{ONE_DOOR[top]}."):
        yield f"only {ONE_DOOR[top]} imports {top}"
    if top in FEW_DOORS and x.module not in FEW_DOORS[top]:
        yield f"only {', '.join(sorted(FEW_DOORS[top]))} import {top}"


FILES = sorted(SOURCE.glob("radlads/**/*.py"))
IMPORTS = [x for path in FILES for x in imports_of(path, path.read_text(encoding="utf-8"))]


def test_every_package_has_its_place():
    found = {package_of(module_name(path)) for path in FILES} - {None}
    assert found <= set(ORDER) | {"assets"}
    assert "model" in found


def test_imports_follow_the_layers():
    assert violations(IMPORTS) == []


@pytest.mark.parametrize("path", sorted(SOURCE.glob("radlads/model/*.py")), ids=lambda path: path.stem)
def test_an_export_on_the_hub_needs_torch_and_transformers_alone(path):
    """transformers refuses remote code if a package is missing that one of its files imports outside of a try."""
    assert set(get_imports(path)) <= {"torch", "transformers", *sys.stdlib_module_names}


def test_only_the_command_line_prints():
    printing = {
        module_name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert {name.rpartition(".")[0] for name in printing} == {"radlads.cli"}


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("model/cache.py", "from radlads.config import Config", "nothing else of radlads"),
        ("model/cache.py", "from radlads.model.layers import RMSNorm", "as `from .x import y`"),
        ("model/cache.py", "from . import layers", "flat"),
        ("model/cache.py", "from .sub.x import y", "flat"),
        ("model/cache.py", "from ..data import loader", "nothing else of radlads"),
        ("model/cache.py", "import numpy", "torch, transformers, fla and the standard library only"),
        ("model/cache.py", "import fla.ops", "only radlads.model.recurrence imports fla"),
        ("data/build.py", "def f():\n    from radlads.model.cache import RadladsCache", "data comes before model"),
        ("data/build.py", "from radlads import train", "data comes before train"),
        ("data/build.py", "from ..train import fit", "data comes before train"),
        ("data/build.py", "import radlads.cli", "data comes before cli"),
        ("data/build.py", "import radlads.misc", "misc is not one of the packages"),
        ("distill/align.py", "from lightning.pytorch import Trainer", "import lightning"),
        ("train/engines/ddp.py", "def f():\n    import lightning", "import lightning"),
        ("train/fit.py", "import deepspeed", "import deepspeed"),
        ("vllm_plugin/model.py", "from radlads.checkpoint import weights", "radlads.model and nothing else"),
        ("inference/serve.py", "from radlads.vllm_plugin import checks", "inference comes before vllm_plugin"),
        ("inference/serve.py", "import vllm", "only vllm_plugin imports vllm"),
        ("__init__.py", "from radlads.model import cache", "the version and nothing else"),
    ],
)
def test_a_violation_is_seen(file, line, problem):
    found = violations(list(imports_of(SOURCE / "radlads" / file, line)))
    assert any(problem in each for each in found), found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model/cache.py", "from .layers import RMSNorm"),
        ("model/recurrence.py", "import fla.ops.gla"),
        ("train/fit.py", "from lightning.pytorch import Trainer"),
        ("vllm_plugin/model.py", "from vllm.config import VllmConfig\nfrom radlads.model.layers import RMSNorm"),
        ("train/fit.py", "from radlads import __version__"),
        ("cli/commands.py", "from radlads.recipes import demo"),
        ("data/__init__.py", "from .loader import TokenSamples"),
    ],
)
def test_a_lawful_import_is_accepted(file, line):
    assert violations(list(imports_of(SOURCE / "radlads" / file, line))) == []
