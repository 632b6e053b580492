"""Sample-average approximation: reverse KL of a mixture on fixed nodes, with components added where it lacks mass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.families import Family, Mixture
from whichkl.objectives import ReverseKL
from whichkl.solvers.nodes.doubling import NEAR_BEST, Verdict, double_nodes, judge_by_cost, refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.ensemble import Ensemble, first_nodes, optima_of, stacked
from whichkl.solvers.nodes.gaussian_rule import least_count
from whichkl.solvers.nodes.mixture_descent import descend, with_more_entropy
from whichkl.solvers.nodes.points import Nodes, Points, log_density
from whichkl.solvers.nodes.starts import climb_to_modes, find_starts
from whichkl.solvers.solver import Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_OPTIMA = 6
"""Largest number of optima that are carried to more nodes, and of starts."""
_MIN_GAIN = 1e-4
"""Nats. A round that gains less, at a small gradient, is the last: it has met a kink or rounding."""
_SETTLED, _ROUGH = 2e-2, 1e-2
"""Lengths of the gradient at which a model counts as an optimum, and which suffices to judge the nodes: it costs 5·10⁻⁵ nats."""
_SETTLED_EXACTLY = 1e-3
"""The same on the line, where the nodes have no error."""
_MAX_LOSS_OF_START = 1_000.0
"""Nats above the best start beyond which a start isn't followed."""
_FIRST_ENTROPY_NODES, _LAST_ENTROPY_NODES, _MIN_ENTROPY_NODES = 8_192, 32_768, 1_024
"""Numbers of nodes of all components for log q alone, at first and in the last descent, and the smallest one per component."""
_MAX_FACTOR = 8.0
"""Largest factor by which the nodes are multiplied at once."""
_DRAWS = 1024
"""Number of draws among which places that lack mass are sought."""
_MAX_ASCENTS = 48
"""Largest number of places from which ascents to modes begin."""
_STRETCHES = (1.5, 3.0, 8.0)
"""Factors by which these draws are spread."""
_MIN_DISTANCE = 3.0
"""Standard deviations. Smallest distance of a new mode from every component."""
_MIN_LOG_SHARE = -12.0
"""Smallest logarithm of a new component's share; one of less isn't worth its nodes."""
Start = tuple[Float[Tensor, " k"], Float[Tensor, "k d"], Float[Tensor, "k d d"]]


@dataclass(frozen=True)
class SampleAverage(Solver):
    """argmin KL(q‖p) over mixtures: nodes stratified over the components, L-BFGS from several starts, modes discovered.

    Starts are the modes and Gaussians of `find_starts`, each split along its longest axis where there are fewer modes than
    components. One more start grows: components are added where log p − log q is largest, and the ELBO is climbed after
    each. A descent begins with steps on an expansion of log p about the nodes, and E_q[log q] is taken over more nodes (see
    `whichkl.solvers.nodes.expansion`). Nodes are multiplied, each time with new ones, until they cost less than `node_loss` nats
    (see `judge_by_cost`).

    Source: Giordano, Ingram & Broderick (2024) for fixed draws; stratification as in Kobyzev et al., Morningstar et
    al. (2021); growth as in Arenz, Zhong & Neumann (2020).
    """

    name = "sample_average"
    direction = "reverse"
    families = (Mixture,)
    mode_families = families
    covariances = ("full", "diagonal")

    tolerance: float = 1e-5
    node_loss: float = 0.004
    rounds: int = 8
    max_nodes: int = 4096

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Minimise from every start on the first nodes, then from the distinct optima on more nodes until they stay."""
        if not isinstance(family, Mixture):
            raise TypeError(family)
        count, trail, trail_of_growth = least_count(target.dim), list[float](), list[float]()
        descended = partial(descend, tolerance=_ROUGH, rounds=self.rounds, trail=trail, min_gain=_MIN_GAIN, expands=True)
        locs, trils = find_starts(target, seed)
        begun = _on_nodes(target, family, count, seed, _starts(family, locs, trils))
        # Two rounds tell good starts from bad ones; only those near the best are worth more.
        state = descended(begun.take(begun.loss <= begun.loss.min() + _MAX_LOSS_OF_START), rounds=2, tolerance=_SETTLED)
        seedling = _on_nodes(target, family, count, seed, [(locs.new_zeros(1), locs[:1], trils[:1])])
        grown = _grow(target, family, seedling, locs, seed, work, trail_of_growth)
        if grown is not None:
            state = state.joined(grown)
        state = descended(state.take(state.loss <= state.loss.min() + NEAR_BEST))
        if target.dim > 1:
            state = descended(with_more_entropy(state, Nodes.of(target, _entropy_nodes(family, _FIRST_ENTROPY_NODES), seed + 1)))

        def refit(before: Ensemble, count: int) -> tuple[Ensemble, Verdict] | None:
            kept = [one.model for one in optima_of(before, _SETTLED)[:_MAX_OPTIMA]]
            if not target.evaluations.affords(len(kept) * family.count * count):
                return None
            work.tell("doubling the nodes", math.nan)
            begun = before.on(Nodes.of(target, count, seed), stacked(kept))
            ended = _checked(descended(begun))
            verdict = judge_by_cost(self.node_loss, begun, ended)
            times = max(2.0, min(_MAX_FACTOR, verdict.node_error / self.node_loss))
            return ended, verdict._replace(factor=1 << math.ceil(math.log2(times)))

        first = first_nodes(family, target.dim)
        state, node_error = double_nodes(_checked(state), count, self.max_nodes, target.dim == 1, refit, first)
        is_exact, last = target.dim == 1, _entropy_nodes(family, _LAST_ENTROPY_NODES)
        if state.entropy is not None and last > len(state.nodes.z):
            state = with_more_entropy(state, Nodes.of(target, last, seed + 1))
        state = descended(state, tolerance=self.tolerance if is_exact else _ROUGH)
        residual = float(state.residual[int(state.loss.argmin())])
        found, iterations = optima_of(state, _SETTLED_EXACTLY if is_exact else _SETTLED), len(trail) + len(trail_of_growth)
        return Solution(found, iterations, residual, node_error, len(state.nodes.z), history=tuple(trail))


def _on_nodes(target: Target, family: Mixture, count: int, seed: int, starts: Sequence[Start]) -> Ensemble:
    logits, loc, tril = (torch.stack(parts) for parts in zip(*starts, strict=True))
    nodes = Nodes.of(target, count, seed)
    return Ensemble.at(ReverseKL(), family, target, Points.none(target), nodes, (logits, loc, tril))


def _grow(
    target: Target, family: Mixture, state: Ensemble, locs: Float[Tensor, "s d"], seed: int, work: Work, trail: list[float]
) -> Ensemble | None:
    """Add components where log p − log q is largest until there are K; None if a mixture on the way can't be evaluated."""
    while state.loc.shape[1] < family.count:
        state = descend(state, _ROUGH, 1, trail, _MIN_GAIN, expands=True)
        if not bool(state.loss.isfinite().all()) or target.evaluations.is_spent:
            return None
        room = family.count - state.loc.shape[1]
        work.tell("looking for modes", 1 - room / family.count)
        found = find_missing_mass(target, state, locs, room, seed + state.loc.shape[1])
        if not len(found[0]):
            return None
        state = add_components(state, *found)
    return state


def _entropy_nodes(family: Mixture, count: int) -> int:
    """Return the nodes per component, a power of two."""
    return max(_MIN_ENTROPY_NODES, 1 << math.floor(math.log2(count / family.count)))


def _checked(state: Ensemble) -> Ensemble:
    """Return mixtures; refuse a target whose ELBO is finite nowhere, or whose best model spreads or shrinks without bound."""
    refuse_infinite(-state.loss)
    refuse_unbounded(-state.loss, torch.linalg.vector_norm(state.tril, dim=-1), state.residual, state.target.names)
    return state


def _starts(family: Mixture, locs: Float[Tensor, "s d"], trils: Float[Tensor, "s d d"]) -> list[Start]:
    """Return a mixture on the best modes, and each start spread over ±1 standard deviation along its longest axis."""
    count, starts = family.count, list[Start]()
    if len(locs) > count > 1:
        starts.append((locs.new_zeros(count), locs[:count], trils[:count]))
    at = torch.linspace(-1, 1, count, dtype=locs.dtype, device="cpu") if count > 1 else locs.new_zeros(1)
    for loc, tril in zip(locs, trils, strict=True):
        longest = torch.linalg.eigh(tril @ tril.T)[1][:, -1]
        axis = longest * torch.linalg.vector_norm(tril.T @ longest)
        starts.append((loc.new_zeros(count), loc + at[:, None] * axis, tril.expand(count, -1, -1)))
    return starts[:_MAX_OPTIMA]


def find_missing_mass(
    target: Target, model: Ensemble, points: Float[Tensor, "c d"], most: int, seed: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"], Float[Tensor, "n d d"]]:
    """Return log weights, means and factors of at most `most` components for the places where log p − log q is largest.

    The candidates are draws of the mixture, spread 1.5 to 8 times as wide, and the given points. They are ranked by
    log p − max(log q, max log q − Δ), Δ = 20 + 2d, so that far tails don't outrank modes, and the best of them climb log p. A
    mode that is near no component gives its Laplace approximation, weighted by its evidence. If there is none, the target is
    curved rather than incomplete: the best candidate gets half the scale of its nearest component.

    Source: Arenz, Zhong & Neumann (2020), VIPS, for where components are added.
    """
    logits, loc, tril = (part[0].cpu() for part in (model.logits, model.loc, model.tril))
    generator = torch.Generator().manual_seed(seed)
    # Equally many draws of every component, also of light ones.
    which = torch.multinomial(torch.ones_like(logits), _DRAWS, replacement=True, generator=generator)
    z = torch.randn(_DRAWS, loc.shape[1], generator=generator, dtype=loc.dtype, device="cpu")
    stretch = torch.tensor(_STRETCHES, dtype=loc.dtype, device="cpu").repeat(_DRAWS)[:_DRAWS]
    pool = torch.cat([points, loc[which] + stretch[:, None] * torch.einsum("nij,nj->ni", tril[which], z)])
    log_p = target.tried(pool.to(target.device)).cpu()
    log_q = log_density(pool[None], logits[None], loc[None], tril[None])[0]
    dim = loc.shape[1]
    lacking = log_p - torch.maximum(log_q, log_q.max() - 20 - 2 * dim)
    lacking = torch.where(lacking.isfinite(), lacking, -math.inf)
    order = lacking.argsort(descending=True)[:_MAX_ASCENTS]
    best = order[lacking[order] > -math.inf]
    if not len(best):
        return logits[:0], loc[:0], tril[:0]
    modes = climb_to_modes(target, pool[best], most + len(loc), max_calls=60)
    white = torch.linalg.solve_triangular(tril[None], (modes.locs[:, None] - loc)[..., None], upper=False)[..., 0]
    # The model's loss is about −log of the mass that it covers: the sum is the log of the new component's mass relative to that.
    mass = modes.evidence + dim / 2 * math.log(2 * math.pi) + float(model.loss[0])
    is_new = (torch.linalg.vector_norm(white, dim=-1) > _MIN_DISTANCE).all(-1) & (mass > _MIN_LOG_SHARE)
    if bool(is_new.any()):
        chosen = is_new.nonzero()[:, 0]
        chosen = chosen[mass[chosen].argsort(descending=True)][:most]
        return mass[chosen], modes.locs[chosen], modes.trils[chosen]
    place = pool[best[0]]
    near = torch.linalg.vector_norm(torch.linalg.solve_triangular(tril, (place - loc)[..., None], upper=False)[..., 0], dim=-1)
    nearest = int(near.argmin())
    # A share of e⁻² of the nearest component's.
    return logits[nearest : nearest + 1] - 2, place[None], tril[nearest : nearest + 1] / 2


def add_components(
    model: Ensemble, log_mass: Float[Tensor, " n"], loc: Float[Tensor, "n d"], tril: Float[Tensor, "n d d"]
) -> Ensemble:
    """Return one mixture with further components; masses are relative to its own, and at least a hundredth of an equal share."""
    count = model.loc.shape[1] + len(loc)
    mass = log_mass.clamp(min=math.log(0.01 / count), max=math.log(10.0)).to(model.logits)
    logits = torch.cat([model.logits[0], mass]).log_softmax(0)
    parts = (torch.cat([own[0], new.to(own)]) for own, new in ((model.loc, loc), (model.tril, tril)))
    loc, tril = (part[None] for part in parts)
    return model.on(model.nodes, (logits[None], loc, tril))
