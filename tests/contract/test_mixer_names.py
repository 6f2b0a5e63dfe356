"""A mixer's name is written down where names are made, and nowhere else: the rest asks the mixer (TimeMixer)."""

import ast
from pathlib import Path

import pytest

from radlads.config import schema
from radlads.model import registry

SOURCE = Path(__file__).parents[2] / "src" / "radlads"
NAMES = {"qwen2", "qwen3", "rad_rwkv6", "rad_rwkv7", "qwerky6", "qwerky7"}
ALLOWED = {
    "model/registry.py": "names and their classes",
    "model/configuration.py": "qwen3, which is qwen2 with qk_norm",
    "config/schema.py": "defaults",
    "checkpoint/published.py": "the published format's own table",
    "checkpoint/published_export.py": "the published format's own table",
    "checkpoint/model_folder.py": "qwen2 as transformers' model type",
    "checkpoint/gguf_file.py": "qwen2 as llama.cpp's architecture",
}
# Files of the history of checkpoints, by name alone, wherever they lie
HISTORY = {"resume.py"}


def names_in(source: str) -> list[int]:
    """Lines with a mixer's name as a string of its own."""
    nodes = ast.walk(ast.parse(source))
    return [node.lineno for node in nodes if isinstance(node, ast.Constant) and node.value in NAMES]


def test_the_defaults_of_config_and_model_are_the_same():
    """Neither package may import the other's, so both write them down."""
    assert (schema.DEFAULT_MIXER, schema.SOFTMAX_MIXER) == (registry.DEFAULT, registry.SOFTMAX)
    assert schema.GATED_MLP in registry.CHANNEL_MIXERS


def test_nobody_else_asks_for_a_mixers_name():
    found = {
        path.relative_to(SOURCE).as_posix(): lines
        for path in sorted(SOURCE.rglob("*.py"))
        if path.name not in HISTORY and (lines := names_in(path.read_text(encoding="utf-8")))
    }
    assert {file: lines for file, lines in found.items() if file not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "a file that needs no name any more"


@pytest.mark.parametrize("source", ['if mixer == "rad_rwkv7": pass', "x = [*a, 'qwen2']", "f\"{name or 'qwen2'}\""])
def test_a_name_is_seen(source):
    assert names_in(source) == [1]


def test_a_word_about_a_mixer_is_no_name():
    assert names_in('"""As rad_rwkv7 does."""') == []
