"""The rooms of train/: who may import whom, and that strategies have names in engines/ alone."""

import inspect
import os
import re
import subprocess
import sys

import pytest
from test_layers import FILES, IMPORTS, SOURCE, module_name

from radlads.config.schema import STRATEGIES
from radlads.train.engines.engine import Engine
from radlads.train.engines.table import ALONE, ENGINES, SAME_AS, engine_class

TRAIN = "radlads.train"
# A room imports only from rooms before it; files that lie in train/ itself are the run, which imports from all
ORDER = ["lightning_internals", "processes", "corpora", "optimizers", "logging", "engines", "checkpoints"]
NAMES_OF_STRATEGIES = re.compile(r"fsdp|deepspeed|is_in_rows|is_sharded|ZeroStrategy|full_tensor|ds_tensor")


def place(module: str) -> int:
    room = module.removeprefix(f"{TRAIN}.").partition(".")[0]
    return ORDER.index(room) if room in ORDER else len(ORDER)


def test_rooms_import_only_from_rooms_before_them():
    inside = [x for x in IMPORTS if x.module.startswith(f"{TRAIN}.") and x.target.startswith(f"{TRAIN}.")]
    assert len(inside) > 50
    assert [str(x) for x in inside if place(x.target) > place(x.module)] == []


def test_every_room_has_its_place():
    rooms = {path.parent.name for path in FILES if path.parents[1].name == "train"}
    assert rooms == set(ORDER[1:])


def test_strategies_have_names_in_engines_alone():
    files = [path for path in FILES if module_name(path).startswith(TRAIN) and "engines" not in path.parts]
    # Which has DeepSpeed's optimiser, for any engine
    files = [path for path in files if path.name != "optim.py"]
    assert len(files) > 30
    files += [SOURCE / "radlads/planning/memory.py", SOURCE / "radlads/planning/speed.py"]
    found = [f"{path.name}: {line}" for path in files for line in path.read_text().splitlines()]
    assert [line for line in found if NAMES_OF_STRATEGIES.search(line)] == []


def test_the_table_has_all_that_the_configuration_takes():
    assert {*ENGINES, *SAME_AS} - {ALONE} == set(STRATEGIES)
    assert set(SAME_AS.values()) <= set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_answers_the_protocol(name):
    engine = engine_class(name)
    assert engine.__module__.startswith(f"{TRAIN}.engines.")
    for method, asked in inspect.getmembers(Engine, inspect.isfunction):
        if method != "__init__":
            given = list(inspect.signature(getattr(engine, method)).parameters)
            assert given == list(inspect.signature(asked).parameters), f"{name}.{method}"
    for precision in ("bf16-true", "bf16"):
        assert engine.footprint(8, precision).size.weight in (2, 4)


PROBE = """
import sys
from radlads.train.engines.table import ENGINES, engine_class
import radlads.planning.command, radlads.planning.plan
for name in ENGINES:
    engine_class(name).footprint(2, "bf16")
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"lightning", "pytorch_lightning", "deepspeed"}))
"""


def test_to_ask_an_engines_class_imports_nothing_slow():
    """As `radlads plan` does."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
