"""The GPU tests' device, and what the run shows at its end: the largest errors seen.

`make test-gpu` needs a CUDA device and says so without one; in any other run without one these tests are skipped.
RADLADS_GPU_TESTS_ON=cpu is a dry run of the tests' own logic: short sequences, the chunked backend and, under
TRITON_INTERPRET=1, triton. It says nothing about a GPU. RADLADS_GPU_ERRORS=FILE writes the errors as JSON, too.
"""

import gc
import json
import os
import platform
from pathlib import Path

import pytest
import torch
import transformers
from gpu_comparison import DEVICE, DRY_RUN, LEDGER

from radlads.model import recurrence

NO_GPU = (
    "the GPU tests need a CUDA GPU, and PyTorch sees none here: run them on a machine with one, "
    "or leave them out with -m 'not gpu'"
)


def pytest_collection_modifyitems(config, items):
    """Without a GPU: skip, or refuse where GPU tests are what was asked for."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if DRY_RUN or torch.cuda.is_available() or not wanted:
        return
    if config.option.markexpr.strip() == "gpu":
        raise pytest.UsageError(NO_GPU)
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_terminal_summary(terminalreporter):
    """The table of docs/numerics.md, 'On a GPU'."""
    rows = LEDGER.rows()
    if not rows:
        return
    terminalreporter.section(f"largest errors on {where_it_ran()['device']}")
    for line in LEDGER.table():
        terminalreporter.write_line(line)
    if path := os.environ.get("RADLADS_GPU_ERRORS"):
        Path(path).write_text(json.dumps(where_it_ran() | {"errors": rows}, indent=1) + "\n", encoding="utf-8")


def where_it_ran() -> dict[str, str]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    device = platform.processor() or "CPU" if DEVICE.type == "cpu" else torch.cuda.get_device_name(DEVICE)
    return {"device": device, **versions}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True, scope="session")
def full_fp32_products():
    """TF32 off for torch's own products, so that an fp32 oracle is one."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True, scope="session")
def interpreted_kernels_are_allowed():
    """In a dry run our Triton kernels may be asked for on CPU tensors, where the interpreter runs them."""
    missing = recurrence.missing
    with pytest.MonkeyPatch.context() as patch:
        if DRY_RUN and os.environ.get("TRITON_INTERPRET") == "1":
            import interpreter  # needs triton

            patch.setattr(recurrence, "missing", lambda kind, v: None if kind == "triton" else missing(kind, v))
            interpreter.allow_runtime_loops(patch)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_configuration_per_fla_kernel():
    """fla tries up to 30 launch configurations per kernel and shape, which takes minutes: the first will do here."""
    if DRY_RUN or not recurrence.fla_is_importable():
        return
    from triton.runtime.autotuner import Autotuner

    for kernel in [x for x in gc.get_objects() if isinstance(x, Autotuner)]:
        if kernel.base_fn.__module__.startswith("fla."):
            kernel.configs = kernel.configs[:1]
