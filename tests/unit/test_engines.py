"""Engines by name: a user's own is a class on the import path, and what is wrong with one is a sentence."""

import pytest
import torch

from radlads.cli import main
from radlads.config.schema import TrainConfig
from radlads.train.engines.ddp import Ddp
from radlads.train.engines.replicated import Replicated
from radlads.train.engines.single import SingleProcess
from radlads.train.engines.table import engine_class, engine_for
from radlads.train.processes.group import ALONE, Processes

PAIR = Processes(0, 2, torch.device("cpu"))
OWN = """
from radlads.train.engines.engine import Engine
from radlads.train.engines.ddp import Ddp

NOT_A_CLASS = 1

class Mine(Ddp):
    pass

class Unfinished(Engine):
    def finish(self, optimizers):
        pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_engines.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    engine_class.cache_clear()


def test_a_users_engine_is_found_by_module_and_class(own):
    engine = engine_for(TrainConfig(strategy="own_engines:Mine"), PAIR)
    assert type(engine).__name__ == "Mine" and isinstance(engine, Ddp)
    assert isinstance(engine_for(TrainConfig(strategy="own_engines:Mine"), ALONE), SingleProcess)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("nowhere_at_all:Mine", "in no module on the import path: set PYTHONPATH"),
        *((word, "names no class: write MODULE:CLASS") for word in ("own_engines:", ":Mine", ".own:Mine", "a:b:C")),
        ("own_engines:Other", "own_engines must define a class 'Other'"),
        ("own_engines:NOT_A_CLASS", "must define a class"),
        ("pathlib:Path", "must define a class 'Path' of that kind"),
        ("own_engines:Unfinished", "lacks begin, build, checkpoint_state, footprint, placed, reduce_gradients"),
    ],
)
@pytest.mark.parametrize("processes", [ALONE, PAIR])
def test_what_is_no_engine_is_a_sentence(own, strategy, message, processes):
    with pytest.raises(ValueError, match=f"train.strategy {strategy} .*{message}"):
        engine_for(TrainConfig(strategy=strategy), processes)


def test_a_module_that_an_engines_own_module_lacks_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_at_all"):
        engine_class("lacking:Mine")


def test_a_name_without_a_colon_is_one_of_the_table():
    with pytest.raises(ValueError, match=r"train\.strategy must be one of auto, ddp, "):
        TrainConfig(strategy="mine")


def test_leave_to_record_graphs_is_not_inherited():
    class Otherwise(Ddp):
        def reduce_gradients(self):
            pass

    class Stated(Otherwise):
        records_graphs = True

    assert Ddp.records_graphs and SingleProcess.records_graphs and Stated.records_graphs
    assert not Otherwise.records_graphs and not Replicated.records_graphs


def test_a_plan_asks_a_users_engine(own, teacher, capsys):
    said = []
    for strategy in ("own_engines:Mine", "ddp"):
        words = ["--gpus", "2", "--batch", "8", "--tokens", "1M", "--stage", "align", "--strategy", strategy]
        assert main(["plan", str(teacher), *words]) == 0
        said.append(capsys.readouterr().out)
    assert "own_engines:Mine, " in said[0]
    assert said[0].replace("own_engines:Mine", "ddp") == said[1]
