"""Values of keys that the schema leaves open, such as model.mixer.KEY: their types are only known to their mixer."""

import re

import yaml

# A number to whoever writes it, and text to YAML 1.1, which wants a point and a sign
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def in_yaml(key: str, value: object, place: str) -> object:
    """What YAML reads in a value that was given as text, such as on the command line.

    Raises ValueError for text that is no YAML, naming key and place.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{key} {place} must be a value in YAML, not {value!r}: put text in quotes") from error


def spelt_out(value: object) -> object:
    """A number such as 1e-3 as one; anything else as it is."""
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
