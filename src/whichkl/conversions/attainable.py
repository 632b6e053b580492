"""Attainable: which moment no weights of the points have, and its range given the others, by linear programs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot

_MAX_ROWS = 50_000
"""Largest number of points in a linear program; more are thinned evenly, and those with the ends of each moment are kept."""
_MAX_DEVIATIONS = 1e6
"""Nodes of an integral at which a moment is this far from its mean, in standard deviations, aren't in the linear programs."""
_MIN_DEVIATIONS_OF_INFINITY = 10.0
"""Distance from the mean, in standard deviations, from which on an end of the nodes of an unbounded support is infinity."""
_TOLERANCE = 1e-9
"""Smallest change of a moment, in its standard deviations, that a linear program distinguishes from rounding."""
_MARGIN = 1e-6
"""Distance of a moment from an end of its range, in its standard deviations, that shows that it isn't at that end."""
_DO = "find a distribution with these moments"


def refusal(
    f: Float[Tensor, "n k"],
    log_r: Float[Tensor, " n"],
    values: Float[Tensor, " k"],
    direction: Float[Tensor, " k"],
    names: Sequence[str],
    *,
    are_draws: bool,
    is_unbounded: bool,
) -> TargetError:
    """Return the error that names the moment that can't be had, and its range.

    Args:
        f: the moments at n points.
        log_r: the logs of their weights.
        values: what the moments shall be.
        direction: where λ went, which names the moment where all are at the end of their range.
        names: of the moments.
        are_draws: whether the points are all that the reference has, rather than nodes of integrals.
        is_unbounded: whether the reference's support is.
    """
    w = torch.softmax(log_r, 0)
    center = w @ f
    spread = (w @ (f - center).square()).sqrt()
    unit = torch.where(spread > 0, spread, 1.0)
    f, far = (f - center) / unit, _MIN_DEVIATIONS_OF_INFINITY if is_unbounded and not are_draws else math.inf
    reached = (log_r > -math.inf) & (are_draws | (f.abs() < _MAX_DEVIATIONS).all(1))
    rows, wanted = _thinned(f[reached]).cpu().numpy(), ((values - center) / unit).cpu().numpy()
    beyond = np.maximum(rows.min(0) - wanted, wanted - rows.max(0))
    others: list[int] = []
    violated = {int(beyond.argmax())} if beyond.max() > 0 else set[int]()
    if violated:
        j, ends = int(beyond.argmax()), (float(rows[:, beyond.argmax()].min()), float(rows[:, beyond.argmax()].max()))
    else:
        slack = _slack(rows, wanted)
        violated = set(np.flatnonzero(slack > _TOLERANCE).tolist())
        if not violated and not are_draws:
            return tails_too_heavy()
        j = int(slack.argmax()) if violated else int((direction * spread).abs().argmax())
        others = [i for i in range(len(wanted)) if i not in violated and i != j]
        ends = _range(rows, wanted, j, others)
        for one in sorted(violated - {j}, key=lambda i: float(slack[i])):  # each alone may be possible
            if not ends[0] <= wanted[j] <= ends[1]:
                break
            narrower = _range(rows, wanted, j, [*others, one])
            if not math.isnan(narrower[0]):
                others, ends = [*others, one], narrower
    if not violated and ends[0] + _MARGIN < wanted[j] < ends[1] - _MARGIN:
        because = "they can be had, but so near to an end of what the draws allow that the weights of all but few draws vanish"
        return TargetError(cannot(_DO, because, "Pass more draws, or state the errors of the values by `stderr=`"))
    shown = [f"{float(end * unit[j] + center[j]):.6g}" if abs(end) < far else "∞" if end > 0 else "-∞" for end in ends]
    given = "" if not others else " given the other moments" if len(others) == len(wanted) - 1 else " given those that can be had"
    given += "" if violated else ", both ends excluded"
    allow = "the draws of the reference allow" if are_draws else "the support of the reference allows"
    because = f"moment `{names[j]}` is {float(values[j]):.6g}, and {allow} {shown[0]} to {shown[1]}{given}"
    instead = "Correct that value, pass a reference that reaches it, or state the errors of the values by `stderr=`"
    return TargetError(cannot(_DO, because, instead))


def tails_too_heavy() -> TargetError:
    """Return the error for a density whose tails outgrow exp(λ·f)."""
    because = "the reference times exp(λ·f) has no finite integral: its tails are too heavy for these moments"
    return TargetError(cannot(_DO, because, "Pass a reference with lighter tails, or a bounded `support=`"))


def _thinned(f: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
    """Keep at most 50,000 points, with the two that are the ends of each moment."""
    if len(f) <= _MAX_ROWS:
        return f
    rows = torch.linspace(0, len(f) - 1, _MAX_ROWS, dtype=torch.float64, device=f.device).long()
    return f[torch.cat([rows, f.argmin(0), f.argmax(0)]).unique()]


def _slack(f: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The least changes of the values, in sum, with which weights of the points have these moments."""
    from scipy.optimize import linprog

    n, k = f.shape
    a = np.zeros((k + 1, n + 2 * k))
    a[:k, :n], a[k, :n] = (f - m).T, 1
    a[:k, n : n + k], a[:k, n + k :] = np.eye(k), -np.eye(k)
    found = linprog(np.r_[np.zeros(n), np.ones(2 * k)], A_eq=a, b_eq=np.r_[np.zeros(k), 1.0], method="highs")
    return np.asarray(found.x[n : n + k] + found.x[n + k :])


def _range(f: np.ndarray, m: np.ndarray, j: int, others: list[int]) -> tuple[float, float]:
    """The ends of moment j over all weights of the points that have the other moments."""
    from scipy.optimize import linprog

    a, b = np.r_[(f[:, others] - m[others]).T, np.ones((1, len(f)))], np.r_[np.zeros(len(others)), 1.0]
    found = [linprog(sign * f[:, j], A_eq=a, b_eq=b, method="highs") for sign in (1, -1)]
    low, high = (one.fun if one.success else math.nan for one in found)
    return float(low), -float(high)
