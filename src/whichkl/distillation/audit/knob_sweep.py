"""Knob sweeps: which divergence is at each end of a knob, and whether the path between them reaches its ends."""

from __future__ import annotations

import torch

from whichkl._checks import InputError, cannot
from whichkl.distillation.audit.identify import tries
from whichkl.distillation.audit.result import Check
from whichkl.distillation.audit.subject import Subject

_NEAR_END = 1e-4
"""Share of the range: the nearest points to the ends that are compared with them."""


def knob(subject: Subject, name: str, low: float, high: float) -> Check:
    """Sweep one knob between two ends.

    Raises:
        InputError: the loss takes no such knob.
    """
    teacher, student = subject.pair(2, 4, gap=1.5)
    span = high - low
    inside = {u: _value(subject, teacher, student, name, low + u * span) for u in (_NEAR_END, 0.25, 0.5, 0.75, 1 - _NEAR_END)}
    ends = {u: _value(subject, teacher, student, name, low + u * span) for u in (0.0, 1.0)}
    if all(value is None for value in (*inside.values(), *ends.values())):
        because = f"it refuses {name} from {low:g} to {high:g}"
        raise InputError(cannot(f"sweep `{name}`", because, "Name an argument, or an attribute, that takes these values"))
    scale = max(abs(value) for value in (*inside.values(), *ends.values()) if value is not None)
    said, jumps = [], False
    for u, near in ((0.0, _NEAR_END), (1.0, 1 - _NEAR_END)):
        at, beside = ends[u], inside[near]
        what = tries(subject, {name: low + u * span}) if at is not None else None
        text = f"{name}={low + u * span:g}: "
        text += "refused" if at is None else f"{at:.4g}" + (f", {what.identified.name}" if what is not None else "")
        if beside is not None:
            far = at is not None and abs(at - beside) > 0.05 * max(abs(at), abs(beside))
            gone = abs(beside) < 0.01 * scale and not (at is not None and abs(at) < 0.01 * scale)
            jumps |= far
            text += f"; it jumps to {beside:.2g} just inside" if far else ""
            text += ", where it vanishes" if gone and far else f"; it vanishes towards this end ({beside:.2g})" if gone else ""
        said.append(text)
    middle = tries(subject, {name: low + span / 2})
    if middle is not None:
        found = middle.identified
        said.insert(1, f"halfway {found.name}" + (f" {found.parameters}" if found.parameters else ""))
    if jumps:
        change = "the knob is no dial between its ends: use a weight on two divergences (`jeffreys`) for one"
        return Check(f"knob {name}", "fail", ". ".join(said), change, "knob_jumps", decides=False)
    return Check(f"knob {name}", "pass", ". ".join(said))


def _value(subject: Subject, teacher: torch.Tensor, student: torch.Tensor, name: str, value: float) -> float | None:
    try:
        return subject(teacher, student, knobs={name: value}).value
    except InputError:
        return None
