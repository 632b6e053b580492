"""Sample-average approximation: reverse KL of a mixture on fixed nodes, with components added where it lacks mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access
from whichkl.families import Family, Mixture
from whichkl.objectives import Direction, ReverseKL
from whichkl.solvers.nodes.doubling import NEAR_BEST, Doubling, judge_by_cost
from whichkl.solvers.nodes.ensemble import Ensemble, Nodes, Points, descend, first_nodes, optima_of, stacked
from whichkl.solvers.nodes.mixture_discovery import add_components, find_missing_mass
from whichkl.solvers.nodes.refusals import refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.starts import find_starts
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_OPTIMA = 6
"""Largest number of optima that are carried to more nodes, and of starts."""
_MIN_GAIN = 1e-4
"""Nats. A round that gains less, at a small gradient, is the last: it has met a kink or rounding."""
_SETTLED = 1e-3
"""Length of the gradient below which a model counts as an optimum."""
_ROUGH = 1e-2
"""Length of the gradient that suffices to judge the nodes: it costs 5·10⁻⁵ nats."""
Start = tuple[Float[Tensor, " k"], Float[Tensor, "k d"], Float[Tensor, "k d d"]]


@dataclass(frozen=True)
class SampleAverage(Solver):
    """argmin KL(q‖p) over mixtures: nodes stratified over the components, L-BFGS from several starts, modes discovered.

    Starts are the modes and Gaussians of `find_starts`, each split along its longest axis where there are fewer modes than
    components. One more start grows: components are added where log p − log q is largest, and the ELBO is climbed after
    each. Nodes are doubled, each time with new ones, until they cost less than `node_loss` nats (see `judge_by_cost`).

    Source: Giordano, Ingram & Broderick (2024) for fixed draws; stratification as in Kobyzev et al., Morningstar et
    al. (2021); growth as in Arenz, Zhong & Neumann (2020).
    """

    name: ClassVar[str] = "sample_average"
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Mixture,)
    mode_families: ClassVar[tuple[type[Family], ...]] = families

    tolerance: float = 1e-5
    node_loss: float = 0.004
    rounds: int = 8
    max_nodes: int = 4096

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the components are Gaussians whose covariances aren't tied."""
        return isinstance(family, Mixture) and family.law == "gaussian" and family.covariance != "tied"

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Minimise from every start on the first nodes, then from the distinct optima on more nodes until they stay."""
        if not isinstance(family, Mixture):
            raise TypeError(family)
        count, trail = first_nodes(family, target.dim), list[float]()
        locs, trils = find_starts(target, seed)
        begun = self._on_nodes(target, family, count, seed, _starts(family, locs, trils))
        state, iterations = self._descend(begun, trail, rounds=2)
        grown, more = self._grow(target, family, locs, trils, count, seed, work)
        if grown is not None:
            state = state.joined(grown)
        state, last = self._descend(state.take(state.loss <= state.loss.min() + NEAR_BEST), trail)
        iterations += more + last

        def begin(ended: Ensemble, count: int) -> Ensemble | None:
            kept = [one.model for one in optima_of(ended, _ROUGH)[:_MAX_OPTIMA]]
            if not target.evaluations.affords(len(kept) * family.count * count):
                return None
            work.tell("doubling the nodes", math.nan)
            return ended.on(Nodes.of(target, count, seed), stacked(kept))

        def descended(begun: Ensemble) -> Ensemble:
            nonlocal iterations
            ended, done = self._descend(begun, trail)
            iterations += done
            return ended

        judge = judge_by_cost(self.node_loss)
        doubling = Doubling(count, self.max_nodes, target.dim == 1, _check, begin, descended, judge)
        state, error = doubling.run(begun, state, count)
        state, done = self._descend(state, trail, self.tolerance)
        residual = float(state.residual[int(state.loss.argmin())])
        node_error = None if target.dim == 1 or math.isinf(error) else error
        found, nodes = optima_of(state, _SETTLED), len(state.nodes.z)
        return Solution(found, iterations + done, residual, node_error, nodes, history=tuple(trail))

    def _on_nodes(self, target: Target, family: Mixture, count: int, seed: int, starts: Sequence[Start]) -> Ensemble:
        logits, loc, tril = (torch.stack(parts) for parts in zip(*starts, strict=True))
        nodes = Nodes.of(target, count, seed)
        return Ensemble.at(ReverseKL(), family, target, Points.none(target), nodes, (logits, loc, tril))

    def _descend(
        self, state: Ensemble, trail: list[float], tolerance: float = _ROUGH, rounds: int | None = None
    ) -> tuple[Ensemble, int]:
        return descend(state, tolerance, self.rounds if rounds is None else rounds, trail, _MIN_GAIN)

    def _grow(
        self,
        target: Target,
        family: Mixture,
        locs: Float[Tensor, "s d"],
        trils: Float[Tensor, "s d d"],
        count: int,
        seed: int,
        work: Work,
    ) -> tuple[Ensemble | None, int]:
        """Add components where log p − log q is largest until there are K; None if a mixture on the way can't be evaluated."""
        state, done = self._on_nodes(target, family, count, seed, [(locs.new_zeros(1), locs[:1], trils[:1])]), 0
        while state.loc.shape[1] < family.count:
            state, rounds = self._descend(state, [], rounds=1)
            done += rounds
            if not bool(state.loss.isfinite().all()) or target.evaluations.is_spent:
                return None, done
            room = family.count - state.loc.shape[1]
            work.tell("looking for modes", 1 - room / family.count)
            found = find_missing_mass(target, state, locs, room, seed + state.loc.shape[1])
            if not len(found[0]):
                return None, done
            state = add_components(state, *found)
        return state, done


def _check(state: Ensemble) -> None:
    """Refuse a target whose ELBO is finite nowhere, or whose best model spreads or shrinks without bound."""
    refuse_infinite(-state.loss)
    best = int(state.loss.argmin())
    spread = torch.linalg.vector_norm(state.tril[best], dim=-1)
    refuse_unbounded(-float(state.loss[best]), spread, state.target.names, float(state.residual[best]))


def _starts(family: Mixture, locs: Float[Tensor, "s d"], trils: Float[Tensor, "s d d"]) -> list[Start]:
    """Return a mixture on the best modes, and each start split along its longest axis."""
    starts = [_split(loc, tril, family.count) for loc, tril in zip(locs, trils, strict=True)]
    if len(locs) > family.count > 1:
        starts.insert(0, (locs.new_zeros(family.count), locs[: family.count], trils[: family.count]))
    return starts[:_MAX_OPTIMA]


def _split(loc: Float[Tensor, " d"], tril: Float[Tensor, "d d"], count: int) -> Start:
    """Spread K components evenly over ±1 standard deviation of one Gaussian along its longest axis."""
    _, vector = torch.linalg.eigh(tril @ tril.T)
    axis = vector[:, -1] * torch.linalg.vector_norm(tril.T @ vector[:, -1])
    at = torch.linspace(-1, 1, count, dtype=loc.dtype, device="cpu") if count > 1 else loc.new_zeros(1)
    return loc.new_zeros(count), loc + at[:, None] * axis, tril.expand(count, -1, -1)
