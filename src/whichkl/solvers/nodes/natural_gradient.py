"""Natural gradient on fixed nodes: reverse KL to a Gaussian, deterministic, without a step size to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import gaussian
from whichkl.solvers.nodes.doubling import Doubling, Verdict, near_best
from whichkl.solvers.nodes.ensemble import Nodes
from whichkl.solvers.nodes.gaussian_rule import first_count, least_count
from whichkl.solvers.nodes.gaussians import Gaussians
from whichkl.solvers.nodes.refusals import refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.starts import find_starts
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_OPTIMA = 12
"""Largest number of optima that are carried to more nodes."""
_NEAR = 0.5
"""Residual below which L-BFGS takes over from natural-gradient steps."""
_MAX_CALLS_PER_ROUND = 40
"""Largest number of calls of L-BFGS before the coordinates are whitened again."""
_ROUGH = 3e-3
"""Residual that suffices to judge the nodes: it costs 5·10⁻⁶ nats."""
_STALLED = 0.03
"""Residual at which a step may no longer improve a model: nodes that cross a kink of log p keep the gradient from vanishing."""
_MAX_FACTOR = 8
"""Largest factor by which the nodes grow at once."""


@dataclass(frozen=True)
class NaturalGradient(Solver):
    """argmin KL(q‖p) over Gaussians, from several starts at once, each step one batched call of the target.

    On fixed antithetic nodes the ELBO is a smooth function of mean and scale, with the exact gradient (b, I − A) of
    `Gaussians`. Far from the maximum each start takes natural-gradient steps, which are halved if the ELBO on the same nodes
    doesn't rise. Near the maximum L-BFGS climbs in the coordinates that these steps have whitened, in which the curvature is
    near 1 in every direction. A climb ends by its residual √(‖b‖² + ½‖A − I‖²), never on a plateau.

    All starts climb on few nodes first, and their distinct optima on more: nodes are doubled, each time with new ones, until
    the means of every good optimum move by less than `node_tolerance` standard deviations and its nodes cost less than
    `node_loss` nats. L-BFGS keeps what it has learnt. If the optimum of m nodes gains G by climbing on n others, then the cost
    of the n nodes is G / (1 + n/m), since costs fall as 1/n. If many more nodes are needed, some doublings are skipped.

    Source: Amari (1998); Opper & Archambeau (2009) for the two expectations; Giordano, Ingram & Broderick (2024) for
    fixed draws.
    """

    name = "natural_gradient"
    direction = "reverse"
    families = (Gaussian,)
    mode_families = families

    tolerance: float = 1e-6
    max_iterations: int = 30
    rounds: int = 6
    node_tolerance: float = 0.02
    node_loss: float = 0.004
    max_nodes: int = 16_384

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the covariance is full."""
        return isinstance(family, Gaussian) and family.covariance == "full"

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of seven arrays of nodes: points and scores of two starts and what they are made of."""
        nodes = least_count(dim)
        return 56 * dim * max(nodes, min(2 * nodes, self.max_nodes))

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run all starts on few nodes, then the distinct optima on more until they stay, and these to the end."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        loc, tril = (part.to(target.device) for part in find_starts(target, seed))
        first, count, iterations, trail = first_count(target.dim), least_count(target.dim), 0, list[float]()
        fewer = count

        def climbed(begun: Gaussians, tolerance: float = _ROUGH) -> Gaussians:
            nonlocal iterations
            ended, done = self._climb(begun, tolerance, trail)
            iterations += done
            if not bool(ended.elbo.isfinite().any()):  # on fewer nodes the models may have spread too far for these
                refuse_unbounded(-math.inf, torch.linalg.vector_norm(begun.tril, dim=-1), target.names)
            refuse_infinite(ended.elbo)
            return ended

        def begin(ended: Gaussians, count: int) -> Gaussians | None:
            nonlocal fewer, loc
            rows = torch.tensor(self._optima(ended, family)[1][:_MAX_OPTIMA], device=ended.loc.device, dtype=torch.int64)
            if not target.evaluations.affords(len(rows) * count):
                return None
            memory = ended.memory and ended.memory.take(rows)
            fewer, loc = len(ended.z), ended.loc[rows]
            return Gaussians.at(target, Nodes.of(target, count, seed), loc, ended.tril[rows], memory)

        def judge(begun: Gaussians, ended: Gaussians, count: int) -> Verdict:
            shift, lost = _shift(ended, begun.loc), (ended.elbo - begun.elbo) / (1 + count / fewer)
            good = near_best(-ended.elbo)
            is_settled = bool(((shift <= self.node_tolerance) & (lost <= self.node_loss))[good].all())
            times = float(torch.maximum(lost / self.node_loss, (shift / self.node_tolerance).square())[good].max())
            factor = min(_MAX_FACTOR, 1 << max(1, math.floor(math.log2(max(times, 2)))))
            return Verdict(float(shift[int(ended.elbo.argmax())]), is_settled, factor)

        doubling = Doubling(first, self.max_nodes, target.dim == 1, _check, begin, climbed, judge)
        begun = Gaussians.at(target, Nodes.of(target, count, seed), loc, tril)
        state, error = doubling.run(begun, climbed(begun), count)
        state = climbed(state, self.tolerance)
        best = int(state.elbo.argmax())
        _check(state, float(state.elbo[best]))
        node_error = None if target.dim == 1 else float(_shift(state, loc)[best]) if math.isfinite(error) else math.inf
        found, _ = self._optima(state, family)
        return Solution(found, iterations, float(state.residual[best]), node_error, len(state.z), history=tuple(trail))

    def _climb(self, state: Gaussians, tolerance: float, trail: list[float]) -> tuple[Gaussians, int]:
        """Take natural-gradient steps far from the optimum, and rounds of L-BFGS near it; `trail` gets each iteration's loss."""
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
            trial = now.ascended(counts.calls(points, _MAX_CALLS_PER_ROUND), tolerance**2 / 4)
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


def _check(state: Gaussians, elbo: float = -math.inf) -> None:
    """Refuse a target whose best model spreads or shrinks without bound."""
    best = int(state.elbo.argmax())
    spread = torch.linalg.vector_norm(state.tril[best, None], dim=-1)
    refuse_unbounded(elbo, spread, state.target.names, float(state.residual[best]))


def _shift(state: Gaussians, loc: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return the largest shift of each model's means, in standard deviations."""
    moved: Tensor = (state.loc - loc).abs() / torch.linalg.vector_norm(state.tril, dim=-1)
    return moved.amax(-1)
