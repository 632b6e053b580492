"""Reading: JSON and tensors from files are checked before they are used."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from whichkl._checks import WhichklError

T = TypeVar("T")
_MAX_JSON_BYTES = 2**28
_MAX_SHOWN = 60
"""Largest number of characters of a wrong value that a message shows."""
_NUMBER_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""Numbers that JSON doesn't have, as `_checks.plain` writes them."""


def read_json(data: bytes) -> Any:
    """Read JSON of a bounded size and depth in which names are distinct and numbers finite; anything else is a `ValueError`.

    >>> read_json(b'{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    if len(data) > _MAX_JSON_BYTES:
        raise ValueError(f"it has {len(data):,} bytes, more than {_MAX_JSON_BYTES:,}")
    try:
        return json.loads(data, object_pairs_hook=_distinct, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError("it isn't JSON" if data.strip() else "it is empty") from None


def read_file(path: Path) -> bytes:
    """Read a file; what isn't a regular file, such as a pipe, is never opened, since reading it may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it isn't a regular file", str(path))
    return path.read_bytes()


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """Read tensors by name from the bytes of a safetensors file; a `ValueError` says why they aren't a whole one."""
    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"it isn't a whole safetensors file ({' '.join(str(error).split())[:200]})") from error


def checked(kind: Any, value: Any, place: str = "") -> Any:
    """Return a value from a JSON file as the type that an annotation names.

    Args:
        kind: None, bool, int, float, str, `Literal`, a union, `tuple[X, ...]`, `list[X]`, `Mapping[str, X]`, `Any`, a dataclass
            or a `TypedDict`. Integers count as floats too, and so do the texts "inf", "-inf" and "nan".
        value: what `read_json` returned.
        place: where the value is in the file, for messages.

    Raises:
        ValueError: the value isn't of that type; the message names the place.

    >>> checked(tuple[float, ...], [1, "inf"])
    (1.0, inf)
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or (kind in (bool, int, str) and type(value) is kind) or (kind in (None, types.NoneType) and value is None):
        return value
    if kind is float and type(value) is str and value in _NUMBER_WORDS:
        return _NUMBER_WORDS[value]
    if kind is float and type(value) in (int, float):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            return float(value)
    if origin is Literal and type(value) in (str, int, bool) and value in arguments:
        return value
    if origin in (Union, types.UnionType):
        return _of_union(arguments, value, place)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(checked(arguments[0], one, f"{place}[{i}]") for i, one in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {name: checked(arguments[1], one, _below(place, name)) for name, one in value.items()}
    if is_typeddict(kind) and isinstance(value, dict):
        return _of_fields(kind, value, place, set(kind.__optional_keys__), strict=False)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        return rebuilt(kind, value, place)
    raise ValueError(f"{place or 'the value'} is {_shown(value)}")


def rebuilt(kind: type[T], value: Mapping[str, Any], place: str = "") -> T:
    """Make a dataclass from its fields as JSON holds them; a `ValueError` names what is missing, unknown or of another type."""
    known = [one for one in fields(kind) if one.init]  # type: ignore[arg-type]
    optional = {one.name for one in known if one.default is not MISSING or one.default_factory is not MISSING}
    return kind(**_of_fields(kind, value, place, optional, strict=True))


def _of_fields(kind: Any, value: Mapping[str, Any], place: str, optional: set[str], *, strict: bool) -> dict[str, Any]:
    hints = get_type_hints(kind)  # without `NotRequired`
    for name in hints:
        if name not in value and name not in optional:
            raise ValueError(f"{_below(place, name)} is missing")
    unknown = [name for name in value if name not in hints]
    if strict and unknown:
        raise ValueError(f"{_below(place, unknown[0])} has no meaning")
    found = {name: checked(hint, value[name], _below(place, name)) for name, hint in hints.items() if name in value}
    return found if strict else {**value, **found}


def _of_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    errors: list[ValueError] = []
    for kind in kinds:
        try:
            return checked(kind, value, place)
        except WhichklError:
            raise
        except ValueError as error:
            errors.append(error)
    raise max(errors, key=lambda error: len(str(error)))  # the kind that matched furthest


def _below(place: str, name: str) -> str:
    shown = name if name.isidentifier() and len(name) <= _MAX_SHOWN else _shown(name)
    return f"{place}.{shown}" if place else shown


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_shown(next(name for name in names if names.count(name) > 1))} appears in it twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"it contains {text}, which JSON doesn't have")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it contains {text[:_MAX_SHOWN]}, which is too large")
    return value
