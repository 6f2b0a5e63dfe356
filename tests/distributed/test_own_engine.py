"""An engine in one file that is not the package's: the example of docs/engines.md, trained in two processes."""

import json
import re
import signal
from pathlib import Path

import pytest
import stages
import torch
from launch import curve, run
from safetensors.torch import load_file

from radlads.train.engines.replicated import Replicated
from radlads.train.engines.table import engine_class

PAGE = Path(__file__).parents[2] / "docs/engines.md"
STRATEGY = "my_engines:OneByOne"
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's file, on the import path of this process and of those it starts."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "my_engines.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    engine_class.cache_clear()
    return stages.corpus(tmp_path)


def entry(folder, teacher, name, strategy, **settings):
    keys = stages.keys(folder, teacher, "align", name, strategy=strategy, **settings)
    return {"keys": keys | {"train.my_exit_tokens": 16 * 8 * 10}}


def test_it_trains_stops_and_goes_on_as_ddp_does(example, teacher):
    own, ddp = (entry(example, teacher, name, strategy) for name, strategy in (("own", STRATEGY), ("ddp", "ddp")))
    stopped = entry(example, teacher, "stopped", STRATEGY)
    run(example, [own, ddp, stopped | {"stop": [1, 6]}], code=128 + signal.SIGTERM)
    out, _ = run(example, [stopped])
    assert "going on after step 7 of 10" in out
    expected = load_file(example / "ddp/model.safetensors")
    for name in ("own", "stopped"):
        assert curve(example, name) == curve(example, "ddp")
        found = load_file(example / name / "model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected), "two numbers have one sum"
    assert json.loads((example / "own/manifest.json").read_text())["sequences_per_step"] == 8


def test_it_is_what_was_run(example):
    engine = engine_class(STRATEGY)
    assert issubclass(engine, Replicated) and engine.reduce_gradients is not Replicated.reduce_gradients
    assert engine.__module__ == "my_engines"
