"""Names of mixers, and the paper's rule for a user's own: `tmix.tmix_{name}.TMix_{name}` on the import path.

A model's config.json, which may be anybody's, names mixers too. What only such a file names is never taken from the
working directory, which may be that model's folder.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .own_mixers import CHANNEL_MIXERS as OWN_CHANNEL_MIXERS
from .own_mixers import TIME_MIXERS as OWN_TIME_MIXERS
from .rad_rwkv6 import RadRwkv6
from .rad_rwkv7 import RadRwkv7
from .softmax_attention import SoftmaxAttention
from .swiglu import SwiGLU
from .time_mixer import TimeMixer, Use

if TYPE_CHECKING:
    from .configuration import RadladsConfig

TIME_MIXERS: dict[str, type[TimeMixer]] = {"qwen2": SoftmaxAttention, "rad_rwkv6": RadRwkv6, "rad_rwkv7": RadRwkv7}
CHANNEL_MIXERS: dict[str, Callable] = {"swiglu": SwiGLU, "qwen2": SwiGLU}
SOFTMAX, DEFAULT = "qwen2", "rad_rwkv7"
"""The teacher's mixer, and that of a stack that names none."""
MIXER_ALIASES = {"qwerky6": "rad_rwkv6", "qwerky7": "rad_rwkv7", "qwen3": "qwen2"}
"""Published names. qwen3 is the softmax mixer of a stack with qk_norm."""
_named_by_user: set[str] = set()
_mixer_paths: set[str] = set()


def add_mixer_path(folder: Path) -> None:
    """Look for mixers of the user's own in this folder's tmix/ and cmix/ first.

    Raises ValueError if it has neither.
    """
    if not (folder / "tmix").is_dir() and not (folder / "cmix").is_dir():
        raise ValueError(f"{folder} has neither tmix/ nor cmix/: name the folder that holds them")
    path = os.path.realpath(folder)
    _mixer_paths.add(path)
    sys.path.insert(0, path)


def name_mixers(*names: str) -> None:
    """Say that the user asked for these mixers, so that the whole import path is searched for them."""
    _named_by_user.update(names)


def registered_name(name: str) -> str:
    """The name that stands for an alias; any other name as it is."""
    return MIXER_ALIASES.get(name, name)


def known_mixers() -> dict[str, type[TimeMixer]]:
    """The time mixers whose code is in this folder: ours, and in an export those that were shipped with it."""
    return TIME_MIXERS | OWN_TIME_MIXERS


def mixer_class(name: str) -> type[TimeMixer]:
    """The time mixer of a name. Raises ValueError for an unknown one, naming those that are known."""
    return _as_time_mixer(_find(known_mixers(), registered_name(name), "tmix", "TMix"))


def find_mixer_class(name: str) -> type[TimeMixer] | None:
    """The time mixer of a name; None if there is no such file where it may come from."""
    try:
        return mixer_class(name)
    except ValueError:
        return None


def files_of_time_mixers() -> dict[str, Path]:
    """Mixers of the user's own on the import path, by name, found by their files' names: none of them is run."""
    spec = importlib.util.find_spec("tmix")
    folders = [*_mixer_paths, *(spec.submodule_search_locations or () if spec else ())]
    files = [file for folder in folders for file in sorted(Path(folder).glob("tmix_*.py"))]
    return {file.stem.removeprefix("tmix_"): file for file in reversed(files)}


def build_time_mixer(config: "RadladsConfig", layer_idx: int) -> TimeMixer:
    """The time mixer that `config.time_mixers[layer_idx]` names. Raises ValueError for an unknown name."""
    return mixer_class(config.time_mixers[layer_idx])(config, layer_idx)


def build_channel_mixer(config: "RadladsConfig", layer_idx: int):
    """The channel mixer that `config.channel_mixers[layer_idx]` names. Raises ValueError for an unknown name."""
    return _find(CHANNEL_MIXERS | OWN_CHANNEL_MIXERS, config.channel_mixers[layer_idx], "cmix", "CMix")(
        config, layer_idx
    )


def is_registered(config: "RadladsConfig") -> bool:
    """True if the code of all of the model's mixers is in this folder, so that the folder alone can run it."""
    channel_mixers = CHANNEL_MIXERS | OWN_CHANNEL_MIXERS
    return set(config.time_mixers) <= set(known_mixers()) and set(config.channel_mixers) <= set(channel_mixers)


def all_can(config: "RadladsConfig", use: Use) -> bool:
    """True if every layer's mixers are made for a use. A channel mixer of one's own is made for none."""
    kinds = {mixer_class(name) for name in config.time_mixers}
    return set(config.channel_mixers) <= set(CHANNEL_MIXERS) and all(kind.obstacle(use) is None for kind in kinds)


@functools.cache
def _as_time_mixer(kind: type) -> type[TimeMixer]:
    """A time mixer's class; a plain module's, with the defaults of what TimeMixer says."""
    if issubclass(kind, TimeMixer):
        return kind
    return type(kind.__name__, (kind, TimeMixer), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _find(registered: Mapping[str, Callable], name: str, folder: str, prefix: str) -> Any:
    if name in registered:
        return registered[name]
    file = f"{folder}/{folder}_{name}.py"
    module = _import(name, f"{folder}.{folder}_{name}") if name.isidentifier() else None
    if module is None and name not in _named_by_user and Path(file).is_file():
        raise ValueError(
            f"the model names the mixer {name!r}, but code in the working directory is not run for that: "
            f"if you trust {file}, give --mixer-path ."
        )
    if module is None:
        known = ", ".join(sorted(registered))
        raise ValueError(f"no mixer named {name!r}: use one of {known}, or put {file} on the import path")
    if not hasattr(module, f"{prefix}_{name}"):
        raise ValueError(f"{module.__file__} must define a class {prefix}_{name}")
    return getattr(module, f"{prefix}_{name}")


def _import(name: str, module_name: str) -> ModuleType | None:
    """The module of a mixer; None if there is no such file where it may come from."""
    if module_name in sys.modules:
        return sys.modules[module_name]
    with nullcontext() if name in _named_by_user else _without_working_directory():
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name not in (module_name.partition(".")[0], module_name):
                raise
            return None


@contextmanager
def _without_working_directory() -> Iterator[None]:
    """Leave the working directory out of the import path, unless the user put it there."""
    whole = list(sys.path)
    sys.path[:] = [entry for entry in whole if os.path.realpath(entry) != os.getcwd() or _is_users(entry)]
    try:
        yield
    finally:
        sys.path[:] = [*whole, *(entry for entry in sys.path if entry not in whole)]


def _is_users(entry: str) -> bool:
    """Whether this entry of the import path is more than where Python happens to have been started: given by
    --mixer-path or by its full name in PYTHONPATH, or the place of the script that runs."""
    main = sys.modules["__main__"]
    script = None if main.__spec__ is not None else main.__dict__.get("__file__")
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path)]
    given += [*_mixer_paths, *([os.path.dirname(os.path.abspath(script))] if script else [])]
    return os.path.realpath(entry) in map(os.path.realpath, given)
