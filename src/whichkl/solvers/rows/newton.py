"""Newton: generalised linear models by Newton's method, with sums over the rows in each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.families import Family
from whichkl.families.generalized_linear import GeneralizedLinear
from whichkl.files.journal import tensors_behind
from whichkl.solvers.rows.closed_form import fit_held, optimum_on
from whichkl.solvers.rows.newton_design import Design, Evaluation, survey
from whichkl.solvers.rows.rows import Rows, rows_of
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_ROUNDING = 1e-8
"""Largest loss of a row along a direction, relative to the gain of others, that rounding explains: it still separates."""
_MAX_LAST_CHANGE = 1e-3
"""Largest change of a row's η in a step near the maximum."""


@dataclass(frozen=True)
class Newton(Solver):
    """argmin −Σ log q(y|x) + ½ penalty ‖W‖² over generalised linear models, a convex problem with one optimum.

    Each step solves the Hessian's equations, which for the canonical link is Fisher scoring, and is halved until the loss falls.
    The columns x are standardised first. Above `dense` parameters the equations are solved by conjugate gradients, with one
    pass per product with the Hessian. If no maximum exists, the steps never shrink, and along one of them the likelihood of no
    row falls. Such a step certifies separation, and the fit is refused.

    Args:
        tolerance: the Newton decrement, in nats per row, at which the last step is taken.
        max_iterations: largest number of steps.
        dense: largest number of parameters for which the Hessian is formed.

    Source: Nelder & Wedderburn (1972); separation, Albert & Anderson (1984); conjugate gradients, Dembo, Eisenstat & Steihaug
    (1982).
    """

    name = "newton"
    direction = "forward"
    families = (GeneralizedLinear,)

    tolerance: float = 1e-13
    max_iterations: int = 100
    dense: int = 1_000

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Fit all rows, and from that fit, if asked to, the rows that aren't held out."""
        if not isinstance(family, GeneralizedLinear):
            raise TypeError(family)
        rows = rows_of(target, seed, work.workers)
        design = survey(rows, family, target.context_names)
        end = self._climb(rows, design, design.start(), work, "all rows")
        model = design.model(end.theta)
        held, notes = None, tuple[str, ...]()
        if stride:
            most = replace(rows, stride=stride)

            def fit() -> Any:
                other = survey(most, family, target.context_names)
                if other.columns != design.columns:
                    raise InputError("some class has no other rows.")
                start = other.theta(model)
                return other.model(self._climb(most, other, start, work.under("held"), "rows not held out").theta)

            held, notes = fit_held(replace(most, held=True).gather(), fit)
        best = optimum_on(rows, model, held, converged=end.converged)
        return Solution((best,), end.iterations, end.residual, held=held, notes=notes, history=end.history)

    def _climb(self, rows: Rows, design: Design, theta: Tensor, work: Work, what: str) -> _End:
        """Take Newton steps, from those in the journal on, until the last one is far below rounding."""
        count = 0
        if work.journal is not None:
            like = {"theta": theta}
            found = work.journal.load(
                "newton", lambda tensors, notes: (tensors_behind("", tensors, like)["theta"].to(theta), int(notes["steps"]))
            )
            theta, count = found or (theta, 0)
        dense = theta.numel() <= self.dense
        here = design.evaluate(rows, theta, None, hessian=dense)
        residual, converged, trail = math.inf, False, list[float]()
        while not converged and count < self.max_iterations and not (count and rows.evaluations.is_spent):
            step = _newton_step(here) if dense else _conjugate_step(rows, design, theta, here)
            decrement = -float((here.gradient * step).sum()) / design.count
            length, there = 1.0, design.evaluate(rows, theta + step, step, hessian=dense)
            if design.family.penalty == 0 and there.separates(_MAX_ROUNDING):
                raise InputError(_separated(design, rows, step))
            small = 1e-13 * max(1.0, abs(here.loss))  # what rounding may add to a loss that doesn't rise
            while not there.loss <= here.loss + small and length > 1e-9:
                length /= 2
                there = design.evaluate(rows, theta + length * step, length * step, hessian=dense)
            if not there.loss <= here.loss + small:  # rounding hides any further fall
                converged = residual < _MAX_LAST_CHANGE
                break
            theta, here, count = theta + length * step, there, count + 1
            trail.append(here.loss / design.count)
            residual = max(decrement, 0.0) ** 0.5
            work.tell(f"newton step {count} on {what}", math.nan)
            if work.journal is not None:
                work.journal.save("newton", {"theta": theta}, {"steps": count})
            converged = length == 1.0 and decrement < self.tolerance and there.reach < _MAX_LAST_CHANGE
        return _End(theta, count, residual, converged, tuple(trail))


class _End(NamedTuple):
    """The end of the steps; `residual` is the square root of the last Newton decrement per row."""

    theta: Float[Tensor, "k c1"]
    iterations: int
    residual: float
    converged: bool
    history: tuple[float, ...]


def _newton_step(here: Evaluation) -> Tensor:
    """Solve H step = −g; a ridge is added if rounding has made H singular."""
    hessian, ridge = here.curvature, 0.0
    size = float(hessian.diagonal().mean())
    while True:
        factor, info = torch.linalg.cholesky_ex(
            hessian + ridge * size * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        )
        if int(info) == 0:
            return -torch.cholesky_solve(here.gradient.flatten()[:, None], factor).reshape(here.gradient.shape)
        ridge = max(1e-14, 10 * ridge)


def _conjugate_step(rows: Rows, design: Design, theta: Tensor, here: Evaluation) -> Tensor:
    """Solve H step = −g by conjugate gradients, preconditioned by the Hessian's diagonal, more exactly near the end."""
    # The Hessian's diagonal, which the same pass has given: the Hessian itself isn't formed here.
    scale = here.curvature.clamp(min=1e-12 * float(here.curvature.max()))

    def near(left: Tensor) -> Tensor:
        ready = left / scale
        # Adding one constant to all classes changes no probability: steps stay orthogonal to that direction.
        return ready - ready.mean(0) if design.columns > 1 else ready

    step, left = torch.zeros_like(theta), -here.gradient
    toward = near(left)
    power = first = float((left * toward).sum())
    # An inexact Newton method: rough far from the end, and superlinear near it (Dembo, Eisenstat & Steihaug, 1982).
    wanted = min(0.25, (first / design.count) ** 0.5) ** 2
    for _ in range(250):
        if power <= wanted * first:
            break
        turned = design.product(rows, theta, toward)
        length = power / float((toward * turned).sum())
        step, left = step + length * toward, left - length * turned
        ready = near(left)
        before, power = power, float((left * ready).sum())
        toward = ready + power / before * toward
    return step


def _separated(design: Design, rows: Rows, step: Tensor) -> str:
    """Return a message that names the columns that separate the rows, so that the likelihood has no maximum."""
    alone = design.separating(rows)
    if alone:
        which = " and ".join(f"`{design.names[i]}`" for i in alone)
    else:
        # Along a separating direction the weights grow without bound: the columns that grow most name it.
        size = step[:, :-1].abs().amax(0)
        involved = [design.names[i] for i in (size > 1e-2 * size.max()).nonzero().flatten().tolist()]
        which = f"a combination of {', '.join(f'`{name}`' for name in involved)}"
    what = "counts of 0 and above are" if design.family.response == "poisson" else "classes are"
    because = f"the {what} separated by {which}, so the likelihood has no maximum"
    return cannot(f"fit `{design.family}`", because, "Use penalty=, say penalty=1.0, or drop that column")
