"""Scorecard: a model measured by every measure that the access allows, on draws that no fit has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from whichkl._checks import ResourceError
from whichkl.divergences import Estimate
from whichkl.process.memory import refuse_if_ran_out
from whichkl.study.held_out import Held
from whichkl.study.measurements import Sides
from whichkl.study.measures import MEASURES
from whichkl.user_code import said_of


@dataclass
class Scorecard:
    """Columns of a row, and the details that don't fit into one number."""

    columns: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    values: dict[str, Estimate] = field(default_factory=dict)


def score(model: Any, held: Held, measures: tuple[str, ...], metrics: dict[str, Callable[..., Any]], draws: int) -> Scorecard:
    """Measure a model; a measure that the access doesn't allow stays empty, and a note tells why one failed.

    Args:
        model: q, a `Distribution`, or a function of contexts that returns one.
        held: draws of p that no fit of this seed has seen, where there are any.
        measures: names of `MEASURES`.
        metrics: the user's own, by name: f(model, draws) returns a number, or several by name; draws is (m, d) or None.
        draws: number of draws of q.
    """
    card, sides = Scorecard(), Sides(model, held, draws)
    for name in measures:
        _measure(name, sides, card)
    if held.groups is not None and held.whole.repeats is not None:
        card.notes.append(held.whole.repeats.note)
    for name, metric in metrics.items():
        card.columns.update(_call_metric(name, metric, model, held, card))
    for one in MEASURES.values():
        for column in one.fields:
            card.columns.setdefault(column, None)
    return card


def _measure(name: str, sides: Sides, card: Scorecard) -> None:
    """Take one measure; one that fails doesn't take the others with it."""
    try:
        found = MEASURES[name].function(sides)
    except ResourceError:
        raise
    except Exception as error:
        _note_failure(name, error, card)
        return
    if found is None:
        return
    card.columns.update(found.columns)
    if found.details is not None:
        card.details[name] = found.details
    if found.estimate is not None:
        card.values[name] = found.estimate
    if found.note:
        card.notes.append(found.note)


def _call_metric(name: str, metric: Callable[..., Any], model: Any, held: Held, card: Scorecard) -> dict[str, Any]:
    """Call a metric of the user's own; what it raises becomes a note."""
    try:
        found = metric(model, held.x)
        values = {f"{name}.{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}
        return {key: float(value) for key, value in values.items()}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own code raises, SystemExit too
        _note_failure(name, error, card)
        return {name: None}


def _note_failure(name: str, error: BaseException, card: Scorecard) -> None:
    refuse_if_ran_out(error, f"measure `{name}`")
    if isinstance(error, SystemExit):
        reason = said_of(error)
    else:
        text = " ".join(str(error).split())[:200]
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    card.notes.append(f"{name} wasn't measured ({reason})")
