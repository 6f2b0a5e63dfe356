"""Names of mixers, and the paper's rule for a user's own: `tmix.tmix_{name}.TMix_{name}` on the import path.

A model's config.json, which may be anybody's, names mixers too. What only such a file names is never taken from the
working directory, which may be that model's folder. An export has its own mixers' files beside the model's code: there
they belong to this package, and elsewhere they are taken from an export that --mixer-path names, never from the folder
of a model that is merely opened.
"""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from .own_mixers import channel_mixers as shipped_channel_mixers
from .own_mixers import time_mixers as shipped_time_mixers
from .rad_rwkv6 import RadRwkv6
from .rad_rwkv7 import RadRwkv7
from .softmax_attention import SoftmaxAttention
from .swiglu import SwiGLU
from .time_mixer import TimeMixer, Use

if TYPE_CHECKING:
    from .configuration import RadladsConfig

Kind = Literal["tmix", "cmix"]
"""A time or a channel mixer: the folder, the prefix of the file and, in capitals, of the class."""
TIME_MIXERS: dict[str, type[TimeMixer]] = {"qwen2": SoftmaxAttention, "rad_rwkv6": RadRwkv6, "rad_rwkv7": RadRwkv7}
CHANNEL_MIXERS: dict[str, Callable] = {"swiglu": SwiGLU, "qwen2": SwiGLU}
SOFTMAX, DEFAULT = "qwen2", "rad_rwkv7"
"""The teacher's mixer, and that of a stack that names none."""
MIXER_ALIASES = {"qwerky6": "rad_rwkv6", "qwerky7": "rad_rwkv7", "qwen3": "qwen2"}
"""Published names. qwen3 is the softmax mixer of a stack with qk_norm."""
_named_by_user: set[str] = set()
_mixer_paths: set[str] = set()
_exports: list[str] = []


def add_mixer_path(folder: Path) -> None:
    """Look for mixers of the user's own first in this folder: in its tmix/ and cmix/, or, if it is an export, beside
    its config.json.

    Raises ValueError if it has none of these.
    """
    path, is_export = os.path.realpath(folder), any(folder.glob("[tc]mix_*.py"))
    if is_export:
        _exports.insert(0, path)
    if (folder / "tmix").is_dir() or (folder / "cmix").is_dir():
        _mixer_paths.add(path)
        sys.path.insert(0, path)
    elif not is_export:
        raise ValueError(f"{folder} has neither tmix/ nor cmix/: name the folder that holds them")


def name_mixers(*names: str) -> None:
    """Say that the user asked for these mixers, so that the whole import path is searched for them."""
    _named_by_user.update(names)


def registered_name(name: str) -> str:
    """The name that stands for an alias; any other name as it is."""
    return MIXER_ALIASES.get(name, name)


def known_mixers() -> dict[str, type[TimeMixer]]:
    """The time mixers whose code is in this folder: ours, and in an export those that were shipped with it."""
    return TIME_MIXERS | {name: _as_time_mixer(kind) for name, kind in shipped_time_mixers().items()}


def known_channel_mixers() -> dict[str, Callable]:
    """The channel mixers whose code is in this folder."""
    return CHANNEL_MIXERS | shipped_channel_mixers()


def mixer_class(name: str) -> type[TimeMixer]:
    """The time mixer of a name. Raises ValueError for an unknown one, naming those that are known."""
    return _as_time_mixer(_find(known_mixers(), registered_name(name), "tmix"))


def find_mixer_class(name: str) -> type[TimeMixer] | None:
    """The time mixer of a name; None if there is no such file where it may come from."""
    try:
        return mixer_class(name)
    except ValueError:
        return None


def files_of_time_mixers() -> dict[str, Path]:
    """Mixers of the user's own on the import path, by name, found by their files' names: none of them is run."""
    spec = importlib.util.find_spec("tmix")
    folders = [*_exports, *(spec.submodule_search_locations or () if spec else ())]
    files = [file for folder in folders for file in sorted(Path(folder).glob("tmix_*.py"))]
    return {file.stem.removeprefix("tmix_"): file for file in reversed(files)}


def build_time_mixer(config: "RadladsConfig", layer_idx: int) -> TimeMixer:
    """The time mixer that `config.time_mixers[layer_idx]` names. Raises ValueError for an unknown name."""
    return mixer_class(config.time_mixers[layer_idx])(config, layer_idx)


def build_channel_mixer(config: "RadladsConfig", layer_idx: int):
    """The channel mixer that `config.channel_mixers[layer_idx]` names. Raises ValueError for an unknown name."""
    return _find(known_channel_mixers(), config.channel_mixers[layer_idx], "cmix")(config, layer_idx)


def is_registered(config: "RadladsConfig") -> bool:
    """True if the code of all of the model's mixers is in this folder, so that the folder alone can run it."""
    return not own_mixers(config)


def own_mixers(config: "RadladsConfig") -> list[tuple[Kind, str]]:
    """The model's mixers whose code is not in this folder."""
    time = {registered_name(name) for name in config.time_mixers} - set(known_mixers())
    channel = set(config.channel_mixers) - set(known_channel_mixers())
    return [*(("tmix", name) for name in sorted(time)), *(("cmix", name) for name in sorted(channel))]


def own_file(kind: Kind, name: str) -> Path | None:
    """The file that a mixer of the user's own comes from; None if there is none where it may come from. It is not
    run."""
    if not name.isidentifier():
        return None
    if (shipped := _file_in_export(kind, name)) is not None:
        return shipped
    if (loaded := sys.modules.get(f"{kind}.{kind}_{name}")) is not None:
        return Path(str(loaded.__file__))
    with _import_path_for(name):
        files = [Path(entry) / kind / f"{kind}_{name}.py" for entry in sys.path]
    return next((file for file in files if file.is_file()), None)


def class_name(kind: Kind, name: str) -> str:
    """The name of a mixer's class in its file."""
    return f"{'TMix' if kind == 'tmix' else 'CMix'}_{name}"


def all_can(config: "RadladsConfig", use: Use) -> bool:
    """True if every layer's mixers are made for a use. A channel mixer of one's own is made for none."""
    return not obstacles(config, use)


def obstacles(config: "RadladsConfig", use: Use) -> list[str]:
    """Why a model's mixers cannot be used so, each reason once; none if they can. Raises ValueError as mixer_class."""
    found = [mixer_class(name).obstacle_in(config, layer, use) for layer, name in enumerate(config.time_mixers)]
    own = sorted(set(config.channel_mixers) - set(CHANNEL_MIXERS))
    return [*dict.fromkeys(why for why in found if why is not None), *(f"{name} is not made for it" for name in own)]


@functools.cache
def _as_time_mixer(kind: type) -> type[TimeMixer]:
    """A time mixer's class; a plain module's, with the defaults of what TimeMixer says."""
    if issubclass(kind, TimeMixer):
        return kind
    return type(kind.__name__, (kind, TimeMixer), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _find(registered: Mapping[str, Callable], name: str, kind: Kind) -> Any:
    if name in registered:
        return registered[name]
    file = f"{kind}/{kind}_{name}.py"
    module = _import(name, kind) if name.isidentifier() else None
    if module is None and name not in _named_by_user and Path(file).is_file():
        raise ValueError(
            f"the model names the mixer {name!r}, but code in the working directory is not run for that: "
            f"if you trust {file}, give --mixer-path ."
        )
    if module is None:
        known = ", ".join(sorted(registered))
        raise ValueError(f"no mixer named {name!r}: use one of {known}, or put {file} on the import path")
    if not hasattr(module, class_name(kind, name)):
        raise ValueError(f"{module.__file__} must define a class {class_name(kind, name)}")
    return getattr(module, class_name(kind, name))


def _import(name: str, kind: Kind) -> ModuleType | None:
    """The module of a mixer; None if there is no such file where it may come from."""
    if (shipped := _file_in_export(kind, name)) is not None:
        return _import_shipped(shipped)
    module_name = f"{kind}.{kind}_{name}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    with _import_path_for(name):
        try:
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name not in (kind, module_name):
                raise
            return None


def _file_in_export(kind: Kind, name: str) -> Path | None:
    files = [Path(folder) / f"{kind}_{name}.py" for folder in _exports]
    return next((file for file in files if file.is_file()), None)


def _import_shipped(file: Path) -> ModuleType:
    """The module of a mixer in an export, as one of this package: it imports its siblings there by `from .X`."""
    name = f"{__package__}.{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_path_for(name: str) -> AbstractContextManager[None]:
    """The import path that a mixer of this name may come from."""
    return nullcontext() if name in _named_by_user else _without_working_directory()


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
