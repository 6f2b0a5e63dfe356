"""A mixer's own settings: a frozen dataclass that it defines. config.json holds them under the key `mixer_settings`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class NoSettings:
    """Of a mixer without settings of its own."""


def added(default: Any) -> Any:
    """A setting that a published mixer was given later. At its default, which must never change and means the mixer of
    before, config.json leaves it out: files, and what is made of them, stay as they were."""
    return field(default=default, metadata={"added": True})


def to_store(kinds: Mapping[str, type], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """config.json's mixer_settings: settings_by_mixer's result without added() settings at their defaults."""
    stored = {}
    for name, values in settings.items():
        idle = {
            each.name for each in fields(kinds[name]) if "added" in each.metadata and values[each.name] == each.default
        }
        stored[name] = {key: value for key, value in values.items() if key not in idle}
    return {name: values for name, values in stored.items() if values}


def settings_by_mixer(kinds: Mapping[str, type], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """All settings of a stack: for each mixer that has settings, those given and defaults for the rest.

    kinds: the Settings class of each of the stack's mixers by its name. given: settings by key; a key that several
    mixers have is for all of them. Raises ValueError for a key that no mixer has, and as settings_from.
    """
    known = sorted({entry.name for kind in kinds.values() for entry in fields(kind)})
    if unknown := [key for key in given if key not in known]:
        choices = f"choose one of {', '.join(known)}" if known else "there are none, so leave it out"
        raise ValueError(f"model.mixer.{unknown[0]} is not a setting of {', '.join(kinds)}: {choices}")
    found = {}
    for name, kind in kinds.items():
        own = {entry.name for entry in fields(kind)}
        found[name] = asdict(settings_from(kind, {key: given[key] for key in given if key in own}))
    return {name: values for name, values in found.items() if values}


def settings_from(kind: type, given: Mapping[str, Any]) -> Any:
    """The settings of one mixer: what is given, and defaults for the rest.

    Raises ValueError for a key that the mixer does not have, and a value of another type or out of its range.
    """
    hints, known = get_type_hints(kind), [entry.name for entry in fields(kind)]
    if unknown := [key for key in given if key not in known]:
        raise ValueError(
            f"model.mixer.{unknown[0]} is not a setting of the mixer, which has {', '.join(known) or 'none'}"
        )
    own = {key: _checked(key, value, hints[key]) for key, value in given.items()}
    try:
        return kind(**own)
    except ValueError as error:
        raise ValueError(f"model.mixer.{error}") from error


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, a whole number as a float where the setting is one."""
    if hint is float and type(value) is int:
        return float(value)
    allowed = [(type(choice), choice) for choice in get_args(hint)]
    if (type(value), value) in allowed if get_origin(hint) is Literal else type(value) is hint:
        return value
    raise ValueError(f"model.mixer.{name} must be {in_words(hint)}, not {value!r}")


def in_words(hint: Any) -> str:
    """What a setting of this type may be."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return _WORDS.get(hint, str(hint))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
