"""Measurements: how each measure of a study is taken, on draws of p that no fit has seen and on draws of q."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import WhichklError
from whichkl.access import Access
from whichkl.diagnostics import model_target
from whichkl.divergences import Estimate
from whichkl.divergences.dispatch import estimate
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.divergences.samples.sample_distances import mmd_squared
from whichkl.families.family import log_likelihood
from whichkl.goodness import transform_calibration, two_sample_test
from whichkl.importance import effective_sample_size, pareto_smooth
from whichkl.study.coverage import coverage
from whichkl.study.held_out import HeldOutDraws, mixed
from whichkl.targets import Target

_MAX_MMD_ROWS = 1_000
_MAX_NEIGHBOR_ROWS = 1_000
"""Rows of each side where reverse KL is estimated from samples alone, which takes longer than anything else here."""
_CENTRAL = (50, 80, 90, 98)
"""Per cent of the central intervals whose coverage is measured."""


@dataclass(frozen=True)
class Measurement:
    """The result of one measure: columns of a row, details, a note, and the estimate, if it is one."""

    columns: dict[str, Any]
    details: dict[str, Any] | None = None
    note: str = ""
    estimate: Estimate | None = None


class Sides:
    """p and q, and quantities that several measures share; each is computed once."""

    def __init__(self, model: Any, held: HeldOutDraws, draws: int) -> None:
        """Take the model, the held-out draws of p, and how many draws of q to use."""
        self.model, self.held, self.count = model, held, draws
        self.whole: Target = held.whole
        self.can_evaluate = self.whole.access.can_evaluate
        self.is_conditional = bool(self.whole.context_names)
        is_line = self.whole.dim == 1 and not self.is_conditional
        self.is_exact = self.whole.normalized and is_line and self.whole.sampler is not None
        self.is_enumerable = Access.ENUMERABLE in self.whole.access and self.can_evaluate
        self.up_to: Literal["log_z"] | None = None if self.whole.normalized or self.is_enumerable else "log_z"

    @cached_property
    def q(self) -> Target:
        """The model as a target."""
        return model_target(self.model, self.whole)

    @cached_property
    def y(self) -> Float[Tensor, "m d"]:
        """Draws of q."""
        return self.q.draws(self.count, mixed(self.held.seed, "draws of q"))

    @cached_property
    def log_q_y(self) -> Float[Tensor, " m"]:
        """Log q at draws of q."""
        return self.q.log_prob(self.y).detach().to(torch.float64)

    @cached_property
    def log_q_x(self) -> Float[Tensor, " m"] | None:
        """Log q at the held-out draws of p."""
        x = self.held.x
        return None if x is None else log_likelihood(self.model, x, self.held.p.context).detach().to(torch.float64)

    @cached_property
    def log_weight(self) -> Float[Tensor, " m"]:
        """Log p − log q at draws of q."""
        return self.whole.log_prob(self.y).detach().to(torch.float64) - self.log_q_y

    @cached_property
    def atoms(self) -> tuple[Tensor, Tensor]:
        """Log p, normalised, and log q of every state."""
        x, log_p = self.whole.atoms
        return log_p - torch.logsumexp(log_p, 0), self.q.log_prob(x).detach().to(torch.float64)

    @cached_property
    def forward(self) -> Estimate | None:
        """KL(p‖q), by enumeration, quadrature, held-out draws of p, or importance sampling."""
        if self.is_enumerable:
            return _summed("forward_kl", *self.atoms)
        if self.is_exact and self.can_evaluate:
            try:
                return quadrature.kl(self.whole, self.q)
            except WhichklError:  # heavy tails: Monte Carlo below tells how far it can be trusted
                pass
        if self.held.x is None and self.can_evaluate:  # no draws of p, so that draws of q are reweighted
            seed = mixed(self.held.seed, "forward")
            return estimate(p=self.whole, q=self.q, divergence="forward_kl", n=self.count, seed=seed)
        if self.log_q_x is None:
            return None
        if self.held.log_p is None:
            rows, method = self.held.p, f"{len(self.log_q_x):,} unseen draws"
            return monte_carlo.cross_entropy(-self.log_q_x, method, rows.weights, rows.chains, self.held.groups)
        return _mean("forward_kl", self.held.log_p - self.log_q_x, self, "samples of p", self.held.p)

    @cached_property
    def reverse(self) -> Estimate | None:
        """KL(q‖p), by enumeration, quadrature, draws of q, or nearest neighbours of samples."""
        if self.is_enumerable:
            return _summed("reverse_kl", *reversed(self.atoms))
        if not self.can_evaluate:
            rows = self.held.independent
            if rows.samples is None:
                return None
            p = Target(samples=rows.samples[:_MAX_NEIGHBOR_ROWS], names=rows.names, support=rows.bijection.constraints)
            return estimate(p=p, q=self.q, divergence="reverse_kl", n=_MAX_NEIGHBOR_ROWS, seed=self.held.seed)
        if self.is_exact:
            try:
                return quadrature.kl(self.q, self.whole, "reverse_kl")
            except WhichklError:
                pass
        return _mean("reverse_kl", -self.log_weight, self, "draws of q", None)


def forward_kl(s: Sides) -> Measurement | None:
    """KL(p‖q)."""
    return _of_estimate("forward_kl", s.forward, s)


def reverse_kl(s: Sides) -> Measurement | None:
    """KL(q‖p)."""
    return None if s.is_conditional else _of_estimate("reverse_kl", s.reverse, s)


def jeffreys(s: Sides) -> Measurement | None:
    """E_p[log p̃ − log q] − E_q[log p̃ − log q]: log Z cancels."""
    if s.is_conditional or not s.can_evaluate or (s.held.x is None and not s.is_enumerable):
        return None
    parts = [one for one in (s.forward, s.reverse) if one is not None]
    value = sum(one.value for one in parts)
    whole = Estimate(
        "jeffreys",
        value,
        math.hypot(*(one.stderr for one in parts)),
        finite="infinite" if value == math.inf else "not certified",
        method=" and ".join(dict.fromkeys(one.method for one in parts)) + "; normalisers cancel",
        exact=all(one.exact for one in parts),
        reliable=all(one.reliable for one in parts),
        notes=tuple(note for one in parts for note in one.notes),
    )
    return _of_estimate("jeffreys", whole, s)


def ess(s: Sides) -> Measurement | None:
    """Effective shares of draws that are reweighted from one side to the other."""
    if s.is_conditional or not s.can_evaluate:
        return None
    columns = {"ess_q": effective_sample_size(s.log_weight) / len(s.log_weight)}
    if s.held.log_p is not None and s.log_q_x is not None and s.held.p.weights is None:
        columns["ess_p"] = effective_sample_size(s.log_q_x - s.held.log_p) / len(s.log_q_x)
    return Measurement(columns)


def khat(s: Sides) -> Measurement | None:
    """PSIS k̂ of the weights p/q at draws of q."""
    if s.is_conditional or not s.can_evaluate:
        return None
    has_weights = bool((s.log_weight > -math.inf).any())
    return Measurement({"khat": pareto_smooth(s.log_weight)[1] if has_weights else math.inf})


def c2st(s: Sides) -> Measurement | None:
    """AUC of a classifier that separates held-out rows from draws of q."""
    rows = s.held.independent
    if rows.samples is None:
        return None
    found = two_sample_test(rows.samples, rows.weights, rows.context, s.model, mixed(s.held.seed, "classifier"))
    columns = {"c2st": found.auc, "c2st_stderr": found.stderr, "c2st_p": found.p_value}
    return Measurement(columns, found.to_dict(), _not_measured("c2st", found.reason))


def mmd(s: Sides) -> Measurement | None:
    """MMD² with the bandwidth of p's draws, which is the same for all models."""
    rows = s.held.independent
    if s.is_conditional or s.held.p.weights is not None or rows.samples is None:
        return None
    x, y = (one[:_MAX_MMD_ROWS].to("cpu", torch.float64) for one in (rows.samples, s.y))
    median = float(torch.pdist(x).median())  # of p's draws alone: a bandwidth that depends on q isn't the same for all models
    found = mmd_squared(x, y, median if median > 0 else None)
    return Measurement({"mmd": found.value, "mmd_stderr": found.stderr}, found.to_dict())


def reach(s: Sides) -> Measurement | None:
    """Coverage of p by draws of q, and the modes and the mass that these miss."""
    rows = s.held.independent
    if s.is_conditional or s.whole.bijection.is_discrete or s.held.p.weights is not None or rows.samples is None:
        return None
    log_q = s.log_q_x if rows is s.held.p else s.q.log_prob(rows.samples).detach()
    found = coverage(rows.samples, s.y, log_q, s.log_q_y)
    columns = {"coverage": found.coverage, "density": found.density, "missed": found.modes, "missed_mass": found.missed_mass}
    return Measurement(columns, found.to_dict())


def calibration(s: Sides) -> Measurement | None:
    """Share of p that central intervals of q hold, on average over the columns, and the worst miss of a column."""
    rows = s.held.independent
    if rows.samples is None:
        return None
    seed = mixed(s.held.seed, "calibration")
    found = transform_calibration(rows.samples, rows.weights, rows.context, s.model, rows.names, seed)
    if found.reason is not None:
        return Measurement({}, found.to_dict(), _not_measured("calibration", found.reason))
    held: dict[int, list[float]] = {share: [] for share in _CENTRAL}
    for column in found.columns:
        if column.name in rows.names:
            for share, inside in held.items():
                low, high = (100 - share) // 2, (100 + share) // 2
                inside.append(column.curve[high - 1] - column.curve[low - 1])
    columns = {f"interval_{share}": sum(held[share]) / len(held[share]) for share in (50, 90)}
    columns["interval_gap"] = max(abs(one - share / 100) for share, inside in held.items() for one in inside)
    return Measurement(columns, found.to_dict())


def _of_estimate(name: str, value: Estimate | None, s: Sides) -> Measurement | None:
    if value is None:
        return None
    value = replace(value, quantity=name).resting_on(s.whole.origin)
    columns: dict[str, Any] = {name: value.value, f"{name}_stderr": value.stderr, f"{name}_reliable": value.reliable}
    if name != "jeffreys":
        columns[f"{name}_up_to"] = value.up_to
    why = f"{': ' if value.notes else ''}{'; '.join(value.notes)}"
    return Measurement(columns, value.to_dict(), "" if value.reliable else f"{name} is unreliable{why}".rstrip("."), value)


def _not_measured(name: str, reason: str | None) -> str:
    return "" if reason is None else f"{name} wasn't measured ({reason})"


def _mean(name: str, ratio: Tensor, s: Sides, of: str, rows: Target | None) -> Estimate:
    weights, chains, groups = (None, None, None) if rows is None else (rows.weights, rows.chains, s.held.groups)
    if weights is not None or groups is not None:
        what = "weighted " if weights is not None else ""
        found = monte_carlo.cross_entropy(ratio, f"Monte Carlo, {len(ratio):,} {what}{of}", weights, groups=groups)
        return replace(found, quantity=name, up_to=s.up_to)
    return monte_carlo.mean_log_ratio(name, ratio, s.up_to, f"{len(ratio):,} unseen {of}", chains=chains)


def _summed(name: str, log_a: Tensor, log_b: Tensor) -> Estimate:
    """Σ a (log a − log b) over all states."""
    value = float(torch.where(log_a > -math.inf, log_a.exp() * (log_a - log_b), 0.0).sum())
    finite: Literal["certified", "infinite"] = "certified" if math.isfinite(value) else "infinite"
    return Estimate(name, max(0.0, value), finite=finite, method="enumeration", exact=True, n=len(log_a))
