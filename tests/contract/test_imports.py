"""Every module imports without the optional packages, and help without the slow ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
OPTIONAL = ("fla", "triton", "wandb", "deepspeed", "lm_eval", "fastapi", "openai", "uvicorn", "vllm")
PROBE = '''
import importlib, sys

class Hiding:
    """A finder that does not find the optional packages: neither import nor importlib.util.find_spec."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in OPTIONAL else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in OPTIONAL:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not blocked")
failed = []
for module in MODULES:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed.append(f"{module}: {type(error).__name__}: {error}")
print("\\n".join(failed) or "ok")
'''


# Triton kernels and their launches, the server's routes, and what vLLM alone imports: what uses them imports them where
# they can run
LATE = {
    "radlads.distill.loss_kernels",
    "radlads.inference.access",
    "radlads.inference.decode_kernels",
    "radlads.inference.decode_window",
    "radlads.inference.fused_step",
    "radlads.inference.graceful_server",
    "radlads.inference.openai_answers",
    "radlads.inference.openai_api",
    "radlads.inference.openai_requests",
    "radlads.vllm_plugin.checks",
    "radlads.vllm_plugin.model",
    "radlads.vllm_plugin.parameters",
    "radlads.vllm_plugin.states",
}


def test_every_module_imports_without_the_optional_packages():
    files = sorted(path for path in SOURCE.glob("radlads/**/*.py") if path.name != "__main__.py")
    modules = [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert set(modules) > LATE and "radlads.model.rwkv7_triton" in modules
    modules = [module for module in modules if module not in LATE]
    probe = f"OPTIONAL = {OPTIONAL!r}\nMODULES = {modules!r}\n{PROBE}"
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, encoding="utf-8", env=environment, check=False
    )
    assert result.stdout.strip() == "ok", result.stdout + result.stderr


SLOW = ("torch", "transformers", "lightning", "datasets", "tokenizers", "huggingface_hub", "matplotlib", "numpy")
HELP = """
import contextlib, io, sys
from radlads.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(sys.argv[1:])
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(SLOW)))
"""


COMMANDS = (
    *("", "demo", "train", "config", "data", "generate", "chat", "serve", "eval", "longcontext"),
    *("report", "export", "verify", "bench", "plan", "mixers"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_slow(command):
    probe = [sys.executable, "-c", f"SLOW = {SLOW!r}\n{HELP}", *command.split(), "--help"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    result = subprocess.run(probe, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)
    assert (result.stdout.strip(), result.stderr) == ("", "")
