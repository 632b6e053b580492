"""Arguments: what a function's annotations say of each argument is checked at the call, and NumPy's numbers become Python's."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from whichkl._checks import InputError, as_int, as_number, cannot

P = ParamSpec("P")
R = TypeVar("R")
_LARGEST = 2**63
_MAX_SHOWN = 40
"""Largest number of characters of a value that a message shows."""


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments of other types than the annotations name.

    Checked are True and False, numbers, texts, paths, functions, lists of names, classes, None, and unions of these. An argument
    with any other annotation isn't checked.

    >>> @typed
    ... def draw(n: int, names: Sequence[str] | None = None) -> int:
    ...     return n
    >>> draw("many")
    Traceback (most recent call last):
        ...
    whichkl._checks.InputError: Cannot use `n='many'`: a `str` isn't a whole number. Give a whole number.
    """
    plain = inspect.unwrap(function)
    parameters = inspect.signature(plain).parameters
    annotations = {name: one.annotation for name, one in parameters.items() if isinstance(one.annotation, str)}
    by_position = [name for name, one in parameters.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        names = plain.__globals__
        given = [_checked(name, value, annotations.get(name), names) for name, value in zip(by_position, args, strict=False)]
        named = {name: _checked(name, value, annotations.get(name), names) for name, value in kwargs.items()}
        return function(*given, *args[len(given) :], **named)  # type: ignore[arg-type]

    return checked


def _checked(name: str, value: Any, annotation: str | None, names: dict[str, Any]) -> Any:
    """Return a value, read as a number where one is wanted; refuse it where no alternative of the annotation takes it."""
    if annotation is None:
        return value
    wanted = []
    for alternative in _alternatives(annotation):
        word = re.sub(r"\[.*", "", alternative)
        takes = _KINDS.get(alternative) or _KINDS.get(word) or _class_named(word, names)
        if takes is None:
            return value
        words, read = takes
        found = read(value)
        if found is not _REFUSED:
            return found
        wanted.append(words)
    shown = repr(value) if isinstance(value, (str, bytes, int, float, complex, type(None))) else ""
    what = f"`{name}={shown}`" if 0 < len(shown) <= _MAX_SHOWN else f"this `{name}`"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise InputError(cannot(f"use this `{name}`", "it is a number of more than 18 digits", "Give a smaller one"))
    words = " or ".join([one for one in wanted if one != "None"] or ["None"])
    instead = f"Give {words}" + (", or leave it out" if "None" in wanted else "")
    kind = type(value).__name__
    found = "None" if value is None else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} `{kind}`"
    found = f"the class `{value.__name__}`" if isinstance(value, type) else found
    raise InputError(cannot(f"use {what}", f"{found} isn't {words}", instead))


@functools.cache
def _alternatives(annotation: str) -> list[str]:
    """Split a union at its outer bars.

    >>> _alternatives("Callable[[str | int], None] | None")
    ['Callable[[str | int], None]', 'None']
    """
    depth, parts = 0, [""]
    for one in annotation:
        depth += (one in "[(") - (one in "])")
        parts = [*parts, ""] if one == "|" and depth == 0 else [*parts[:-1], parts[-1] + one]
    return [part.strip() for part in parts]


def _class_named(text: str, names: dict[str, Any]) -> tuple[str, Callable[[Any], Any]] | None:
    """Return the words and the test for a class of the function's module; None for anything else, such as `Any`."""
    found: Any = None
    for part in text.split("."):
        found = names.get(part) if found is None else getattr(found, part, None)
    if not isinstance(found, type) or found is Any or getattr(found, "_is_protocol", False):
        return None
    word = f"a `{found.__name__}`"
    return word, lambda value: value if isinstance(value, found) else _REFUSED


_REFUSED = object()


def _when(is_right: Callable[[Any], bool]) -> Callable[[Any], Any]:
    return lambda value: value if is_right(value) else _REFUSED


def _bool(value: Any) -> Any:
    is_numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    return value if isinstance(value, bool) else bool(value) if is_numpys else _REFUSED


def _int(value: Any) -> Any:
    number = as_int(value)
    return number if isinstance(number, int) and not isinstance(number, bool) and abs(number) < _LARGEST else _REFUSED


def _float(value: Any) -> Any:
    number = as_number(value)
    return number if isinstance(number, (int, float)) and not isinstance(number, bool) else _REFUSED


def _are_names(value: Any) -> bool:
    """Whether it is a list of texts or numbers, which name columns."""
    if isinstance(value, (str, bytes, dict, set)) or not isinstance(value, Iterable) or not hasattr(value, "__len__"):
        return False
    is_flat = getattr(value, "ndim", 1) == 1
    return is_flat and all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in map(as_int, value))


_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "None": ("None", _when(lambda value: value is None)),
    "bool": ("True or False", _bool),
    "int": ("a whole number", _int),
    "float": ("a number", _float),
    "str": ("a text", _when(lambda value: isinstance(value, str))),
    "os.PathLike": ("a path", _when(lambda value: isinstance(value, os.PathLike))),
    "Callable": ("a function", _when(lambda value: callable(value) and not isinstance(value, type))),
    "Function": ("a function", _when(lambda value: callable(value) and not isinstance(value, type))),
    "Sequence[str]": ("a list of names", _when(_are_names)),
    "Sequence": ("", lambda value: value),
    "dict": ("a dict", _when(lambda value: isinstance(value, dict))),
    "Mapping": ("a dict", _when(lambda value: isinstance(value, Mapping))),
}
"""The words and the test for an annotation; a test returns the value as it's read, or `_REFUSED`."""
