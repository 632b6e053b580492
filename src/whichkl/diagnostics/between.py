"""Between: the value of a divergence that reads both sides, on unseen draws of p and fresh draws of q."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import TargetError, WhichklError
from whichkl.chains import standard_error
from whichkl.diagnostics.models import model_target
from whichkl.diagnostics.result import draws_in
from whichkl.diagnostics.weights import on_the_line
from whichkl.divergences import Estimate, Finite
from whichkl.divergences.draws import bridge, monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.importance import pareto_smooth
from whichkl.objectives import Objective
from whichkl.objectives.objective import parameters
from whichkl.samples.repeats import row_keys
from whichkl.solvers import Solution
from whichkl.solvers.nodes.two_sided import left_out
from whichkl.targets import Target

_MAX_STDERR = 0.005
"""Largest standard error, in nats, at which a heavy tail does no harm."""
_MIN_DRAWS_FOR_TAIL = 30


def between_value(
    target: Target, objective: Objective, model: Distribution, solution: Solution, stride: int, seed: int
) -> Estimate:
    """Estimate the divergence: by quadrature on the line, else by draws of p and q; log Z is by bridge sampling.

    The error follows from the influence of each draw, the derivative of the loss in its weight (infinitesimal jackknife).

    Args:
        target: p.
        objective: the divergence.
        model: the fitted q, in the coordinates of the target.
        solution: what the solver found, with the rows that were held out.
        stride: s if every s-th row was held out.
        seed: fixes the draws.

    Source: Efron (1982) for the error; Meng & Wong (1996) for log Z.
    """
    if on_the_line(target):
        with contextlib.suppress(WhichklError):  # heavy tails: Monte Carlo below reports how far it can be trusted
            return _on_the_line(target, objective, model)
    free = target.unconstrained()
    x, w, chains, of, notes = _of_p(target, free, solution, stride, seed)
    law: Distribution = solution.held.model if x is not None and solution.held is not None else solution.best.model
    y = model_target(law, free).draws(draws_in(free.dim), seed + 1).to(torch.float64)
    at_q = _ratio(free, law, y)
    at_p = at_q[:0] if x is None else _ratio(free, law, x)
    groups = None if x is None or target.repeats is None or target.sampler is not None else row_keys(x)
    return _estimate(
        objective, free, _Side(at_p, w, chains, of, groups), _Side(at_q, None, None, f"{len(y):,} draws of q"), notes
    )


@dataclass(frozen=True)
class _Side:
    """Log p − log q at draws of one side, their weights and chains, and the draws in words."""

    ratio: Float[Tensor, " n"]
    weights: Float[Tensor, " n"] | None
    chains: Tensor | None
    of: str
    groups: Tensor | None = None
    """Numbers that equal draws share, where rows repeat."""

    @property
    def even(self) -> Float[Tensor, " n"]:
        """Weights with the sum 1."""
        w = torch.ones_like(self.ratio) if self.weights is None else self.weights.to(self.ratio)
        return w / w.sum() if len(w) else w

    def error(self, influence: Float[Tensor, " n"]) -> tuple[float, float | None]:
        """Return the standard error from the influence of each draw, and the Pareto shape of the influences."""
        if not len(influence):
            return 0.0, None
        if self.weights is not None or self.groups is not None:
            parts = self.even * influence
            if self.groups is not None:
                number = self.groups.unique(return_inverse=True)[1]
                parts = torch.zeros(int(number.max()) + 1, dtype=parts.dtype, device=parts.device).index_add(0, number, parts)
            stderr = float(parts.square().sum().sqrt())
        else:
            stderr = standard_error(influence, self.chains)[0]
        if len(influence) < _MIN_DRAWS_FOR_TAIL:
            return stderr, None
        away = influence - influence.median()
        return stderr, max(_tail(away[away > 0]), _tail(-away[away < 0]))


def _tail(sizes: Float[Tensor, " n"]) -> float:
    """Return the Pareto shape of the tail of positive numbers; −∞ for a short tail, as where a divergence is bounded."""
    if len(sizes) < _MIN_DRAWS_FOR_TAIL:
        return -math.inf
    begin = math.ceil(min(0.2 * len(sizes), 3 * math.sqrt(len(sizes))))
    top = sizes.topk(begin).values
    if float(top[0]) < max(1e-9, 2 * float(top[-1])):
        return -math.inf
    return pareto_smooth(sizes.log())[1]


def _estimate(objective: Objective, p: Target, of_p: _Side, of_q: _Side, notes: Sequence[str]) -> Estimate:
    sides, read = (of_p, of_q), (objective.reads_p, objective.reads_q)
    parts = [side.of for side, is_read in zip(sides, read, strict=True) if is_read]
    weights = [side.even.clone().requires_grad_(True) for side in sides]
    needs_log_z = not p.normalized and (objective.reads_log_z or objective.log_z_share != 0)
    none = [torch.zeros_like(side.ratio) for side in sides]
    log_z, from_p, from_q, doubts = _log_z(of_p, of_q) if needs_log_z else (0.0, none[0], none[1], ())
    shift = torch.tensor(log_z, dtype=torch.float64, device=of_q.ratio.device, requires_grad=True)
    with torch.enable_grad():
        loss = objective.loss(of_p.ratio - shift, weights[0], of_q.ratio - shift, weights[1])
    value, method = float(loss.detach()), f"Monte Carlo, {' and '.join(parts)}{_knob(objective)}"
    n = sum(len(side.ratio) for side, is_read in zip(sides, read, strict=True) if is_read)
    if not math.isfinite(value):
        outside = of_q.ratio == -math.inf
        why = monte_carlo.missed(outside, None) if bool(outside.any()) else "q is zero, in float64, at draws of p"
        finite: Finite = "infinite" if value == math.inf and bool(outside.any()) else "not certified"
        return Estimate(objective.quantity, math.inf, 0.0, None, finite, method, n=n, notes=(why,), reliable=bool(outside.any()))
    *slopes, of_z = torch.autograd.grad(loss, [*weights, shift], allow_unused=True)
    pulls = [
        (nothing if slope is None else slope - side.even @ slope) + (nothing if of_z is None else of_z * pull)
        for side, slope, nothing, pull in zip(sides, slopes, none, (from_p, from_q), strict=True)
    ]
    notes = [*notes, *doubts]
    method += "; log Z by bridge sampling" if needs_log_z else ""
    errors, khats = zip(*(side.error(pull) for side, pull in zip(sides, pulls, strict=True)), strict=True)
    stderr, khat = math.hypot(*errors), max((one for one in khats if one is not None), default=None)
    for side, error, own in zip(sides, errors, khats, strict=True):
        if error > _MAX_STDERR and (own is None or own >= 0.5):
            doubt = f"{side.of} are too few to show how heavy the tail of the ratio of p and q is"
            if own is not None:
                doubt = f"on {side.of} the ratio of p and q has a heavy tail (k̂ = {own:.2f}): the value may be far too small"
            notes = [*notes, doubt]
    return Estimate(
        objective.quantity, value, stderr, method=method, n=n, khat=khat, reliable=not notes, notes=tuple(dict.fromkeys(notes))
    )


def _log_z(of_p: _Side, of_q: _Side) -> tuple[float, Tensor, Tensor, tuple[str, ...]]:
    """Return log Z with the influence of each draw; by importance sampling from q if draws of p are weighted or far."""
    doubts: tuple[str, ...] = ()
    if of_p.weights is None and len(of_p.ratio):
        try:
            found = bridge.bridge(of_p.ratio, of_q.ratio, of_p.chains)
            if found.ess >= bridge.MIN_ESS:
                return found.log_z, found.from_p, found.from_q, ()
            doubts = (f"p and q overlap too little for log Z: {found.ess:.0f} effective draws, and {bridge.MIN_ESS} are needed",)
            return found.log_z, found.from_p, found.from_q, doubts
        except TargetError as error:
            doubts = (f"log Z isn't known: {error}",)
    top = of_q.ratio.max()
    ratio = (of_q.ratio - top).exp()
    log_z = float(ratio.mean().log() + top)
    khat = pareto_smooth(of_q.ratio)[1]
    if khat >= 0.7:
        doubts = (*doubts, f"log Z by importance sampling from q has a heavy tail (k̂ = {khat:.2f})")
    return log_z, torch.zeros_like(of_p.ratio), ratio / ratio.mean() - 1, doubts


def _of_p(
    target: Target, free: Target, solution: Solution, stride: int, seed: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, str, list[str]]:
    """Return unseen draws of p in free coordinates, their weights and chains, the draws in words, and doubts."""
    if target.sampler is not None:
        x = free.draws(draws_in(free.dim), seed + 2).to(torch.float64)
        return x, None, None, f"{len(x):,} fresh draws of p", []
    if solution.held is not None:
        block = solution.held.block
        chains = None if target.chains is None else target.chains[left_out(target, stride)]
        weights = None if target.weights is None else block.w
        return block.x.to(torch.float64), weights, chains, f"{len(block.x):,} rows held out", []
    if free.samples is None:
        return None, None, None, "", []
    note = "no rows were held out: the mean is over the rows that were fitted, and flatters the fit"
    return free.samples.to(torch.float64), target.weights, target.chains, f"{len(free.samples):,} rows", [note]


def _ratio(free: Target, law: Distribution, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    log_p = free.log_prob(x.to(free.dtype)).detach().to(torch.float64)
    return log_p - law.log_prob(x).detach().to(torch.float64)


def _on_the_line(target: Target, objective: Objective, model: Distribution) -> Estimate:
    q = model_target(model, target)
    parts = [(weight, quadrature.divergence(target, q, kind)) for weight, kind in objective.kinds]
    whole = parts[0][1]
    return replace(
        whole,
        quantity=objective.quantity,
        value=sum(weight * one.value for weight, one in parts),
        stderr=math.hypot(*(weight * one.stderr for weight, one in parts)),
        finite="infinite" if any(one.finite == "infinite" for _, one in parts) else max(one.finite for _, one in parts),
        method=f"quadrature{_knob(objective)}",
        exact=all(one.exact for _, one in parts),
        reliable=all(one.reliable for _, one in parts),
        notes=tuple(dict.fromkeys(note for _, one in parts for note in one.notes)),
    )


def _knob(objective: Objective) -> str:
    return "".join(f"; {name} = {getattr(objective, name):g}" for name in parameters(objective))
