"""Job: the arguments of `distill` from a YAML file, or from the command line; functions are the user's own code, and are run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from whichkl._checks import InputError, cannot, require
from whichkl.user_code import call_user, load_function

if TYPE_CHECKING:
    from whichkl.files.yaml_file import YamlFile

TEXT = "text"
"""The teacher of a language model of which there is only the data's text."""
_CODE = ("teacher", "student", "data", "held_out", "stopping")
"""Arguments that may be the name of a function."""
_NEEDED = ("teacher", "student", "data")
_NUMBERS = ("hard_label_weight", "temperature", "learning_rate", "weight_decay", "clip", "epochs", "batch", "patience", "seed")
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_CODE, (int, float)),
    **dict.fromkeys(_NEEDED, ()),
    **dict.fromkeys(("objective", "optimizer"), (str,)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    "patience": (int, float, type(None)),
    "temperature_squared": (bool,),
}
"""Every argument, and the types that it can have if it isn't the name of a function."""


class JobFields(NamedTuple):
    """Arguments as they are written, and the file that they are from, if there is one."""

    values: dict[str, Any]
    file: YamlFile | None = None


def read_fields(path: Path, given: Mapping[str, Any] | None = None) -> JobFields:
    """Read a YAML file of arguments, with paths from the file's folder.

    Args:
        path: the file.
        given: arguments that replace the file's, with paths from the working directory.
    """
    require("yaml", "app")
    from whichkl.files.yaml_file import read_yaml

    file = read_yaml(path, "teacher: nets.py:teacher")
    fields = dict(file.values)
    for name, value in fields.items():
        if name in _CODE and isinstance(value, str) and value != TEXT:
            fields[name] = str(path.parent / value)
    return JobFields({**fields, **(given or {})}, file)


def read_job(path: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a YAML file of arguments of `distill`, the functions written FILE.py:FUNCTION; arguments as of `read_fields`."""
    return job(read_fields(path, given).values)


def job(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `distill` that texts and numbers mean."""
    for name in fields:
        if name not in _TYPES:
            raise InputError(cannot(f"use `{name}`", "`distill` takes no such argument", f"Choose among {', '.join(_TYPES)}"))
    for name in _NEEDED:
        if fields.get(name) is None:
            because = f"`{name}` is missing"
            raise InputError(cannot("distill", because, f"Name a function without arguments, say {name}: nets.py:{name}"))
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _CODE and isinstance(value, str):
            function = load_function(value, f"{name} {value}")
            makes = name in ("teacher", "student")
            found[name] = function if makes else call_user(function, f"read `{name}: {value}`", "Correct the function")
        elif type(value) in _TYPES[name]:
            found[name] = value
        else:
            raise InputError(cannot(f"use `{name}: {value}`", f"a `{type(value).__name__}` has no meaning there", "Correct it"))
    return found
