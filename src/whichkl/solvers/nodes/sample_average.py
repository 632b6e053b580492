"""Sample-average approximation: reverse KL of a mixture on fixed nodes, components put where it lacks mass."""

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
from whichkl.families.mixture import mixture_parts
from whichkl.objectives import Direction, Objective
from whichkl.solvers.nodes.gaussian_rule import first_count, gaussian_rule
from whichkl.solvers.nodes.mixture_discovery import discovered, joined
from whichkl.solvers.nodes.mixtures import Mixtures
from whichkl.solvers.nodes.refusals import refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.starts import find_starts
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_CLOSE, _KEPT = 3.0, 6
_CALLS = 60
"""Of L-BFGS, before the coordinates are whitened anew."""
_GAIN = 1e-4
"""Nats; a round that gains less is the last."""
_SETTLED = 1e-3
"""Length of the gradient from which an optimum counts as one."""
_ROUGH = 1e-2
"""That which tells whether more nodes are needed: it costs 5·10⁻⁵ nats."""
Start = tuple[Float[Tensor, " k"], Float[Tensor, "k d"], Float[Tensor, "k d d"]]


@dataclass(frozen=True)
class SampleAverage(Solver):
    """argmin KL(q‖p) over mixtures: nodes stratified over the components, L-BFGS from several starts, modes discovered.

    Starts are the modes and Gaussians of `find_starts`, each split along its longest axis where there are fewer than
    components. One more start grows: from the modes that are known, components are added where log p − log q is
    largest, and the ELBO climbed in between. Nodes are doubled, each time with new ones, until they cost less than
    `node_loss` nats (as `NaturalGradient` says).

    Source: Giordano, Ingram & Broderick (2024) for fixed draws; stratification as in Kobyzev et al., Morningstar et
    al. (2021); growth as in Arenz, Zhong & Neumann (2020).
    """

    name: ClassVar[str] = "sample_average"
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Mixture,)

    tolerance: float = 1e-5
    node_loss: float = 0.004
    rounds: int = 8
    max_nodes: int = 4096

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Reverse KL to a mixture of Gaussians that doesn't tie their covariances, where log p can be evaluated."""
        is_able = isinstance(family, Mixture) and family.law == "gaussian" and family.covariance != "tied"
        return is_able and super().solves(objective, family, access) and access.can_evaluate

    def starts_from_modes(self, family: Family) -> bool:
        """Its starts are the modes of p."""
        return True

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Minimise from every start on the first nodes, then the distinct optima on twice as many until they stay."""
        if not isinstance(family, Mixture):
            raise TypeError(family)
        first = count = first_count(target.dim) if family.count <= 4 else max(64, first_count(target.dim) // 4)
        locs, trils = find_starts(target, seed)
        starts, iterations = _starts(family, locs, trils), 0
        begun = self._on_nodes(target, family, count, seed, starts)
        trail: list[float] = []
        state, done = self._climb(begun, trail, rounds=2)
        grown, more = self._grow(target, family, locs, trils, count, seed, work)
        state = _stacked([state, grown] if grown is not None else [state])
        state = state.take(state.elbo >= state.elbo.max() - _CLOSE)
        state, last = self._climb(state, trail)
        iterations += done + more + last
        while True:
            refuse_infinite(state.elbo)
            best, error, is_settled = int(state.elbo.argmax()), math.inf, target.dim == 1
            spread = torch.linalg.vector_norm(state.tril[best], dim=-1)
            refuse_unbounded(float(state.elbo[best]), spread, target.names, float(state.residual[best]))
            if count > first:
                lost = (state.elbo - begun.elbo) / 3
                error = float(lost[best])
                is_settled = bool((lost <= self.node_loss)[state.elbo >= state.elbo[best] - _CLOSE].all())
            if is_settled or 2 * count > self.max_nodes:
                break
            kept = [mixture_parts(one.model) for one in self._optima(state, _ROUGH)[:_KEPT]]
            if not target.evaluations.affords(len(kept) * family.count * 2 * count):
                break
            work.tell("doubling the nodes", float("nan"))
            count *= 2
            begun = self._on_nodes(target, family, count, seed, [(p.log(), loc, tril) for p, loc, tril, _ in kept])
            state, done = self._climb(begun, trail)
            iterations += done
        state, done = self._climb(state, trail, self.tolerance)
        iterations, best = iterations + done, int(state.elbo.argmax())
        node_error = None if target.dim == 1 or math.isinf(error) else error
        return Solution(
            self._optima(state, _SETTLED), iterations, float(state.residual[best]), node_error, len(state.z), history=tuple(trail)
        )

    def _on_nodes(self, target: Target, family: Mixture, count: int, seed: int, starts: Sequence[Start]) -> Mixtures:
        z, w = (part.to(target.device) for part in gaussian_rule(target.dim, count, seed + count))
        logits, loc, tril = (torch.stack(parts).to(target.device) for parts in zip(*starts, strict=True))
        if family.covariance == "diagonal":
            tril = torch.diag_embed(torch.linalg.vector_norm(tril, dim=-1))
        return Mixtures.at(family, target, z, w, logits, loc, tril)

    def _climb(
        self, state: Mixtures, trail: list[float], tolerance: float = _ROUGH, rounds: int | None = None
    ) -> tuple[Mixtures, int]:
        """L-BFGS, whitened anew by each component after every `_CALLS` calls, until the gradient is small.

        `trail` gets the best loss after each of these rounds.
        """
        done, active = 0, (state.residual > tolerance) & state.elbo.isfinite()
        for _ in range(self.rounds if rounds is None else rounds):
            some = state.take(active)
            if not bool(active.any()) or not state.target.evaluations.affords(some.points):
                break
            trial = some.ascended(state.target.evaluations.calls(some.points, _CALLS), tolerance**2 / 2)
            gain = trial.elbo - state.elbo[active]
            better = (gain > 0) | ((gain > -1e-9) & (trial.residual < state.residual[active]))
            state = state.put(active, better, trial)
            rows = active.nonzero()[:, 0]
            # A round that gained nothing has met a kink or rounding.
            active[rows] = better & (trial.residual > tolerance) & ((gain > _GAIN) | (trial.residual > _SETTLED / 10))
            done += 1
            trail.append(-float(state.elbo.max()))
        return state, done

    def _grow(
        self,
        target: Target,
        family: Mixture,
        locs: Float[Tensor, "s d"],
        trils: Float[Tensor, "s d d"],
        count: int,
        seed: int,
        work: Work,
    ) -> tuple[Mixtures | None, int]:
        """Add components where log p − log q is largest until there are K; none where one start can't be evaluated."""
        state, done = self._on_nodes(target, family, count, seed, [(locs.new_zeros(1), locs[:1], trils[:1])]), 0
        while state.loc.shape[1] < family.count:
            state, rounds = self._climb(state, [], rounds=1)
            done += rounds
            if not bool(state.elbo.isfinite().all()) or target.evaluations.is_spent:
                return None, done
            room = family.count - state.loc.shape[1]
            work.tell("looking for modes", 1 - room / family.count)
            found = discovered(target, state, locs, room, seed + state.loc.shape[1])
            if not len(found[0]):
                return None, done
            state = joined(state, *found)
        return state, done

    def _optima(self, state: Mixtures, settled: float) -> tuple[Optimum, ...]:
        found = [
            Optimum(model, -float(elbo), bool(residual <= settled), False)
            for model, elbo, residual in zip(state.models(), state.elbo, state.residual, strict=True)
            if math.isfinite(float(elbo))
        ]
        return distinct([one for one in found if one.converged] or found, same=0.05)


def _stacked(states: Sequence[Mixtures]) -> Mixtures:
    parts = [torch.cat([getattr(one, name) for one in states]) for name in ("logits", "loc", "tril")]
    return states[0].moved(*parts)


def _starts(family: Mixture, locs: Float[Tensor, "s d"], trils: Float[Tensor, "s d d"]) -> list[Start]:
    """Mixtures on the best modes, and each start split along its longest axis."""
    starts = [_split(loc, tril, family.count) for loc, tril in zip(locs, trils, strict=True)]
    if len(locs) > family.count > 1:
        starts.insert(0, (locs.new_zeros(family.count), locs[: family.count], trils[: family.count]))
    return starts[:_KEPT]


def _split(loc: Float[Tensor, " d"], tril: Float[Tensor, "d d"], count: int) -> Start:
    """Spread K components evenly over ±1 standard deviation of one Gaussian along its longest axis."""
    _, vector = torch.linalg.eigh(tril @ tril.T)
    axis = vector[:, -1] * torch.linalg.vector_norm(tril.T @ vector[:, -1])
    at = (
        torch.linspace(-1, 1, count, dtype=loc.dtype, device="cpu")
        if count > 1
        else torch.zeros(1, dtype=loc.dtype, device="cpu")
    )
    return loc.new_zeros(count), loc + at[:, None] * axis, tril.expand(count, -1, -1)
