"""`radlads mixers`: its options, and what it says. Imports no torch before it has to."""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads mixers`."""
    what = "a mixer, of which everything is said (default: a line on each that is found)"
    parser.add_argument("name", nargs="?", metavar="NAME", help=what)


def mixer_lines(arguments: argparse.Namespace) -> Iterator[str]:
    """What add_options' arguments ask for. Raises ValueError for a mixer that cannot be found."""
    return _every_mixer() if arguments.name is None else _one_mixer(arguments.name)


def _every_mixer() -> Iterator[str]:
    """A line on each mixer that is registered or has a file on the import path. No such file is run."""
    from radlads.model.registry import MIXER_ALIASES, files_of_time_mixers, known_mixers

    told = {name: kind.name_for_people() for name, kind in known_mixers().items()}
    for alias, name in MIXER_ALIASES.items():
        told[name] += f", also called {alias}"
    own = {name: str(file) for name, file in files_of_time_mixers().items() if name not in told}
    width = max(map(len, told | own)) + 2
    yield from (f"{name:{width}}{what}" for name, what in (told | own).items())


def _one_mixer(name: str) -> Iterator[str]:
    """What a mixer's class says about itself."""
    from radlads.model.registry import mixer_class, name_mixers, registered_name
    from radlads.model.time_mixer import Use

    name_mixers(name)
    kind = mixer_class(name)
    yield f"{registered_name(name)}: {kind.name_for_people()}"
    yield f"state: {'grows with the text' if kind.state_grows else 'has one size, however long the text is'}"
    if kind.shares_first_values:
        yield "first values: the first layer of this mixer makes them, later ones mix them in"
    yield f"from the teacher: {', '.join(kind.from_teacher) or 'nothing'}; all else is fresh"
    yield f"decay and shift (train.trainable decay): {', '.join(kind.decay_and_shift) or 'none'}"
    yield from _variant_lines(kind.variants)
    yield from _setting_lines(kind.Settings)
    obstacles = {use: kind.obstacle(use) for use in get_args(Use)}
    yield f"made for: {', '.join(use for use, why in obstacles.items() if why is None) or 'none of the uses below'}"
    yield from (f"not for {use}: {why}" for use, why in obstacles.items() if why is not None)


def _variant_lines(variants: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    for number, (name, keys) in enumerate(variants.items()):
        values = ", ".join(f"{key} {value}" for key, value in keys.items())
        yield f"variant {name}{' (default)' if number == 0 else ''}: {values}"


def _setting_lines(kind: type) -> Iterator[str]:
    """Each setting with its type, its default and its help."""
    from radlads.model.mixer_settings import in_words

    hints, helps = get_type_hints(kind), _helps(kind)
    if not fields(kind):
        yield "settings: none"
    for entry in fields(kind):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = "no default" if default is MISSING else f"default {default!r}"
        yield f"--model.mixer.{entry.name}: {in_words(hints[entry.name])}, {value}"
        if entry.name in helps:
            yield textwrap.indent(textwrap.fill(helps[entry.name], 116), "    ")


def _helps(kind: type) -> dict[str, str]:
    """The docstring below each field, on one line; a subclass's before those of the classes it builds on."""
    helps: dict[str, str] = {}
    for cls in reversed([each for each in kind.__mro__ if each is not object]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    helps[name] = " ".join(text.split())
    return helps
