"""Scorecard: what a model is worth to different users, measured on draws that no fit has seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import ResourceError, WhichklError
from whichkl.access import Access
from whichkl.diagnostics import model_target
from whichkl.divergences import Estimate
from whichkl.divergences.dispatch import estimate
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.exact import quadrature
from whichkl.divergences.samples.sample_distances import mmd_squared
from whichkl.families.family import log_likelihood
from whichkl.goodness import Calibration, transform_calibration, two_sample_test
from whichkl.importance import effective_sample_size, pareto_smooth
from whichkl.process.memory import refuse_if_ran_out
from whichkl.study.coverage import coverage
from whichkl.study.held_out import Held, mixed
from whichkl.study.measures import MEASURES
from whichkl.targets import Target
from whichkl.user_code import said_of

UpTo = Literal["log_z"] | None
_MMD_ROWS = 1_000
_NEIGHBOR_ROWS = 1_000
"""Of each side, where reverse KL is estimated from samples alone: it takes longer than anything else here."""
_CENTRAL = (50, 80, 90, 98)
"""Per cent of the central intervals whose coverage is measured."""


@dataclass
class Scorecard:
    """Columns of a row, and behind them what doesn't fit into one number."""

    columns: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    values: dict[str, Estimate] = field(default_factory=dict)


def score(model: Any, held: Held, measures: tuple[str, ...], metrics: dict[str, Callable[..., Any]], draws: int) -> Scorecard:
    """Measure a model by every measure that the access allows; the others stay empty, and the notes say why one failed.

    Args:
        model: q, a `Distribution`, or a function of contexts that returns one.
        held: draws of p that no fit of this seed has seen, where there are any.
        measures: names of `MEASURES`.
        metrics: the user's own, by name: f(model, draws) returns a number, or several by name; draws is (m, d) or None.
        draws: of q.
    """
    card, sides = Scorecard(), _Sides(model, held, draws)
    for name in measures:
        try:
            _MEASURED[name](sides, card)
        except _Missing:
            continue
        except ResourceError:
            raise
        except Exception as error:  # one measure that fails doesn't take the others with it
            refuse_if_ran_out(error, f"measure `{name}`")
            card.notes.append(f"{name} wasn't measured ({_short(error)})")
    if held.groups is not None and held.whole.repeats is not None:
        card.notes.append(held.whole.repeats.note)
    for name, metric in metrics.items():
        card.columns.update(_own(name, metric, model, held, card))
    for name in MEASURES:
        for column in MEASURES[name]:
            card.columns.setdefault(column, None)
    return card


class _Sides:
    """p and q, and what several measures need of them."""

    def __init__(self, model: Any, held: Held, draws: int) -> None:
        self.model, self.held, self.count = model, held, draws
        self.whole: Target = held.whole
        self.is_conditional = bool(self.whole.context_names)
        self.is_exact = self.whole.normalized and self.whole.dim == 1 and not self.is_conditional
        self.enumerable = Access.ENUMERABLE in self.whole.access and self.whole.access.can_evaluate
        self.up_to: UpTo = None if self.whole.normalized or self.enumerable else "log_z"

    @cached_property
    def q(self) -> Target:
        return model_target(self.model, self.whole)

    @cached_property
    def y(self) -> Float[Tensor, "m d"]:
        """Draws of q."""
        return self.q.draws(self.count, mixed(self.held.seed, "draws of q"))

    @cached_property
    def log_q_y(self) -> Float[Tensor, " m"]:
        return self.q.log_prob(self.y).detach().to(torch.float64)

    @cached_property
    def log_q_x(self) -> Float[Tensor, " m"] | None:
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

    def of_p(self) -> tuple[Tensor, Target]:
        """Held-out rows that count as independent, and what they belong to."""
        rows = self.held.independent
        if rows.samples is None:
            raise _Missing
        return rows.samples, rows


class _Missing(Exception):
    """The access doesn't allow a measure; nothing is said of it."""


def _forward(s: _Sides, card: Scorecard) -> None:
    _keep(card, "forward_kl", _forward_value(s))


def _forward_value(s: _Sides) -> Estimate | None:
    if s.enumerable:
        log_p, log_q = s.atoms
        return _summed("forward_kl", log_p, log_q)
    if s.is_exact and s.whole.access.can_evaluate and s.whole.sampler is not None:
        try:
            return quadrature.kl(s.whole, s.q)
        except WhichklError:  # heavy tails: Monte Carlo below says how far it can be trusted
            pass
    if s.held.x is None:
        if not s.whole.access.can_evaluate:
            return None
        return estimate(p=s.whole, q=s.q, divergence="forward_kl", n=s.count, seed=mixed(s.held.seed, "forward"))
    log_q_x = s.log_q_x
    if log_q_x is None:
        return None
    if s.held.log_p is None:
        rows = s.held.p
        return monte_carlo.cross_entropy(-log_q_x, f"{len(log_q_x):,} unseen draws", rows.weights, rows.chains, s.held.groups)
    return _mean("forward_kl", s.held.log_p - log_q_x, s, "samples of p", s.held.p)


def _reverse(s: _Sides, card: Scorecard) -> None:
    if s.is_conditional:
        return
    if s.enumerable:
        log_p, log_q = s.atoms
        _keep(card, "reverse_kl", _summed("reverse_kl", log_q, log_p))
    elif not s.whole.access.can_evaluate:
        x, rows = s.of_p()
        p = Target(samples=x[:_NEIGHBOR_ROWS], names=rows.names, support=rows.bijection.constraints)
        _keep(card, "reverse_kl", estimate(p=p, q=s.q, divergence="reverse_kl", n=_NEIGHBOR_ROWS, seed=s.held.seed))
    else:
        _keep(card, "reverse_kl", _reverse_value(s))


def _reverse_value(s: _Sides) -> Estimate:
    if s.is_exact and s.whole.sampler is not None:
        try:
            return quadrature.kl(s.q, s.whole, "reverse_kl")
        except WhichklError:
            pass
    return _mean("reverse_kl", -s.log_weight, s, "draws of q", None)


def _jeffreys(s: _Sides, card: Scorecard) -> None:
    """E_p[log p̃ − log q] − E_q[log p̃ − log q]: log Z cancels."""
    if s.is_conditional or not s.whole.access.can_evaluate or (s.held.x is None and not s.enumerable):
        return
    if s.enumerable:
        log_p, log_q = s.atoms
        parts = [_summed("forward_kl", log_p, log_q), _summed("reverse_kl", log_q, log_p)]
    else:
        forward = card.values.get("forward_kl") or _forward_value(s)
        reverse = card.values.get("reverse_kl") or _reverse_value(s)
        parts = [one for one in (forward, reverse) if one is not None]
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
    _keep(card, "jeffreys", whole)


def _ess(s: _Sides, card: Scorecard) -> None:
    if s.is_conditional or not s.whole.access.can_evaluate:
        return
    card.columns["ess_q"] = effective_sample_size(s.log_weight) / len(s.log_weight)
    if s.held.log_p is not None and s.log_q_x is not None and s.held.p.weights is None:
        card.columns["ess_p"] = effective_sample_size(s.log_q_x - s.held.log_p) / len(s.log_q_x)


def _khat(s: _Sides, card: Scorecard) -> None:
    if not s.is_conditional and s.whole.access.can_evaluate:
        some = bool((s.log_weight > -math.inf).any())
        card.columns["khat"] = pareto_smooth(s.log_weight)[1] if some else math.inf


def _c2st(s: _Sides, card: Scorecard) -> None:
    x, rows = s.of_p()
    found = two_sample_test(x, rows.weights, rows.context, s.model, mixed(s.held.seed, "classifier"))
    card.details["c2st"] = found.to_dict()
    card.columns.update({"c2st": found.auc, "c2st_stderr": found.stderr, "c2st_p": found.p_value})
    if found.reason is not None:
        card.notes.append(f"c2st wasn't measured ({found.reason})")


def _mmd(s: _Sides, card: Scorecard) -> None:
    """With the bandwidth of p's draws, so that it's the same for all models."""
    if s.is_conditional or s.held.p.weights is not None:
        return
    x, _ = s.of_p()
    x, y = x[:_MMD_ROWS].to("cpu", torch.float64), s.y[:_MMD_ROWS].to("cpu", torch.float64)
    median = float(torch.pdist(x).median())
    found = mmd_squared(x, y, median if median > 0 else None)
    card.details["mmd"] = found.to_dict()
    card.columns.update({"mmd": found.value, "mmd_stderr": found.stderr})


def _coverage(s: _Sides, card: Scorecard) -> None:
    if s.is_conditional or s.whole.bijection.is_discrete or s.held.p.weights is not None:
        return
    x, rows = s.of_p()
    log_q = s.log_q_x if rows is s.held.p else s.q.log_prob(x).detach()
    found = coverage(x, s.y, log_q, s.log_q_y)
    card.details["coverage"] = found.to_dict()
    values = {"coverage": found.coverage, "density": found.density, "missed": found.modes, "missed_mass": found.missed_mass}
    card.columns.update(values)


def _calibration(s: _Sides, card: Scorecard) -> None:
    x, rows = s.of_p()
    seed = mixed(s.held.seed, "calibration")
    found = transform_calibration(x, rows.weights, rows.context, s.model, rows.names, seed)
    card.details["calibration"] = found.to_dict()
    if found.reason is not None:
        card.notes.append(f"calibration wasn't measured ({found.reason})")
        return
    card.columns.update(_central(found, rows.names))


def _central(found: Calibration, names: tuple[str, ...]) -> dict[str, float]:
    """How much of p central intervals of q hold, on average over the columns, and the worst miss of a column."""
    held: dict[int, list[float]] = {share: [] for share in _CENTRAL}
    for column in found.columns:
        if column.name in names:
            for share, inside in held.items():
                low, high = (100 - share) // 2, (100 + share) // 2
                inside.append(column.curve[high - 1] - column.curve[low - 1])
    gap = max(abs(one - share / 100) for share, inside in held.items() for one in inside)
    return {"interval_50": sum(held[50]) / len(held[50]), "interval_90": sum(held[90]) / len(held[90]), "interval_gap": gap}


_MEASURED: dict[str, Callable[[_Sides, Scorecard], None]] = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "jeffreys": _jeffreys,
    "ess": _ess,
    "khat": _khat,
    "c2st": _c2st,
    "mmd": _mmd,
    "coverage": _coverage,
    "calibration": _calibration,
}


def _own(name: str, metric: Callable[..., Any], model: Any, held: Held, card: Scorecard) -> dict[str, Any]:
    """Call a metric of the user's own; what it raises is a note."""
    try:
        found = metric(model, held.x)
        values = {f"{name}.{key}": value for key, value in found.items()} if isinstance(found, dict) else {name: found}
        return {key: float(value) for key, value in values.items()}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own code raises, SystemExit too
        refuse_if_ran_out(error, f"measure `{name}`")
        card.notes.append(f"{name} wasn't measured ({_short(error)})")
        return {name: None}


def _keep(card: Scorecard, name: str, value: Estimate | None) -> None:
    if value is None:
        return
    value = replace(value, quantity=name)
    card.values[name], card.details[name] = value, value.to_dict()
    card.columns.update({name: value.value, f"{name}_stderr": value.stderr, f"{name}_reliable": value.reliable})
    if name != "jeffreys":
        card.columns[f"{name}_up_to"] = value.up_to
    if not value.reliable:
        card.notes.append(f"{name} is unreliable{': ' if value.notes else ''}{'; '.join(value.notes)}".rstrip("."))


def _mean(name: str, ratio: Tensor, s: _Sides, of: str, rows: Target | None) -> Estimate:
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


def _short(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return said_of(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}" if str(error) else type(error).__name__
