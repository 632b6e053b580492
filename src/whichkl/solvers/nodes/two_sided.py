"""Two-sided: divergences between the directions, on points of p and nodes of q, from the optima of both directions."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import DeadDensityError, InputError, TargetError, cannot
from whichkl.divergences.draws import bridge
from whichkl.families import Family, Gaussian, Mixture
from whichkl.objectives import Jeffreys, Objective, ReverseKL
from whichkl.samples import Block
from whichkl.solvers.nodes.doubling import Verdict, double_nodes, judge_by_cost
from whichkl.solvers.nodes.ensemble import Ensemble, first_nodes, optima_of, stacked
from whichkl.solvers.nodes.mean_field import MeanField
from whichkl.solvers.nodes.mixture_descent import descend
from whichkl.solvers.nodes.natural_gradient import NaturalGradient
from whichkl.solvers.nodes.points import Nodes, Parts, Points
from whichkl.solvers.nodes.sample_average import SampleAverage
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.solvers.rows.em import ExpectationMaximization
from whichkl.solvers.rows.rows import FRESH, is_exact, log_prob_at_points, points_of
from whichkl.solvers.solver import Held, Optimum, Solution, Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations

_MAX_OPTIMA = 8
"""Largest number of optima that are carried to more nodes."""
_MAX_POINTS_AT_FIRST = 4_096
"""Largest number of p's points from which the descents start; the last descent uses all points."""
_MIN_CALLS_PER_START = 20
"""Smallest number of calls a start needs; under a budget there are fewer starts rather than fewer calls for each."""
_NODES_FOR_LOG_Z = 4_096
"""Number of nodes of a start, and of draws among them, for the bridge to log Z."""
_SHARE_PER_DIRECTION = 0.25
"""Share of the evaluations that are left that finding one direction's optima may use."""
_ROUGH = 1e-2
"""Length of the gradient that suffices to judge the nodes."""
_SETTLED = 1e-3
"""Length of the gradient below which a model counts as an optimum."""
_MIN_RELATIVE_SCALE = 1e-4
"""Smallest scale of a component relative to the mixture's; a narrower component has collapsed onto a few points."""


@dataclass(frozen=True)
class TwoSided(Solver):
    """argmin of a divergence between the directions, over Gaussians and mixtures of them, deterministic.

    The expectation under p is over its samples, over draws made once, or by quadrature on the line; the expectation under q
    is over nodes stratified over its components. On both the loss is a smooth function of means, scales and weights. L-BFGS
    descends it in coordinates that each component whitens, from the forward-KL optimum and from every reverse-KL optimum, so
    that the ends of a path are those of the two directions. Nodes are doubled, each time with new ones, until they cost less
    than `node_loss` nats (see `judge_by_cost`). If the optima of few nodes are worse on new nodes than the starts are, the
    starts replace them. Losses are divided by the objective's curvature inside, not in what is returned.

    Source: Giordano, Ingram & Broderick (2024) for fixed draws.
    """

    name = "two_sided"
    refits = False
    holds_chains = True
    direction = "between"
    families = (Gaussian, Mixture)
    mode_families = families
    covariances = ("full", "diagonal")

    minimised: Objective = field(default_factory=Jeffreys)
    """The objective, which `fit` sets."""
    tolerance: float = 1e-6
    node_loss: float = 0.004
    rounds: int = 8
    max_nodes: int = 16_384

    def toward(self, objective: Objective) -> TwoSided:
        """Return the solver of this objective."""
        return replace(self, minimised=objective)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Descend from both directions' optima on few points of p, then the distinct optima on all, and on more nodes."""
        if not isinstance(family, (Gaussian, Mixture)):
            raise TypeError(family)
        whole, notes = self._points(target, seed)
        work.tell("fitting both directions to start from", math.nan)
        parts = self._starts(target, family, seed, whole)
        log_z = 0.0
        if self.minimised.reads_log_z and not target.normalized:
            nodes = Nodes.of(target, _NODES_FOR_LOG_Z, seed)
            log_z = self._log_z(Ensemble.at(Jeffreys(), family, target, whole, nodes, parts))
            whole = replace(whole, log_p=whole.log_p - log_z)
        few = whole
        if len(whole.x) > _MAX_POINTS_AT_FIRST and not is_exact(target):
            # Most of the way needs no more points: the last descent, on all of them, starts near its end.
            few = whole.at(_evenly(len(whole.x), _MAX_POINTS_AT_FIRST))
        count = first_nodes(family, target.dim)
        begun = _affordable(Ensemble.at(self.minimised, family, target, few, Nodes.of(target, count, seed), parts, log_z))
        trail: list[float] = []
        descended = partial(descend, tolerance=_ROUGH, rounds=self.rounds, trail=trail)

        def refit(before: Ensemble, count: int) -> tuple[Ensemble, Verdict] | None:
            kept = stacked([one.model for one in self._optima(before, _ROUGH)[:_MAX_OPTIMA]])
            if not target.evaluations.affords((len(kept[0]) + len(parts[0])) * 2 * before.cost):
                return None
            work.tell("doubling the nodes", math.nan)
            begun = before.on(Nodes.of(target, count, seed), kept)
            again = before.on(begun.nodes, parts)
            # An optimum that fits few nodes alone is worse on new ones than where it started: the starts then take its place.
            begun = again if float(begun.loss.min()) > float(again.loss.min()) else begun
            ended = self._check(descended(begun))
            return ended, judge_by_cost(self.node_loss, begun, ended)

        is_enough = target.dim == 1 or not self.minimised.reads_q
        state, node_error = double_nodes(self._check(descended(begun)), count, self.max_nodes, is_enough, refit)
        work.tell("descending on all points", math.nan)
        state = replace(state, points=whole).measured() if few is not whole else state
        state = descended(state, tolerance=self.tolerance)
        optima = self._optima(state, _SETTLED)
        held = self._held(target, state, optima[0], stride, seed) if stride and target.samples is not None else None
        residual = float(state.residual[int(state.loss.argmin())])
        used = len(state.nodes.z) if self.minimised.reads_q else None
        return Solution(optima, len(trail), residual, node_error, used, held, notes, tuple(trail))

    def _check(self, state: Ensemble) -> Ensemble:
        """Return mixtures; refuse them if the loss is finite at none."""
        if not bool(state.loss.isfinite().any()):
            because = "it isn't finite at any start: log_prob is -inf where the models have mass"
            instead = "Pass `support=`, or use a bounded divergence such as jensen_shannon"
            raise TargetError(cannot(f"minimise `{self.minimised.spec}` here", because, instead))
        return state

    def _points(self, target: Target, seed: int) -> tuple[Points, tuple[str, ...]]:
        """Return points of p in float64 with log p there: at most `FRESH` of them, evenly spaced; none if p isn't read."""
        if not self.minimised.reads_p:
            return Points.none(target), ()
        x, w = points_of(target, seed, _SHARE_PER_DIRECTION / 2)  # half for drawing them, half for evaluating them
        if len(x) <= FRESH or is_exact(target):
            return Points(x, w, log_prob_at_points(target, x)), ()
        rows = _evenly(len(x), FRESH)
        few = Points(x[rows], w[rows] / w[rows].sum(), log_prob_at_points(target, x[rows]))
        return few, (f"{FRESH:,} of {len(x):,} rows, evenly spaced, were fitted",)

    def _starts(self, target: Target, family: Gaussian | Mixture, seed: int, points: Points) -> Parts:
        """Return the optima of the directions that the access allows; each may use a share of the evaluations that are left."""
        models: list[Distribution] = []
        if target.access.can_sample:
            forward: Solver = ClosedForm() if isinstance(family, Gaussian) else ExpectationMaximization()
            # Draws made once serve both the start and the descent; other draws would cost the budget twice.
            made = len(points.x) > 0 and target.samples is None  # draws or a rule that exist already
            known = Target(samples=points.x, weights=points.w if is_exact(target) else None) if made else target
            with _share_of(target.evaluations):
                models += [one.model for one in forward.solve(known, family, seed).optima[:_MAX_OPTIMA]]
        if ReverseKL().requires.met_by(target.access):
            single: Solver = MeanField() if family.covariance == "diagonal" else NaturalGradient()
            reverse = single if isinstance(family, Gaussian) else SampleAverage()
            try:
                with _share_of(target.evaluations):
                    models += [one.model for one in reverse.solve(target, family, seed).optima[:_MAX_OPTIMA]]
            except DeadDensityError:  # the log density is broken everywhere, so no other start would help
                raise
            except TargetError:  # reverse KL may be infinite for every member, and the objective not
                if not models:
                    raise
        return stacked(models)

    def _log_z(self, starts: Ensemble) -> float:
        """Return log Z by a bridge between the points of p and the start that overlaps most with them.

        If the points are weighted, as those of quadrature, the nodes of the start with the least loss give it.

        Raises:
            TargetError: no start overlaps.
        """
        found, is_even = [], bool((starts.points.w == starts.points.w[0]).all())
        for i, (at_p, at_q, weight) in enumerate(starts.ratios()):
            if not is_even:
                found.append((-float(starts.loss[i]), float(torch.logsumexp(at_q + weight.log(), 0))))
                continue
            generator = torch.Generator(weight.device).manual_seed(i)
            drawn = weight.multinomial(_NODES_FOR_LOG_Z, replacement=True, generator=generator)  # the bridge needs equal weights
            with contextlib.suppress(TargetError):
                one = bridge.bridge(at_p, at_q[drawn])
                found.append((one.ess, one.log_z))
        if not found:
            because = "log Z can't be estimated: neither direction's optimum overlaps with p"
            raise TargetError(cannot(f"minimise `{self.minimised.spec}` here", because, "Give a normalised log density"))
        return max(found)[1]

    def _held(self, target: Target, state: Ensemble, best: Optimum, stride: int, seed: int) -> Held:
        """Return the optimum that is found without every `stride`-th row, and these rows."""
        out = left_out(target, stride)
        x, w = points_of(target, seed)
        log_p = target.log_prob(x[~out].to(target.dtype)).detach().to(torch.float64)
        rest = Points(x[~out], w[~out], log_p - state.log_z)
        rest = rest.at(_evenly(len(rest.x), FRESH)) if len(rest.x) > FRESH else rest.at(slice(None))
        begun = replace(state, points=rest).on(state.nodes, stacked([best.model]))
        model = descend(begun, 1e-4, self.rounds, []).models()[0]
        return Held(Block(x[out], w[out] * len(w)), model)

    def _optima(self, state: Ensemble, settled: float) -> tuple[Optimum, ...]:
        found = optima_of(state, settled, ~_has_collapsed(state))
        if not found:
            because = "every descent ended with a component that has collapsed onto a few points of p"
            raise InputError(cannot(f"minimise `{self.minimised.spec}`", because, "Use fewer components, or more samples"))
        return found


def _share_of(counts: Evaluations) -> contextlib.AbstractContextManager[dict[str, int]]:
    """Cap the evaluations of one direction, so that enough are left for the descent on the objective itself."""
    return counts.capped((counts.most - counts.total) * _SHARE_PER_DIRECTION)


def _affordable(starts: Ensemble) -> Ensemble:
    """Return as many of the best starts as a budget allows `_MIN_CALLS_PER_START` calls each; all of them without a budget."""
    counts = starts.target.evaluations
    many = (counts.most - counts.total) / (_MIN_CALLS_PER_START * max(1, starts.cost))
    if many >= len(starts.loss):
        return starts
    return starts.take(starts.loss <= starts.loss.sort().values[max(0, int(many) - 1)])


def _evenly(count: int, chosen: int) -> Tensor:
    """Return the numbers of `chosen` evenly spaced rows out of `count`."""
    return torch.linspace(0, count - 1, chosen, dtype=torch.float64, device="cpu").long()


def left_out(target: Target, stride: int) -> Bool[Tensor, " n"]:
    """Return whether each row is held out: every `stride`-th distinct row, or the ends of chains, whose rows correlate."""
    n = 0 if target.samples is None else len(target.samples)
    if target.repeats is not None:
        # Equal rows are held out together: a copy among the fitted rows would be no unseen row.
        return target.repeats.rank(0) % stride == 0
    if target.chains is None:
        return torch.arange(n, device=target.device) % stride == stride // 2
    out = torch.zeros(n, dtype=torch.bool, device=target.device)
    for one in target.chains.unique():
        rows = (target.chains == one).nonzero()[:, 0]
        out[rows[-max(4, len(rows) // stride) :]] = True
    return out


def _has_collapsed(state: Ensemble) -> Bool[Tensor, " b"]:
    """Return whether a component is far narrower than the mixture in some direction."""
    weight = state.logits.softmax(-1)
    apart = state.loc - torch.einsum("bk,bki->bi", weight, state.loc)[:, None]
    whole = torch.einsum("bk,bkij,bklj->bil", weight, state.tril, state.tril)
    whole = whole + torch.einsum("bk,bki,bkj->bij", weight, apart, apart)
    root, failed = torch.linalg.cholesky_ex(whole)
    white = torch.linalg.solve_triangular(root[:, None], state.tril, upper=False)
    narrow: Tensor = (torch.linalg.svdvals(white)[..., -1] < _MIN_RELATIVE_SCALE).any(-1) | (failed > 0)
    return narrow
