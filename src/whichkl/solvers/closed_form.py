"""Closed form: maximum likelihood by moments, for families that have it."""

from __future__ import annotations

from typing import ClassVar

from whichkl.families import Family, Gaussian
from whichkl.objectives import ForwardKL, Objective
from whichkl.solvers.points import points_of
from whichkl.solvers.solver import Optimum, Solution, Solver
from whichkl.targets import Target


class ClosedForm(Solver):
    """argmin KL(p‖q) over Gaussians: q has p's mean and covariance, the only optimum.

    Source: Fisher (1922); as the moment-matching projection, Csiszár (1975).
    """

    name: ClassVar[str] = "closed_form"
    objective: ClassVar[type[Objective]] = ForwardKL
    families: ClassVar[tuple[type[Family], ...]] = (Gaussian,)

    def solve(self, target: Target, family: Family, seed: int) -> Solution:
        """Take the weighted moments of p's points."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        x, w = points_of(target, seed)
        model = family.maximum_likelihood(x, w)
        loss = float(ForwardKL().loss(model, x, w))
        return Solution((Optimum(model, loss, converged=True, is_global=True),), iterations=1, residual=0.0)
