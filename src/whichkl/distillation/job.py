"""Job: the arguments of `distill` from a YAML file, or from the command line; functions are the user's own code, and are run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot, require
from whichkl.user_code import call_user, load_function

_CODE = ("teacher", "student", "data", "held_out", "stopping")
_NEEDED = ("teacher", "student", "data")
_NUMBERS = ("hard_label_weight", "temperature", "learning_rate", "weight_decay", "clip", "epochs", "batch", "patience", "seed")
_TEXTS = ("objective", "optimizer")
_KNOWN = (*_CODE, *_TEXTS, *_NUMBERS, "temperature_squared")


def read_job(path: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a YAML file of arguments, the functions written FILE.py:FUNCTION, with paths from the file's folder.

    Args:
        path: the file.
        given: arguments that replace the file's, with paths from the working directory.

    Raises:
        InputError: it can't be read, or an argument isn't known or of the wrong type.
    """
    require("yaml", "app")
    from whichkl.files.yaml_file import read_yaml

    fields = read_yaml(path, "teacher: nets.py:teacher").values
    mine = dict(given or {})
    from_file = {name: value for name, value in fields.items() if name not in mine}
    both = {name: _from(path.parent, name, value) for name, value in from_file.items()}
    return job({**both, **mine})


def job(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `distill` that texts and numbers mean.

    Raises:
        InputError: an argument isn't known, is missing or is of the wrong type, or a file can't be imported.
    """
    for name in fields:
        if name not in _KNOWN:
            raise InputError(cannot(f"use `{name}`", "`distill` takes no such argument", f"Choose among {', '.join(_KNOWN)}"))
    for name in _NEEDED:
        if fields.get(name) is None:
            because = f"`{name}` is missing"
            raise InputError(cannot("distill", because, f"Name a function without arguments, say {name}: nets.py:{name}"))
    found: dict[str, Any] = {}
    for name, value in fields.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in _CODE and isinstance(value, str):
            function = load_function(value, f"{name} {value}")
            makes = name in ("teacher", "student")
            found[name] = function if makes else call_user(function, f"read `{name}: {value}`", "Correct the function")
        elif (name in _TEXTS and isinstance(value, str)) or (name == "temperature_squared" and isinstance(value, bool)):
            found[name] = value
        elif is_number and (name in _NUMBERS or name in ("stopping", "held_out")) or (name == "patience" and value is None):
            found[name] = value
        else:
            raise InputError(cannot(f"use `{name}: {value}`", f"a `{type(value).__name__}` has no meaning there", "Correct it"))
    return found


def _from(folder: Path, name: Any, value: Any) -> Any:
    """Put a folder before the path of a function."""
    return str(folder / value) if name in _CODE and isinstance(value, str) else value
