"""Checking: what `fit` left out for its budget, measured on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from whichkl._checks import TargetError, cannot
from whichkl.diagnostics import JudgedFit, judge
from whichkl.diagnostics.judged_fit import Measured
from whichkl.process.threads import threads_for
from whichkl.solvers import Solution, solver_for
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit

STEP_NUMBERS = 64
"""Numbers that a step computes per squared dimension: nodes times the share of a matrix product that counts."""


def checked(fit: Fit, target: Target | None, tell: Callable[[str, float], None] | None) -> Fit:
    """Return the fit with everything measured; see `Fit.check`."""
    parts = _parts_of(fit, target)
    work = Work(tell=tell or QUIET.tell, evaluations=parts.target.evaluations)
    with threads_for(STEP_NUMBERS * parts.target.dim**2):
        found = judge(replace(parts, work=work, thorough=True, measured=Measured(), left_out=[]))
    fit = replace(fit, value=found.value, status=found.status, findings=found.findings, diagnostics=found.diagnostics)
    return replace(fit, target=fit.target or parts.target, parts=parts)


def _parts_of(fit: Fit, target: Target | None) -> JudgedFit:
    """Return what the diagnostics read; for a loaded fit, from the target and what was saved."""
    if fit.parts is not None and target is None:
        return replace(fit.parts, target=fit.parts.target.noting_repeats())
    if target is None:
        because = "a loaded fit doesn't hold its target"
        raise TargetError(cannot("check this fit", because, "Pass `target=`, what was fitted"))
    p, d = Target.of(target).noting_repeats(), fit.diagnostics
    solver = solver_for(fit.objective, fit.family, p.access, fit.solver)
    solution = Solution(d.optima, d.iterations, d.residual, d.node_error, d.nodes, history=d.history)
    return JudgedFit(p, fit.family, fit.objective, solver, solution, fit.model, fit.seed, QUIET, fit.advice, curve=d.curve)
