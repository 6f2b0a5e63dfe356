"""Engines by the names that train.strategy knows. A name MODULE:CLASS is an engine of the user's own (docs/engines.md).

The table holds names of classes, not classes, so that reading it imports nothing slow.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING

from radlads.config.schema import TrainConfig

if TYPE_CHECKING:
    from radlads.train.engines.engine import Engine
    from radlads.train.processes.group import Processes

ALONE = "single"
ENGINES = {
    ALONE: "radlads.train.engines.single:SingleProcess",
    "ddp": "radlads.train.engines.ddp:Ddp",
    "fsdp": "radlads.train.engines.fsdp:Fsdp",
    "deepspeed_stage_1": "radlads.train.engines.zero:Zero1",
    "deepspeed_stage_2": "radlads.train.engines.zero:Zero2",
    "deepspeed_stage_3": "radlads.train.engines.zero3:Zero3",
}
SAME_AS = dict.fromkeys(("auto", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true"), "ddp")
"""Other names that train.strategy may have."""


def is_users(strategy: str) -> bool:
    """Whether the name is of an engine of the user's own."""
    return ":" in strategy


@functools.cache
def engine_class(strategy: str) -> type[Engine]:
    """The class that `strategy` names. Raises ValueError if it is no engine."""
    from radlads.train.engines.engine import Engine

    where = ENGINES.get(SAME_AS.get(strategy, strategy), strategy)
    module, _, name = where.partition(":")
    if not all(word.isidentifier() for word in (*module.split("."), name)):
        raise ValueError(f"train.strategy {strategy} names no class: write MODULE:CLASS (docs/engines.md)")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"train.strategy {strategy} is in no module on the import path: set PYTHONPATH") from error
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise ValueError(f"train.strategy {strategy} is no engine: {module} must define a class {name!r} of that kind")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"train.strategy {strategy} is no engine yet: it lacks {missing} (docs/engines.md)")
    return found


def engine_for(train: TrainConfig, processes: Processes) -> Engine:
    """The engine of a stage; one process has nothing to share out. Raises ValueError as engine_class."""
    named = engine_class(train.strategy)
    return (named if processes.size > 1 else engine_class(ALONE))(train, processes)
