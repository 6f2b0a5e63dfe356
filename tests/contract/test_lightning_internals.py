"""Private attributes of Lightning and DeepSpeed: touched where one file says why, and still what they were."""

import importlib.util
import inspect
import re
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from test_layers import FILES

from radlads.train.lightning_internals import DeepSpeedOfModule

OURS = {"lightning_internals.py": {"_signal_connector", "_broadcast_sigterm_tensor", "_setup_model_and_optimizer"}}
DEEPSPEEDS = {"zero.py": {"_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state"}}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def test_each_is_touched_in_one_file():
    for file, names in (OURS | DEEPSPEEDS).items():
        for name in names:
            touching = [path.name for path in FILES if re.search(rf"\b{name}\b", path.read_text())]
            assert touching == [file], name


def test_lightnings_trainer_still_asks_them():
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", devices=1)
    assert isinstance(trainer._signal_connector, _SignalConnector)
    assert isinstance(trainer.fit_loop.epoch_loop, _TrainingEpochLoop)
    assert "_signal_connector.register_signal_handlers()" in inspect.getsource(L.Trainer)
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop)


def test_lightnings_deepspeed_still_sets_the_module_up_there():
    method = DeepSpeedStrategy._setup_model_and_optimizer
    assert list(inspect.signature(method).parameters)[:3] == ["self", "model", "optimizer"]
    assert "deepspeed.initialize" in inspect.getsource(method)
    assert "self._setup_model_and_optimizer(model, " in inspect.getsource(DeepSpeedStrategy._initialize_deepspeed_train)


def test_the_module_that_deepspeed_gets_is_the_one_named(monkeypatch):
    got = []
    monkeypatch.setattr(DeepSpeedStrategy, "_setup_model_and_optimizer", lambda self, *given: got.append(given))

    class Named(DeepSpeedOfModule):
        def __init__(self):
            pass

        def hooked(self, model):
            return f"hooked {model}"

    Named()._setup_model_and_optimizer("model", "optimizer", None)
    assert got == [("hooked model", "optimizer", None)]


@needs_deepspeed
def test_deepspeeds_optimiser_still_links_its_states_once():
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer)
    assert "def _lazy_init_hp_params_optimizer_state" in source
    assert "if not self._hp_optimizer_states_linked" in source


def test_the_files_are_there():
    names = {Path(path).name for path in FILES}
    assert {*OURS, *DEEPSPEEDS} <= names
