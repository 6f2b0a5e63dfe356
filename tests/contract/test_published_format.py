"""Who knows the published checkpoints' format: checkpoint/published.py and published_export.py, and nobody else."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "radlads"
WORDS = re.compile(r"rwkv[67]qwen2|num_attention_layers|attention_output_bias|\br_k\b", re.IGNORECASE)
OWNERS = {"checkpoint/published.py", "checkpoint/published_export.py"}
EXCEPTIONS = {
    "model/configuration.py": "its sentence to whoever opens a published folder with transformers names the types",
    "recipes/llama_cpp.py": "llama.cpp has an architecture of its own by this name",
}
TEXT_OF = {ast.Constant: "value", ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg"}


def words_of(path: Path) -> set[str]:
    """The format's words in a file's names and strings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = getattr(node, TEXT_OF.get(type(node), ""), None)
        found |= set(WORDS.findall(text)) if isinstance(text, str) else set()
    return found


def test_nobody_else_uses_its_words():
    knowing = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if words_of(path)}
    assert knowing == OWNERS | EXCEPTIONS.keys()
