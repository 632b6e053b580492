"""Two-sided: divergences between the directions, on points of p and nodes of q, from the optima of both ends."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import DeadDensityError, InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.divergences.draws import bridge
from whichkl.families import Family, Gaussian, Mixture
from whichkl.families.gaussian import loc_and_tril
from whichkl.families.mixture import mixture_parts
from whichkl.objectives import Between, ForwardKL, Jeffreys, Objective, ReverseKL
from whichkl.samples import Block
from whichkl.solvers.nodes.gaussian_rule import first_count, gaussian_rule
from whichkl.solvers.nodes.mean_field import MeanField
from whichkl.solvers.nodes.natural_gradient import NaturalGradient
from whichkl.solvers.nodes.sample_average import SampleAverage
from whichkl.solvers.nodes.sides import Nodes, Points, Sides
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.solvers.rows.em import ExpectationMaximization
from whichkl.solvers.rows.points import FRESH, is_exact, points_of
from whichkl.solvers.solver import Held, Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations

_CLOSE, _KEPT = 3.0, 8
_FEW = 4_096
"""Points of p, of many, on which starts are followed before all are taken."""
_CALLS = 60
"""Of L-BFGS, before the coordinates are whitened anew."""
_LEAST = 20
"""Calls that a start should have: rather fewer starts than fewer calls for each."""
_BRIDGED = 4_096
"""Nodes of a start, and draws among them, from which log Z is bridged."""
_SHARE = 0.25
"""Of the evaluations that are left, which finding a direction's optima may take."""
_ROUGH, _SETTLED = 1e-2, 1e-3
"""Length of the gradient that tells whether more nodes are needed, and from which an optimum counts as one."""
_NARROW = 1e-4
"""Of the mixture's spread: the least that a component may have; a narrower one has collapsed onto a few points."""
Parts = tuple[Float[Tensor, "b k"], Float[Tensor, "b k d"], Float[Tensor, "b k d d"]]


@dataclass(frozen=True)
class TwoSided(Solver):
    """argmin of a divergence between the directions, over Gaussians and mixtures of them, deterministic.

    The expectation under p is over its samples, over draws made once, or by quadrature on the line; that under q over nodes
    stratified over its components. On both the loss is a smooth function of means, scales and weights, and L-BFGS
    descends it in coordinates that each component whitens, from the forward-KL optimum and from every reverse-KL
    optimum, so that the ends of a path are those of the two directions. Nodes are doubled, each time with new ones, until they
    cost less than `node_loss` nats (as `NaturalGradient` says); an optimum of few nodes that is worse on new ones than the
    starts are is given up for these. Losses are divided by the objective's curvature inside, not
    in what is returned.

    Source: Giordano, Ingram & Broderick (2024) for fixed draws.
    """

    name: ClassVar[str] = "two_sided"
    refits: ClassVar[bool] = False
    holds_chains: ClassVar[bool] = True
    objective: ClassVar[type[Objective]] = Between  # type: ignore[type-abstract]
    families: ClassVar[tuple[type[Family], ...]] = (Gaussian, Mixture)

    minimised: Between = field(default_factory=Jeffreys)
    """Which of them; `fit` sets it."""
    tolerance: float = 1e-6
    node_loss: float = 0.004
    rounds: int = 8
    max_nodes: int = 16_384

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """A divergence between the directions, to Gaussians or a mixture of them, not tied and not of low rank."""
        is_able = isinstance(family, (Gaussian, Mixture)) and family.covariance in ("full", "diagonal")
        is_able = is_able and getattr(family, "law", "gaussian") == "gaussian"
        return is_able and super().solves(objective, family, access) and objective.requires.met_by(access)

    def toward(self, objective: Objective) -> TwoSided:
        """Return the solver of this very objective."""
        if not isinstance(objective, Between):
            raise TypeError(objective)
        return replace(self, minimised=objective)

    def starts_from_modes(self, family: Family) -> bool:
        """Its starts are the optima of both directions, and those of reverse KL start from the modes of p."""
        return True

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Descend from both directions' optima on few points of p, then the distinct optima on all, and on more nodes."""
        if not isinstance(family, (Gaussian, Mixture)):
            raise TypeError(family)
        whole, notes = self._points(target, family, seed)
        work.tell("fitting both directions to start from", math.nan)
        parts = self._starts(target, family, seed, whole)
        log_z = 0.0
        if self.minimised.reads_log_z and not target.normalized:
            log_z = self._log_z(Sides.at(Jeffreys(), family, target, 0.0, whole, _nodes(target, _BRIDGED, seed), parts))
            whole = replace(whole, log_p=whole.log_p - log_z)
        few = whole if len(whole.x) <= _FEW or is_exact(target) else whole.at(_spread(len(whole.x), _FEW))
        first = count = first_count(target.dim) if _size(family) <= 4 else max(64, first_count(target.dim) // 4)
        begun = _affordable(Sides.at(self.minimised, family, target, log_z, few, _nodes(target, count, seed), parts))
        trail: list[float] = []
        state, iterations = self._descend(begun, _ROUGH, trail)
        while True:
            if not bool(state.loss.isfinite().any()):
                because = "it isn't finite at any start: log_prob is -inf where the models have mass"
                instead = "Pass `support=`, or use a bounded divergence such as jensen_shannon"
                raise TargetError(cannot(f"minimise `{self.minimised.spec}` here", because, instead))
            best, error = int(state.loss.argmin()), math.inf
            is_settled = target.dim == 1 or not self.minimised.reads_q
            if count > first:
                lost = (begun.loss - state.loss) / 3
                error = float(lost[best])
                is_settled = is_settled or bool((lost <= self.node_loss)[state.loss <= state.loss[best] + _CLOSE].all())
            if is_settled or 2 * count > self.max_nodes:
                break
            kept = _stacked([one.model for one in self._optima(state, _ROUGH)[:_KEPT]])
            if not target.evaluations.affords((len(kept[0]) + len(parts[0])) * 2 * state.each):
                break
            work.tell("doubling the nodes", math.nan)
            count *= 2
            begun = state.on(_nodes(target, count, seed), kept)
            again = state.on(begun.nodes, parts)
            if float(begun.loss.min()) > float(again.loss.min()):
                begun = again  # what was found fits those few nodes alone: on others it's worse than where it began
            state, done = self._descend(begun, _ROUGH, trail)
            iterations += done
        work.tell("descending on all points", math.nan)
        state = replace(state, points=whole).measured() if few is not whole else state
        state, done = self._descend(state, self.tolerance, trail)
        optima = self._optima(state, _SETTLED)
        held = None if not stride or target.samples is None else self._held(target, state, optima[0], stride, seed)
        node_error = None if target.dim == 1 or math.isinf(error) else error
        residual = float(state.residual[int(state.loss.argmin())])
        nodes = len(state.nodes.z) if self.minimised.reads_q else None
        return Solution(optima, iterations + done, residual, node_error, nodes, held, notes, tuple(trail))

    def _points(self, target: Target, family: Gaussian | Mixture, seed: int) -> tuple[Points, tuple[str, ...]]:
        """Points of p in float64 with log p of them, of very many rows some, evenly; none where p isn't read."""
        if not self.minimised.reads_p:
            none = torch.zeros(0, dtype=torch.float64, device=target.device)
            return Points(none.reshape(0, target.dim), none, none), ()
        x, w = points_of(target, seed, _SHARE / 2)  # drawn, and evaluated
        notes: tuple[str, ...] = ()
        if len(x) > FRESH and not is_exact(target):
            rows = _spread(len(x), FRESH)
            notes = (f"of {len(x):,} rows {FRESH:,} were fitted, taken evenly",)
            x, w = x[rows], w[rows] / w[rows].sum()
        log_p = target.log_prob(x.to(target.dtype)).detach().to(torch.float64)
        if bool((log_p == -math.inf).any()):
            because = f"{int((log_p == -math.inf).sum())} of its {len(x)} draws fell where its own log density is −∞"
            raise TargetError(cannot("use this target", because, "Check that draws and `log_prob` describe one distribution"))
        return Points(x, w, log_p), notes

    def _starts(self, target: Target, family: Gaussian | Mixture, seed: int, points: Points) -> Parts:
        """The optima of both directions, as far as the access has them, each at the cost of a share of what may be used."""
        models: list[Distribution] = []
        if ForwardKL().requires.met_by(target.access):
            forward: Solver = ClosedForm() if isinstance(family, Gaussian) else ExpectationMaximization()
            made = len(points.x) > 0 and target.samples is None  # drawn, or a rule: not anew
            known = Target(samples=points.x, weights=points.w if is_exact(target) else None) if made else target
            with _share(target.evaluations):
                models += [one.model for one in forward.solve(known, family, seed).optima[:_KEPT]]
        if ReverseKL().requires.met_by(target.access):
            single: Solver = MeanField() if family.covariance == "diagonal" else NaturalGradient()
            reverse = single if isinstance(family, Gaussian) else SampleAverage()
            try:
                with _share(target.evaluations):
                    models += [one.model for one in reverse.solve(target, family, seed).optima[:_KEPT]]
            except DeadDensityError:
                raise
            except TargetError:  # reverse KL may be infinite for every member, and the objective not
                if not models:
                    raise
        return _stacked(models)

    def _log_z(self, starts: Sides) -> float:
        """Log Z, bridged between the points of p and the start that overlaps most with them; by nodes where these have weights.

        Raises:
            TargetError: no start overlaps.
        """
        found, is_even = [], bool((starts.points.w == starts.points.w[0]).all())
        for i, (at_p, at_q, weight) in enumerate(starts.ratios()):
            if not is_even:
                found.append((-float(starts.loss[i]), float(torch.logsumexp(at_q + weight.log(), 0))))
                continue
            drawn = weight.multinomial(_BRIDGED, replacement=True, generator=torch.Generator(weight.device).manual_seed(i))
            with contextlib.suppress(TargetError):
                one = bridge.bridge(at_p, at_q[drawn])
                found.append((one.ess, one.log_z))
        if not found:
            because = "log Z can't be estimated: neither direction's optimum overlaps with p"
            raise TargetError(cannot(f"minimise `{self.minimised.spec}` here", because, "Give a normalised log density"))
        return max(found)[1]

    def _descend(self, state: Sides, tolerance: float, trail: list[float]) -> tuple[Sides, int]:
        """L-BFGS, whitened anew by each component after every `_CALLS` calls, until the gradient is small.

        `trail` gets the best loss after each of these rounds.
        """
        done, active = 0, (state.residual > tolerance) & state.loss.isfinite()
        for _ in range(self.rounds):
            rows = active.nonzero()[:, 0]
            cost = len(rows) * state.each
            if len(rows) == 0 or not state.target.evaluations.affords(cost):
                break
            trial = state.take(active).descended(state.target.evaluations.calls(cost, _CALLS), tolerance**2 / 2)
            gain = state.loss[rows] - trial.loss
            better = (gain > 0) | ((gain > -1e-9) & (trial.residual < state.residual[rows]))
            state = state.put(rows[better], trial.take(better))
            active[rows] = better & (trial.residual > tolerance)
            done += 1
            trail.append(float(state.loss.min()) * self.minimised.curvature)
        return state, done

    def _held(self, target: Target, state: Sides, best: Optimum, stride: int, seed: int) -> Held | None:
        """The same optimum, found again without some rows, and these."""
        if target.samples is None:
            return None
        out = left_out(target, stride)
        x, w = points_of(target, seed)
        log_p = target.log_prob(x[~out].to(target.dtype)).detach().to(torch.float64)
        rest = Points(x[~out], w[~out], log_p - state.log_z)
        rest = rest.at(_spread(len(rest.x), FRESH)) if len(rest.x) > FRESH else rest.at(slice(None))
        begun = replace(state, points=rest).on(state.nodes, _stacked([best.model]))
        model = self._descend(begun, 1e-4, [])[0].models()[0]
        return Held(Block(x[out], w[out] * len(w)), model)

    def _optima(self, state: Sides, settled: float) -> tuple[Optimum, ...]:
        found = [
            Optimum(model, float(loss) * self.minimised.curvature, bool(residual <= settled), False)
            for model, loss, residual, narrow in zip(state.models(), state.loss, state.residual, _collapsed(state), strict=True)
            if math.isfinite(float(loss)) and not narrow
        ]
        if not found:
            because = "every descent ended with a component that has collapsed onto a few points of p"
            raise InputError(cannot(f"minimise `{self.minimised.spec}`", because, "Use fewer components, or more samples"))
        same = 0.02 if isinstance(state.family, Gaussian) else 0.05
        return distinct([one for one in found if one.converged] or found, same=same)


def _share(counts: Evaluations) -> contextlib.AbstractContextManager[dict[str, int]]:
    """Let a direction use a part of what is left: the descent on the objective itself comes after it."""
    return counts.capped((counts.most - counts.total) * _SHARE)


def _affordable(starts: Sides) -> Sides:
    """The best starts, as many as a budget lets descend for `_LEAST` calls; all of them without one."""
    counts = starts.target.evaluations
    many = (counts.most - counts.total) / (_LEAST * max(1, starts.each))
    if many >= len(starts.loss):
        return starts
    return starts.take(starts.loss <= starts.loss.sort().values[max(0, int(many) - 1)])


def _size(family: Gaussian | Mixture) -> int:
    """The number of components; 0 of a Gaussian."""
    return 0 if isinstance(family, Gaussian) else family.count


def _stacked(models: list[Distribution]) -> Parts:
    """Log weights, means and factors of several models."""
    parts = []
    for model in models:
        if hasattr(model, "mixture_distribution"):
            probs, loc, tril, _ = mixture_parts(model)
        else:
            loc, tril = (part[None] for part in loc_and_tril(model))
            probs = torch.ones_like(loc[:, 0])
        parts.append((probs.clamp(min=1e-300).log(), loc, tril))
    logits, loc, tril = (torch.stack(part).to(torch.float64) for part in zip(*parts, strict=True))
    return logits, loc, tril


def _nodes(target: Target, count: int, seed: int) -> Nodes:
    z, w = gaussian_rule(target.dim, count, seed + count)
    return Nodes(z.to(target.device), w.to(target.device))


def _spread(count: int, most: int) -> Tensor:
    """Numbers of `most` rows out of `count`, evenly."""
    return torch.linspace(0, count - 1, most, dtype=torch.float64, device="cpu").long()


def left_out(target: Target, stride: int) -> Bool[Tensor, " n"]:
    """Every `stride`-th row, or distinct row; of chains, whose neighbours would tell of each other, the last rows of each."""
    n = 0 if target.samples is None else len(target.samples)
    if target.repeats is not None:
        return target.repeats.rank(0) % stride == 0
    if target.chains is None:
        return torch.arange(n, device=target.device) % stride == stride // 2
    out = torch.zeros(n, dtype=torch.bool, device=target.device)
    for one in target.chains.unique():
        rows = (target.chains == one).nonzero()[:, 0]
        out[rows[-max(4, len(rows) // stride) :]] = True
    return out


def _collapsed(state: Sides) -> Bool[Tensor, " b"]:
    """Whether a component is far narrower in some direction than the mixture is there."""
    weight = state.logits.softmax(-1)
    apart = state.loc - torch.einsum("bk,bki->bi", weight, state.loc)[:, None]
    whole = torch.einsum("bk,bkij,bklj->bil", weight, state.tril, state.tril)
    whole = whole + torch.einsum("bk,bki,bkj->bij", weight, apart, apart)
    root, failed = torch.linalg.cholesky_ex(whole)
    white = torch.linalg.solve_triangular(root[:, None], state.tril, upper=False)
    narrow: Tensor = (torch.linalg.svdvals(white)[..., -1] < _NARROW).any(-1) | (failed > 0)
    return narrow
