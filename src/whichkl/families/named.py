"""Named: families as texts such as "mixture:3:diagonal", and the texts of those that take the values of y."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import re
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, WhichklError, cannot
from whichkl.families.family import Family

_MAX_CLASSES = 20
"""Largest number of values that may be classes; more are counts."""


def family_named(text: str) -> Family:
    """Return the family that a text describes: its name, then its fields in their order, separated by colons.

    Numbers are numbers, ``a,b`` is a tuple, and fields that are left out have their defaults. ``field=value`` sets a field out of
    its turn.

    Args:
        text: such as ``gaussian``, ``gaussian:low_rank:2``, ``mixture:auto:tied``, ``product:normal,gamma``,
            ``product:smoothing=1`` or ``flow``.

    Raises:
        InputError: there is no such family, or it can't have these fields; the message lists the families.

    >>> family_named("mixture:3:diagonal")
    Mixture(components=3, covariance='diagonal', law='gaussian')
    >>> family_named("product:normal,gamma")
    Product(margins=('normal', 'gamma'))
    """
    known, (name, *values) = named_families(), (part.strip() for part in text.split(":"))
    kind = known.get(name)
    if kind is None:
        near = get_close_matches(_small(name).replace("-", "_").replace(" ", "_"), known, 1)
        meant = f"Did you mean `{near[0]}`? " if near else ""
        raise InputError(
            cannot(f"use the family `{text}`", "it isn't a known one", f"{meant}Choose among {', '.join(grammar())}")
        )
    given = _fields_in(values, kind)
    if given is None:
        raise InputError(cannot(f"use the family `{text}`", f"it is written {_written(name, kind)}", _correction(kind)))
    try:
        return kind(**given)
    except WhichklError as error:
        raise InputError(f"{error} The family is written {_written(name, kind)}. {_correction(kind)}.") from error
    except (TypeError, ValueError) as error:
        raise InputError(cannot(f"use the family `{text}`", str(error), f"Write {_written(name, kind)}")) from error


def _fields_in(values: list[str], kind: type[Family]) -> dict[str, Any] | None:
    """Return the fields that texts set, those without a name in their order; None if the texts can't be read so."""
    known = fields(kind)  # type: ignore[arg-type]
    names, found = [one.name for one in known], dict[str, Any]()
    in_turn = len(list(itertools.takewhile(lambda value: "=" not in value, values)))
    for i, text in enumerate(values):
        name, _, value = ("" if i >= len(names) else names[i], "", text) if i < in_turn else text.partition("=")
        if name not in names or name in found or not value:
            return None
        found[name] = _value(value)
    needed = {one.name for one in known if one.default is MISSING and one.default_factory is MISSING}
    return found if needed <= found.keys() else None


def _correction(kind: type[Family]) -> str:
    """Return how to set the last field alone, for a family with several."""
    last = fields(kind)[-1:]  # type: ignore[arg-type]
    return f"Correct it; a field out of its turn is written `{last[0].name}=…`" if last else "Leave the fields out"


def name_in(text: str) -> str | None:
    """Return the shortest name of the first family that a sentence writes in Python; None if it writes none that has a name.

    >>> name_in("Try a richer one, such as Mixture(2, covariance='diagonal').")
    'mixture:2:diagonal'
    """
    names = {kind.__name__: name for name, kind in named_families().items()}
    for kind, arguments in re.findall(r"(\w+)\(([^()]*)\)", text):
        if kind in names:
            with contextlib.suppress(InputError, SyntaxError, ValueError, TypeError):  # words in brackets that are no call
                return _name_of(names[kind], _called(Family.kinds[kind], arguments))
    return None


def _called(kind: type[Family], arguments: str) -> Family:
    """Return the family that a call in a sentence makes."""
    call: Any = ast.parse(f"f({arguments})", mode="eval").body
    given = [ast.literal_eval(one) for one in call.args]
    return kind(*given, **{str(one.arg): ast.literal_eval(one.value) for one in call.keywords})


def _name_of(name: str, family: Family) -> str | None:
    """Return the shortest text of a family; None if it has none."""
    texts, is_in_turn = [name], True
    for one in fields(family):  # type: ignore[arg-type]
        with contextlib.suppress(InputError):
            if family_named(":".join(texts)) == family:
                break
        value = getattr(family, one.name)
        if value == one.default:
            is_in_turn = False
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        texts.append(text if is_in_turn else f"{one.name}={text}")
    found = ":".join(texts)
    return found if family_named(found) == family else None


def named_families() -> dict[str, type[Family]]:
    """Return the families by their names in small letters; every subclass of `Family` that can be made is one of them."""
    from whichkl import families

    own = [name for name in families.__all__ if name in Family.kinds]
    names = [*own, *(name for name, one in Family.kinds.items() if name not in own and is_dataclass(one))]
    return {_small(name): Family.kinds[name] for name in names if not inspect.isabstract(Family.kinds[name])}


def grammar() -> list[str]:
    """Return the form of each family's text, such as ``mixture:COMPONENTS[:COVARIANCE[:LAW]]``."""
    return [_written(name, kind) for name, kind in named_families().items()]


def conditional_families(y: Float[Tensor, "n d"]) -> tuple[str, tuple[str, ...]]:
    """Return what y holds in words, and the families of y given x that take it, the simplest first.

    Args:
        y: some or all rows of y.

    >>> import torch
    >>> conditional_families(torch.tensor([[0.0], [1.0], [1.0]]))[1][0]
    'GeneralizedLinear("bernoulli")'
    """
    least, most = float(y.min()), float(y.max())
    if bool((y != y.round()).any()) or least < 0 or least == most:
        return "real numbers", ("LinearGaussian()", "MixtureDensityNetwork()", 'Neural("normal")', "Flow()")

    def networks(response: str) -> tuple[str, ...]:
        neural = f'Neural("{response}")'
        return (f'GeneralizedLinear("{response}")', neural) if y.shape[1] == 1 else (neural,)  # the first takes one column

    if most == 1:
        return "0 and 1", (*networks("bernoulli"), "Autoregressive()")
    counts, classes = networks("poisson"), networks("categorical")
    if most < _MAX_CLASSES and len(y.unique()) == most + 1:
        return f"whole numbers from 0 to {most:.0f}, which may be classes or counts", (*classes, *counts)
    return "whole numbers from 0", (*counts, "LinearGaussian()", "MixtureDensityNetwork()")


def _written(name: str, kind: type[Family]) -> str:
    text, depth = name, 0
    for one in fields(kind):  # type: ignore[arg-type]
        needed = one.default is MISSING and one.default_factory is MISSING
        text += f"{'' if needed else '['}:{one.name.upper()}"
        depth += not needed
    return text + "]" * depth


def _small(name: str) -> str:
    """GeneralizedLinear → generalized_linear."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _value(text: str) -> Any:
    """Read a number, a word, or several separated by commas."""
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(",") if part.strip())
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d*\.\d+|\d+\.", text):
        return float(text)
    return text
