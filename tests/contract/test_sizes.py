"""How long files and functions may be, in lines; a longer one is listed here with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "benchmarks", "tools")
FILE_LINES, FUNCTION_LINES = 300, 60
LONG_FILES = {
    "src/radlads/config/schema.py": "every knob with its help, once",
    "src/radlads/inference/decode_kernels.py": "kernels only",
}
LONG_FUNCTIONS = {
    "src/radlads/inference/decode_kernels.py:recurrence": "one kernel: its values stay in registers",
    "src/radlads/model/rwkv7_triton.py:_gradients": "one kernel: its values stay in registers",
}


def python_files() -> Iterator[tuple[str, str]]:
    """Path below the root, and text, of each file of ours."""
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def long_functions(text: str) -> list[str]:
    """Names of the functions of more than FUNCTION_LINES lines, what is defined inside them included."""
    functions = (x for x in ast.walk(ast.parse(text)) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef))
    return [x.name for x in functions if x.end_lineno - x.lineno + 1 > FUNCTION_LINES]


def test_files_are_short_but_for_those_listed():
    assert {path for path, text in python_files() if len(text.splitlines()) > FILE_LINES} == LONG_FILES.keys()


def test_functions_are_short_but_for_those_listed():
    found = {f"{path}:{name}" for path, text in python_files() for name in long_functions(text)}
    assert found == LONG_FUNCTIONS.keys()


def test_a_function_is_measured_from_its_name_to_its_end():
    as_long_as_it_may_be = "@decorated\ndef f():\n" + "    pass\n" * (FUNCTION_LINES - 1)
    one_line_longer = "class C:\n    async def f(self):\n" + "        pass\n" * FUNCTION_LINES
    assert (long_functions(as_long_as_it_may_be), long_functions(one_line_longer)) == ([], ["f"])
