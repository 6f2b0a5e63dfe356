"""Files and overrides to a checked `Config`, and back to YAML. The types are checked by jsonargparse.

Everything a user can get wrong is a `ValueError` of one sentence that names key, place and remedy. Nothing is printed
here: what is to be shown goes to the caller's `write`.
"""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jsonargparse
import yaml

from radlads.config.layer_lists import as_text
from radlads.config.open_values import in_yaml, spelt_out
from radlads.config.schema import Config, ModelConfig

ON_COMMAND_LINE = "on the command line"
USAGE = "radlads train [-c FILE ...] [--KEY VALUE ...] [--mixer-path DIR] [--print_config]"


class _Setting(NamedTuple):
    value: object
    place: str


_Settings = dict[str, _Setting]

# Where released files name the teacher's folder; ours is the key that every reader knows
_RELEASED_NAMES = {"train.teacher.model.hf_path": "train.teacher.hf_path"}


def parse_config(argv: Sequence[str], write: Callable[[str], None]) -> Config:
    """The configuration that a command line asks for.

    `-c FILE` or `--config FILE` may be repeated, and later files win; `--model.n_layer 12` and `--train.lr_init=6e-4`
    win over all files, wherever they stand. `--help` and `--print_config` hand their text to `write` and raise
    SystemExit(0). Anything wrong is a ValueError of one sentence.
    """
    words = [_without_colon(word) for word in argv]
    named = (word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--"))
    try:
        options, extras = _command_line(frozenset(filter(_is_open, named))).parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"{str(error).removeprefix('argument ')}; --help lists every option") from error
    if options.help:
        write(_schema_parser().format_help())
        raise SystemExit(0)
    if extras:
        raise ValueError(_unexpected_word(extras))
    overrides = {key: value for key, value in vars(options).items() if key in _leaves() or _is_open(key)}
    config = _resolve(options.files, overrides, ON_COMMAND_LINE)
    if options.print_config:
        write(dump_config(config))
        raise SystemExit(0)
    return config


def load_config(files: Iterable[str | Path], overrides: Mapping[str, object]) -> Config:
    """The configuration of YAML or JSON files, later over earlier, then dotted keys such as {"train.lr_init": 6e-4}.

    Anything wrong is a ValueError of one sentence.
    """
    return _resolve(files, overrides, "in the overrides")


def dump_config(config: Config) -> str:
    """YAML of every key, from which `load_config` makes an equal configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _resolve(files: Iterable[str | Path], overrides: Mapping[str, object], overrides_place: str) -> Config:
    settings: _Settings = {}
    for file in files:
        settings |= _settings(_read(Path(file)), f"in {file}")
    read = {key: in_yaml(key, value, overrides_place) if _is_open(key) else value for key, value in overrides.items()}
    settings |= _settings(read, overrides_place)
    closed = {key: setting for key, setting in settings.items() if not _is_open(key)}
    parser = _schema_parser()
    try:
        parsed = parser.parse_object({key: setting.value for key, setting in closed.items()})
    except argparse.ArgumentError as error:
        wrong = next(key for key, setting in closed.items() if not _accepts(key, setting.value))
        raise ValueError(_wrong_type(wrong, *settings[wrong])) from error
    try:
        parts = parser.instantiate(parsed)
        model, train = _with_mixer(parts.model, "model", settings), parts.train
        teacher_model = _with_mixer(train.teacher.model, "train.teacher.model", settings)
        return Config(model=model, train=replace(train, teacher=replace(train.teacher, model=teacher_model)))
    except ValueError as error:
        key, _, rest = str(error).partition(" ")
        place = f" {settings[key].place}" if key in settings else ""
        raise ValueError(f"{key}{place} {rest}") from error


def _with_mixer(section: ModelConfig, prefix: str, settings: _Settings) -> ModelConfig:
    """A model section with its open keys, sorted: jsonargparse would read their text once more."""
    own = {key: settings[key].value for key in sorted(settings) if key.startswith(f"{prefix}.mixer.")}
    return replace(section, mixer={key.rpartition(".")[2]: value for key, value in own.items()})


def _settings(mapping: Mapping[Any, object], place: str, prefix: str = "") -> _Settings:
    """Dotted keys and values of a nested mapping, spelt as the schema wants them. Unknown keys are an error."""
    settings: _Settings = {}
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if name == "__type__":
            continue
        if key in _leaves():
            if value is None and not _accepts(key, None):
                raise ValueError(_wrong_type(key, None, place))
            ours = _RELEASED_NAMES.get(key, key) if value else key  # a dumped configuration has '' here
            settings[ours] = _Setting(_spelt_as(key, value), place)
        elif _is_open(key):
            settings[key] = _Setting(spelt_out(value), place)
        elif key not in _groups():
            raise ValueError(_unknown_key(key, place))
        elif isinstance(value, Mapping):
            settings |= _settings(value, place, f"{key}.")
        elif value is None:
            raise ValueError(f"{key} {place} is empty: give it keys or delete it")
        else:
            raise ValueError(f"{key} {place} must be a mapping of keys to values, not {value!r}")
    return settings


def _spelt_as(key: str, value: object) -> object:
    """`value` for a key, by its type: true is 1 for a switch, a whole number is text where text is held, and so is a
    list or mapping of layers."""
    hint = _leaves()[key]
    if key.rpartition(".")[2] in ("softmax_layers", "layer_mixers"):
        value = as_text(value)
    of_type = type(get_args(hint)[0]) if get_origin(hint) is Literal else hint
    if get_origin(hint) is Literal and of_type is int:
        return {"true": 1, "false": 0}.get(str(value).lower(), value)
    return str(value) if of_type is str and type(value) is int else value


def _accepts(key: str, value: object) -> bool:
    if value is None:  # which jsonargparse takes for "not given", whatever the type
        return NoneType in get_args(_leaves()[key])
    try:
        _schema_parser().parse_object({key: value})
    except argparse.ArgumentError:
        return False
    return True


def _wrong_type(key: str, value: object, place: str) -> str:
    found = "null" if value is None else repr(value)
    return f"{key} {place} must be {_described(_leaves()[key])}, not {found}"


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    names = {
        int: "an integer",
        float: "a number",
        str: "text (in quotes where YAML reads it otherwise)",
        NoneType: "null",
    }
    kinds = get_args(hint) or [hint]
    return " or ".join(_described(kind) if get_origin(kind) is Literal else names[kind] for kind in kinds)


def _unknown_key(key: str, place: str) -> str:
    near = difflib.get_close_matches(key, [*_leaves(), *_groups()], n=1)
    return f"unknown key {key!r} {place}: " + (f"did you mean {near[0]!r}?" if near else "--help lists every key")


def _unexpected_word(words: Sequence[str]) -> str:
    word = next((word for word in words if word.startswith("--")), words[0])
    key = word.removeprefix("--").partition("=")[0]
    if not word.startswith("--"):
        return f"unexpected {word!r} on the command line: files are given as -c FILE and keys as --train.lr_init 6e-4"
    if key in _groups():
        example = next(_leaves_below(key), f"{key}.KEY")
        return f"{key} on the command line is a group: set its keys, such as --{example}"
    return _unknown_key(key, ON_COMMAND_LINE)


def _without_colon(word: str) -> str:
    return re.sub(r"^(--[\w.]+):(?==|$)", r"\1", word)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise argparse.ArgumentError(None, message)


@cache
def _command_line(open_keys: frozenset[str]) -> argparse.ArgumentParser:
    """Splits a command line into files and key-value pairs; the values stay text. open_keys: those it may have."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[], dest="files")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--print_config", action="store_true")
    for key in (*_leaves(), *open_keys):
        parser.add_argument(f"--{key}", default=argparse.SUPPRESS)
    return parser


@cache
def _schema_parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, usage=USAGE)
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML or JSON file of keys; repeatable, later ones win.")
    parser.add_argument("--print_config", action="store_true", help="Print every key's resulting value as YAML.")
    parser.add_class_arguments(Config)
    for action in parser._actions:
        if action.dest in _groups():
            action.help = argparse.SUPPRESS
    return parser


@cache
def _leaves() -> dict[str, Any]:
    """Every dotted key that holds a value, with its type, but for open ones."""
    return {key: hint for key, hint in _walk(Config) if key not in _groups()}


@cache
def _groups() -> frozenset[str]:
    return frozenset(key for key, hint in _walk(Config) if is_dataclass(hint)) | _open_groups()


@cache
def _open_groups() -> frozenset[str]:
    """The groups whose keys the schema leaves open."""
    return frozenset(key for key, hint in _walk(Config) if get_origin(hint) is dict)


def _is_open(key: str) -> bool:
    group, _, name = key.rpartition(".")
    return group in _open_groups() and name.isidentifier()


def _leaves_below(group: str) -> Iterator[str]:
    return (key for key in _leaves() if key.startswith(f"{group}."))


def _walk(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for entry in fields(cls):
        yield f"{prefix}{entry.name}", entry.type
        if is_dataclass(entry.type):
            yield from _walk(entry.type, f"{prefix}{entry.name}.")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader for which a key given twice in one mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read(file: Path) -> Mapping[Any, object]:
    if file.is_dir():
        raise ValueError(f"config {file} is a folder: name one of the files in it")
    if not file.exists():
        raise ValueError(f"config file {file} does not exist: check the path after -c")
    try:
        text = file.read_text(encoding="utf-8")
        # JSON is YAML but for tabs, which it allows between tokens only.
        content = yaml.load(text.expandtabs() if file.suffix == ".json" else text, _UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {file} is not UTF-8 text: save it as such") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"cannot read {file}{line}: {error.problem}; correct it there") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}; correct it there") from error
    if content is None:
        raise ValueError(f"config file {file} is empty: give it keys or leave it out")
    if not isinstance(content, Mapping):
        raise ValueError(f"config file {file} must hold a mapping of keys to values, not {type(content).__name__}")
    return content
