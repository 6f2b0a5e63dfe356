"""Unfinished runs that an older radlads left, gone on with by two processes (contract/old_files/make.py made them)."""

import importlib.util

import pytest
from launch import run
from old_runs import assert_ends_as_then, copied

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A copy of the files, in which the runs have gone on as their own configurations say."""
    folder = tmp_path_factory.mktemp("old")
    old, names = copied(folder), ["ddp", "fsdp", *(("zero2", "zero3") if HAS_DEEPSPEED else ())]
    entries = [{"files": [f"unfinished/{name}.partial/config.yaml"], "keys": {}} for name in names]
    entries[-1]["deepspeed_on_cpu"] = HAS_DEEPSPEED
    out, _ = run(folder, entries, directory=old)
    assert out.count("going on after step 3 of 6") == len(names)
    return old


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", *(pytest.param(name, marks=needs_deepspeed) for name in ("zero2", "zero3"))]
)
def test_two_processes_come_to_the_same_end(old, name):
    assert_ends_as_then(old, name)
