"""Job: the arguments of `distill` from a YAML file, or from the command line; functions are the user's own code, and are run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from whichkl._checks import InputError, WhichklError, cannot, require
from whichkl.user_code import call_user, load_function

if TYPE_CHECKING:
    from whichkl.files.yaml_file import YamlFile

TEXT = "text"
"""The teacher of a language model of which there is only the data's text."""
_CODE = ("teacher", "student", "data", "held_out", "stopping")
"""Arguments that may be the name of a function."""
_NEEDED = ("teacher", "student", "data")
_NUMBERS = ("hard_label_weight", "temperature", "learning_rate", "weight_decay", "clip", "epochs", "batch", "patience", "seed")
TYPES: dict[str, tuple[type, ...]] = {
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
    options: frozenset[str] = frozenset()
    """Names of the arguments that the command line gives in place of the file."""

    def missing(self, name: str) -> str:
        """Return the clause that an argument is missing: a key of the file, else an option."""
        return f"`{name}` is missing" if self.file is not None else f"`{name}=` is missing"

    @contextlib.contextmanager
    def naming(self, *place: Any) -> Iterator[None]:
        """Put the file and the line of a key before the message of an error in the block."""
        if self.file is None or self.file.values.get(place[0]) is None or place[0] in self.options:
            yield
            return
        with self.file.naming(*place):
            try:
                yield
            except WhichklError as error:
                error.args = (_with_keys(str(error), [place[0]]), *error.args[1:])
                raise

    @contextlib.contextmanager
    def as_in_file(self, names: Iterable[str]) -> Iterator[None]:
        """In errors about arguments of these names, write them as keys of the file, after the file and the line.

        Options of the command line stay options. An error that names no key gets the line of the key that it is about.
        """
        file = self.file
        try:
            yield
        except WhichklError as error:
            if file is None or str(error).startswith(str(file.path)):
                raise
            keys = [name for name in names if name not in self.options]
            text = _with_keys(str(error), keys)
            place = _place_of(text, [name for name in keys if file.values.get(name) is not None], file.values)
            error.args = (f"{file.path}{f', line {file.line_of(place)}' if place else ''}: {text}", *error.args[1:])
            raise


def _with_keys(text: str, names: Sequence[str]) -> str:
    """Write arguments of these names as keys of YAML."""
    pattern = rf"(?<![\w-])({'|'.join(map(re.escape, names))})=(?=([^\s`]?))"
    return re.sub(pattern, lambda at: f"{at[1]}: " if at[2] else f"{at[1]}:", text)


_ABOUT = {"teacher": "teacher", "student": "student", "examples?": "data", "prompts?": "data", "tokenizers?": "student"}
"""Words of errors without a key, and the key that they are about."""


def _place_of(text: str, keys: Sequence[str], values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the place that an error is about: the first key or value that it repeats, or that of a word; else nothing."""
    inner = values["args"] if "args" in keys and isinstance(values["args"], Mapping) else {}
    lists = [(name, i, one) for name in keys if isinstance(values[name], list) for i, one in enumerate(values[name])]
    texts: list[tuple[tuple[Any, ...], Any]] = [((name,), values[name]) for name in keys] + [
        ((name, i), one) for name, i, one in lists
    ]
    patterns: list[tuple[str, tuple[Any, ...]]] = [
        *((rf"`{re.escape(name)}\b[^`]*`", ("args", name)) for name in inner),
        *((rf"`{re.escape(name)}\b", (name,)) for name in keys),
        *((rf"(?<![\w-]){re.escape(name)}:", (name,)) for name in keys),
        *((rf"(?<![\w-]){re.escape(one)}(?![\w-])", place) for place, one in texts if isinstance(one, str)),
        *((rf"\b{word}\b", (name,)) for word, name in _ABOUT.items() if name in keys),
    ]
    for part in re.split(r"(?<=\w)\. (?=[A-Z])", text, maxsplit=1):  # what is wrong, then what to do
        for pattern, place in patterns:
            if re.search(pattern, part):
                return place
    return ()


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
    return JobFields({**fields, **(given or {})}, file, frozenset(given or {}))


def read_job(path: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a YAML file of arguments of `distill`, the functions written FILE.py:FUNCTION; arguments as of `read_fields`."""
    return job(read_fields(path, given))


def job(fields: JobFields) -> dict[str, Any]:
    """Return the arguments of `distill` that texts and numbers mean; an error names the file and the line."""
    with fields.as_in_file(TYPES):
        return _arguments(fields)


def _arguments(fields: JobFields) -> dict[str, Any]:
    values = fields.values
    for name in values:
        if name not in TYPES:
            with fields.naming(name):
                instead = f"Choose among {', '.join(TYPES)}"
                raise InputError(cannot(f"use `{name}`", "`distill` takes no such argument", instead))
    for name in _NEEDED:
        if values.get(name) is None:
            instead = f"Name a function without arguments, say {name}=nets.py:{name}"
            raise InputError(cannot("distill", fields.missing(name), instead))
    found: dict[str, Any] = {}
    for name, value in values.items():
        with fields.naming(name):
            found[name] = _meant(name, value)
    return found


def _meant(name: str, value: Any) -> Any:
    """Return what a value means: a number or a text as it is, and the function that a name means, called where it makes data."""
    if name in _CODE and isinstance(value, str):
        function = load_function(value, f"{name} {value}")
        makes = name in ("teacher", "student")
        return function if makes else call_user(function, f"read `{name}: {value}`", "Correct the function")
    if type(value) not in TYPES[name]:
        raise InputError(cannot(f"use `{name}: {value}`", f"a `{type(value).__name__}` has no meaning there", "Correct it"))
    return value
