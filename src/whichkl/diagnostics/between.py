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
from whichkl.importance import khat_limit, pareto_smooth
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

    The model is in the coordinates of the target, and every `stride`-th row was held out. The error follows from the influence of
    each draw, the derivative of the loss in its weight (infinitesimal jackknife).

    Source: Efron (1982) for the error; Meng & Wong (1996) for log Z.
    """
    if on_the_line(target):
        with contextlib.suppress(WhichklError):  # heavy tails: Monte Carlo below reports how far it can be trusted
            return _on_the_line(target, objective, model)
    free = target.unconstrained()
    law = solution.best.model if solution.held is None else solution.held.model
    y = model_target(law, free).draws(draws_in(free.dim), seed + 1).to(torch.float64)
    of_q = _Side(_ratio(free, law, y), f"{len(y):,} draws of q")
    of_p, notes = _side_of_p(target, free, law, solution, stride, seed)
    return _estimate(objective, free, of_p, of_q, notes)


@dataclass(frozen=True)
class _Side:
    """Log p − log q at draws of one side, the draws in words, and their weights and chains."""

    ratio: Float[Tensor, " n"]
    of: str
    weights: Float[Tensor, " n"] | None = None
    chains: Tensor | None = None
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
    sides = (of_p, of_q)
    read = [side for side, is_read in zip(sides, (objective.reads_p, objective.reads_q), strict=True) if is_read]
    method, n = f"Monte Carlo, {' and '.join(side.of for side in read)}{_knob(objective)}", sum(len(side.ratio) for side in read)
    weights = [side.even.clone().requires_grad_(True) for side in sides]
    needs_log_z = not p.normalized and (objective.reads_log_z or objective.log_z_share != 0)
    none = (torch.zeros_like(of_p.ratio), torch.zeros_like(of_q.ratio))
    log_z, from_p, from_q, doubts = _log_z(of_p, of_q) if needs_log_z else (0.0, *none, [])
    shift = torch.tensor(log_z, dtype=torch.float64, device=of_q.ratio.device, requires_grad=True)
    with torch.enable_grad():
        loss = objective.loss(of_p.ratio - shift, weights[0], of_q.ratio - shift, weights[1])
    value = float(loss.detach())
    if not math.isfinite(value):
        outside = of_q.ratio == -math.inf
        is_outside = bool(outside.any())
        why = monte_carlo.missed(outside, None) if is_outside else "q is zero, in float64, at draws of p"
        finite: Finite = "infinite" if value == math.inf and is_outside else "not certified"
        return Estimate(objective.quantity, math.inf, 0.0, None, finite, method, n=n, notes=(why,), reliable=is_outside)
    *slopes, of_z = torch.autograd.grad(loss, [*weights, shift], allow_unused=True)
    notes, errors, khats = [*notes, *doubts], [], []
    for side, slope, nothing, from_z in zip(sides, slopes, none, (from_p, from_q), strict=True):
        pull = nothing if slope is None else slope - side.even @ slope
        error, khat = side.error(pull + (nothing if of_z is None else of_z * from_z))
        if error > _MAX_STDERR and khat is None:
            notes.append(f"{side.of} are too few to show how heavy the tail of the ratio of p and q is")
        elif error > _MAX_STDERR and khat is not None and khat >= 0.5:
            notes.append(f"on {side.of} the ratio of p and q has a heavy tail (k̂ = {khat:.2f}): the value may be far too small")
        errors.append(error)
        khats += [] if khat is None else [khat]
    return Estimate(
        objective.quantity,
        value,
        math.hypot(*errors),
        method=f"{method}; log Z by bridge sampling" if needs_log_z else method,
        n=n,
        khat=max(khats, default=None),
        reliable=not notes,
        notes=tuple(dict.fromkeys(notes)),
    )


def _log_z(of_p: _Side, of_q: _Side) -> tuple[float, Tensor, Tensor, list[str]]:
    """Return log Z with the influence of each draw; by importance sampling from q if draws of p are weighted or far."""
    doubts = []
    if of_p.weights is None and len(of_p.ratio):
        try:
            found = bridge.bridge(of_p.ratio, of_q.ratio, of_p.chains)
            if found.ess < bridge.MIN_ESS:
                enough = f"{found.ess:.0f} effective draws, and {bridge.MIN_ESS} are needed"
                doubts.append(f"p and q overlap too little for log Z: {enough}")
            return found.log_z, found.from_p, found.from_q, doubts
        except TargetError as error:
            doubts.append(f"log Z isn't known: {error}")
    top = of_q.ratio.max()
    ratio = (of_q.ratio - top).exp()
    khat = pareto_smooth(of_q.ratio)[1]
    if khat > khat_limit(len(ratio)):
        doubts.append(f"log Z by importance sampling from q has a heavy tail (k̂ = {khat:.2f})")
    return float(ratio.mean().log() + top), torch.zeros_like(of_p.ratio), ratio / ratio.mean() - 1, doubts


def _side_of_p(
    target: Target, free: Target, law: Distribution, solution: Solution, stride: int, seed: int
) -> tuple[_Side, list[str]]:
    """Return unseen draws of p, and a doubt where there are none."""
    if target.sampler is not None:
        x = free.draws(draws_in(free.dim), seed + 2).to(torch.float64)
        return _Side(_ratio(free, law, x), f"{len(x):,} fresh draws of p"), []
    weights, chains, notes = target.weights, target.chains, []
    if solution.held is not None:
        x = solution.held.block.x.to(torch.float64)
        of = f"{len(x):,} rows held out"
        chains = None if chains is None else chains[left_out(target, stride)]
        weights = None if weights is None else solution.held.block.w
    elif free.samples is not None:
        x = free.samples.to(torch.float64)
        of = f"{len(x):,} rows"
        notes = ["no rows were held out: the mean is over the rows that were fitted, and flatters the fit"]
    else:
        return _Side(torch.zeros(0, dtype=torch.float64, device=free.device), ""), []
    return _Side(_ratio(free, law, x), of, weights, chains, None if target.repeats is None else row_keys(x)), notes


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
