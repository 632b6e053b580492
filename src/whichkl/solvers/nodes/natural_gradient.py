"""Natural gradient on fixed nodes: reverse KL to a Gaussian, deterministic, without a step size to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import gaussian
from whichkl.objectives import Direction, Objective
from whichkl.solvers.nodes.gaussian_rule import first_count, gaussian_rule, least_count
from whichkl.solvers.nodes.gaussians import Gaussians
from whichkl.solvers.nodes.refusals import refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.starts import find_starts
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_CLOSE = 3.0
"""Optima within so many nats of the best must settle under doubled nodes too."""
_KEPT = 12
"""At most so many optima are followed to more nodes."""
_NEAR = 0.5
"""The residual from which L-BFGS takes over."""
_CALLS = 40
"""Of L-BFGS, before the coordinates are whitened anew."""
_ROUGH = 3e-3
"""The residual that tells whether more nodes are needed: it costs 5·10⁻⁶ nats."""
_STALLED = 0.03
"""Where a step can't improve any more: in a log density with kinks, nodes that cross one keep the gradient from vanishing."""


@dataclass(frozen=True)
class NaturalGradient(Solver):
    """argmin KL(q‖p) over Gaussians, from several starts at once, each step one batched call of the target.

    On fixed antithetic nodes the ELBO is a smooth function of mean and scale, with the exact gradient (b, I − A) of
    `Gaussians`. Far from its maximum each start takes natural-gradient steps, halved where the ELBO on the same nodes
    doesn't rise; near it L-BFGS climbs in the coordinates that these steps have whitened, whose curvature is near 1 in
    every direction. It stops on the residual √(‖b‖² + ½‖A − I‖²), never on a plateau.

    All starts climb on few nodes first, and their distinct optima on more: nodes are doubled, each time with new ones,
    until the means of every good optimum move by less than `node_tolerance` standard deviations and its nodes cost less
    than `node_loss` nats; L-BFGS keeps what it has learnt. What n nodes cost, the ELBO at the true optimum less that at
    theirs, falls as 1/n: if the optimum of n/2 nodes gains G by climbing on n others, then G is the cost of n/2 nodes and
    that of n, three times the latter. Where many more are needed, the doublings between are left out.

    Source: Amari (1998); Opper & Archambeau (2009) for the two expectations; Giordano, Ingram & Broderick (2024) for
    fixed draws.
    """

    name: ClassVar[str] = "natural_gradient"
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Gaussian,)

    tolerance: float = 1e-6
    max_iterations: int = 30
    rounds: int = 6
    node_tolerance: float = 0.02
    node_loss: float = 0.004
    max_nodes: int = 16_384

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Reverse KL to a Gaussian of full covariance, where log p can be evaluated."""
        is_able = isinstance(family, Gaussian) and family.covariance == "full"
        return is_able and super().solves(objective, family, access) and access.can_evaluate

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of seven arrays of nodes: points and scores of two starts and what they are made of."""
        nodes = least_count(dim)
        return 56 * dim * max(nodes, min(2 * nodes, self.max_nodes))

    def starts_from_modes(self, family: Family) -> bool:
        """Its starts are the modes of p."""
        return True

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run all starts on few nodes, then the distinct optima on more until they stay, and these to the end."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        loc, tril = (part.to(target.device) for part in find_starts(target, seed))
        first, count, memory = first_count(target.dim), least_count(target.dim), None
        iterations, fewer = 0, 0
        trail: list[float] = []
        while True:
            z, w = (part.to(target.device) for part in gaussian_rule(target.dim, count, seed + count))
            begun = Gaussians.at(target, z, w, loc, tril, memory)
            state, done = self._climb(begun, _ROUGH, trail)
            iterations += done
            if not bool(state.elbo.isfinite().any()):  # fewer nodes may have let them spread too far for these
                refuse_unbounded(-math.inf, torch.linalg.vector_norm(tril, dim=-1), target.names)
            refuse_infinite(state.elbo)
            best, is_settled, further = int(state.elbo.argmax()), target.dim == 1, max(first, 2 * count)
            _refuse_unbounded(-math.inf, state, best)
            if count > first:
                shift, lost = _shift(state, loc), (state.elbo - begun.elbo) / (1 + count / fewer)
                good = state.elbo >= state.elbo[best] - _CLOSE
                is_settled = bool(((shift <= self.node_tolerance) & (lost <= self.node_loss))[good].all())
                times = float(torch.maximum(lost / self.node_loss, (shift / self.node_tolerance).square())[good].max())
                further = count << min(3, max(1, math.floor(math.log2(max(times, 2)))))
            if is_settled or count >= self.max_nodes:
                break
            rows = torch.tensor(self._optima(state, family)[1][:_KEPT], device=state.loc.device, dtype=torch.int64)
            further = min(further, self.max_nodes)
            if not target.evaluations.affords(len(rows) * further):
                break
            loc, tril, memory = state.loc[rows], state.tril[rows], state.memory and state.memory.take(rows)
            fewer, count = count, further
        state, done = self._climb(state, self.tolerance, trail)
        _refuse_unbounded(float(state.elbo[best]), state, best)
        node_error = None if target.dim == 1 else float(_shift(state, loc)[best]) if count > first else math.inf
        residual = float(state.residual[best])
        found, _ = self._optima(state, family)
        return Solution(found, iterations + done, residual, node_error, len(z), history=tuple(trail))

    def _climb(self, state: Gaussians, tolerance: float, trail: list[float]) -> tuple[Gaussians, int]:
        """Natural-gradient steps far from the optimum, near it L-BFGS in the coordinates that they whitened.

        `trail` gets the best loss after each iteration.
        """
        rho, held = torch.ones_like(state.elbo), torch.zeros_like(state.elbo)
        iterations = 0
        counts, nodes = state.target.evaluations, len(state.z)
        while iterations < self.max_iterations:
            is_known = torch.zeros_like(held, dtype=torch.bool) if state.memory is None else state.memory.held[:, -1]
            enough = torch.where(is_known | (iterations > 0), rho.new_tensor(_NEAR), tolerance)
            active = (state.residual > enough) & (rho > 1e-6)
            if not bool(active.any()) or not counts.affords(int(active.sum()) * nodes):
                break
            now = state.take(active)
            trial = now.step(rho[active])
            better = trial.improves_on(now)
            state = state.put(active, better, trial)
            # A step that was just halved isn't doubled at the first success: it would fail again.
            held[active] = torch.where(better, held[active] - 1, torch.ones_like(held[active]))
            rho[active] = torch.where(better, torch.where(held[active] < 0, 2 * rho[active], rho[active]), rho[active] / 2)
            rho, held = rho.clamp(max=1.0), held.clamp(min=0.0)
            iterations += 1
            trail.append(-float(state.elbo.max()))
        inherits = state.memory is not None
        for _ in range(self.rounds):
            active = (state.residual > tolerance) & state.elbo.isfinite()
            points = int(active.sum()) * nodes
            if not bool(active.any()) or not counts.affords(points):
                break
            now = state.take(active)
            trial = now.ascended(counts.calls(points, _CALLS), tolerance**2 / 4)
            better = trial.improves_on(now)
            state = state.put(active, better, trial)
            iterations += 1
            trail.append(-float(state.elbo.max()))
            if not bool(better.any()):
                if not inherits:
                    break
                state = replace(state, memory=None)  # what was learnt on fewer nodes may mislead
            inherits = False
        return state, iterations

    def _optima(self, state: Gaussians, family: Gaussian) -> tuple[tuple[Optimum, ...], list[int]]:
        """Return the distinct optima, the best first, and their rows."""
        found = {
            i: Optimum(gaussian(loc, tril, family.covariance), -float(elbo), bool(r <= _STALLED), False)
            for i, (loc, tril, elbo, r) in enumerate(zip(state.loc, state.tril, state.elbo, state.residual, strict=True))
            if math.isfinite(float(elbo))
        }
        kept = distinct([one for one in found.values() if one.converged] or list(found.values()))
        return kept, [next(i for i, one in found.items() if one.model is two.model) for two in kept]


def _refuse_unbounded(elbo: float, state: Gaussians, best: int) -> None:
    spread = torch.linalg.vector_norm(state.tril[best, None], dim=-1)
    refuse_unbounded(elbo, spread, state.target.names, float(state.residual[best]))


def _shift(state: Gaussians, loc: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """How far the means have moved, in standard deviations."""
    moved: Tensor = (state.loc - loc).abs() / torch.linalg.vector_norm(state.tril, dim=-1)
    return moved.amax(-1)
