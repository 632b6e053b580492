"""Suggestions: the family that a finding proposes as the richer one; where rows are known, only one that they allow."""

from __future__ import annotations

from dataclasses import replace

import torch

from whichkl._checks import WhichklError, quoted
from whichkl.diagnostics.columns import next_richer
from whichkl.diagnostics.judged_fit import JudgedFit
from whichkl.diagnostics.result import Diagnostics
from whichkl.diagnostics.unseen_rows import refit
from whichkl.families import Autoregressive, Categorical, Family, Gaussian, Mixture, Product
from whichkl.families.field_checks import dependent_columns
from whichkl.objectives import ForwardKL
from whichkl.solvers import solver_for
from whichkl.targets import Target

_MAX_DIM_FOR_FULL = 200
"""Largest dimension at which a full covariance is proposed as the richer family; above, it takes long."""
_ROWS = 1_000
"""Largest number of rows on which a proposed family is tried."""


def preferred(family: Family, diagnostics: Diagnostics) -> Family | str:
    """Return the next richer family, or what else to try, in words; rows may refuse it."""
    larger = next_richer(family, diagnostics)
    if larger is None and isinstance(family, (Categorical, Product)):
        return Autoregressive()
    if larger is None:
        return "one with wider layers, `hidden=`" if isinstance(family, Autoregressive) else "a flow, or a family of your own"
    if isinstance(larger, Mixture) and diagnostics.separate > larger.count:
        larger = replace(larger, components=diagnostics.separate)
    if larger == Gaussian() and diagnostics.optima[0].model.event_shape[0] > _MAX_DIM_FOR_FULL:
        larger = Gaussian("low_rank", rank=10)
    return larger


def allowed(fit: JudgedFit, diagnostics: Diagnostics) -> str:
    """Return the preferred family if the rows allow it, or else another one that they allow, in words."""
    first, x = preferred(fit.family, diagnostics), fit.target.samples
    if fit.target.reading.categories and not isinstance(first, str):  # only columns that are independent take categories
        return f"a full covariance after you drop {quoted(list(fit.target.reading.categories))}, which hold categories"
    if x is None or fit.target.context is not None or isinstance(first, str) or diagnostics.richer_gain is not None:
        return str(first)
    target = fit.target if len(x) <= _ROWS else _with_rows(fit.target, x[:: -(-len(x) // _ROWS)])
    if _is_allowed(first, target, fit.seed):
        return str(first)
    free = x.to("cpu", torch.float64)
    dependent = dependent_columns(torch.cov(free.T).reshape(free.shape[1], -1)) if bool((free.std(0) > 0).all()) else None
    if dependent is not None and bool(dependent.any()):
        names = ", ".join(f"`{name}`" for name, is_in in zip(fit.target.names, dependent.tolist(), strict=True) if is_in)
        return f"a full covariance after you drop one of {names}, which determine each other"
    others = [one for one in (Gaussian(), Mixture(2, "diagonal")) if one != fit.family and _is_allowed(one, target, fit.seed)]
    return str(others[0]) if others else "a family of your own"


def _with_rows(target: Target, x: torch.Tensor) -> Target:
    """Return a target with these rows alone."""
    return Target(samples=x, names=target.names, support=target.bijection.constraints)


def _is_allowed(family: Family, target: Target, seed: int) -> bool:
    """Whether the family can be fitted to these rows; networks are only asked whether they take the values."""
    if target.samples is None:
        return False
    try:
        solver = solver_for(ForwardKL(), family, target.access)
        family.check_samples(target.samples, target.names)
        return solver is not None and (not solver.refits or refit(target, family, solver, seed) is not None)
    except WhichklError:
        return False
