"""Dispatch: `estimate` chooses the method by what can be done with p and q, and says which it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, WhichklError, cannot
from whichkl.access import Access
from whichkl.divergences import (
    closed_form,
    discrete,
    importance_sampling,
    monte_carlo,
    nearest_neighbors,
    quadrature,
    ratio,
    sample_distances,
)
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.kinds import KINDS, Kind
from whichkl.divergences.sides import Side, as_rows
from whichkl.targets import Target

Form = Literal["samples", "probabilities", "logits"]

_KLS = ("forward_kl", "reverse_kl", "jeffreys")
_DISTANCES = ("energy", "mmd", "sliced_wasserstein")
_SAMPLE_METHODS = ("knn", "classifier")
"""They calibrate themselves: where one calls itself unreliable, the next is asked."""
_UNITLESS = ("total_variation", "hellinger", "chi_squared", *_DISTANCES)


@dataclass(frozen=True)
class _Question:
    """What is asked: both sides, the divergence, and how many draws."""

    p: Side
    q: Side
    name: str
    kind: Kind | None
    n: int
    seed: int

    def swapped(self) -> _Question:
        """KL(q‖p) as the forward KL of q from p."""
        return replace(self, p=self.q, q=self.p, name="forward_kl", kind=KINDS["forward_kl"]())


@dataclass(frozen=True)
class _Method:
    """A way to the number: what it takes, why it can't (None if it can), and how."""

    name: str
    needs: str
    can: Callable[[_Question], bool]
    run: Callable[[_Question], Estimate | None]
    automatic: bool = True


def estimate(
    *,
    p: Any,
    q: Any,
    divergence: str | Kind = "forward_kl",
    method: str | None = None,
    form: Form = "samples",
    weight: float | None = None,
    order: float | None = None,
    n: int = 20_000,
    seed: int = 0,
) -> Estimate:
    """A divergence between p and q, and how far to trust it.

    The method follows from what can be done with each: closed form, enumeration of atoms, quadrature on the line, Monte Carlo,
    self-normalised importance sampling, nearest neighbours, a cross-fitted classifier. It returns a value, never a loss: to
    minimise a divergence use an objective (`ForwardKL`, `ReverseKL`) with `fit`, since the gradient of an estimator of a
    value needn't be an estimator of the gradient.

    Args:
        p: a torch distribution, a `Target`, a `Fit`, or samples: (n, d) array, tensor, DataFrame, path; (n,) is read as (n, 1).
        q: the same; forward KL is KL(p‖q), the expectation under p.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jeffreys"``, ``"jensen_shannon"``, ``"skew_forward_kl"``,
            ``"skew_reverse_kl"``, ``"renyi"``, ``"total_variation"``, ``"hellinger"`` (squared), ``"chi_squared"``,
            ``"energy"``, ``"mmd"`` (squared) or ``"sliced_wasserstein"``; or a `Kind`.
        method: one of `METHODS`, in place of the automatic choice.
        form: what arrays hold: ``"samples"``, or ``"probabilities"`` or ``"logits"`` over atoms on the last axis. Several rows
            give the mean of their divergences.
        weight: of p in Jensen–Shannon, of the skew in skew KLs.
        order: of Rényi's divergence.
        n: number of fresh draws a side, where there are any.
        seed: fixes every random choice.

    Returns:
        An `Estimate`, in nats; total variation, Hellinger, χ² and the distances between samples have no unit.

    Raises:
        InputError: an argument is bad, or p and q don't fit together.
        TargetError: the access doesn't allow the method, or any method.

    Source: the methods' own; see `docs/estimating.md`.

    >>> from torch.distributions import Normal
    >>> print(estimate(p=Normal(0.0, 1.0), q=Normal(1.0, 2.0)))
    forward_kl = 0.443147 nats (closed form)
    >>> print(estimate(p=[0.36, 0.48, 0.16], q=[1 / 3, 1 / 3, 1 / 3], form="probabilities"))
    forward_kl = 0.085300 nats (enumeration)
    """
    name, kind = _divergence(divergence, weight, order)
    if isinstance(n, bool) or not isinstance(n, int) or n < 100:
        raise InputError(cannot(f"use `n={n}`", "error bars need at least 100 draws", "Use, say, 20,000"))
    if method is not None and method not in METHODS:
        raise InputError(cannot(f"use `method={method!r}`", "there is no such method", f"Choose among {', '.join(METHODS)}"))
    if form not in ("samples", "probabilities", "logits"):
        raise InputError(cannot(f"use `form={form!r}`", "it is none of them", "Say samples, probabilities or logits"))
    if form != "samples":
        return _finished(_of_rows(p, q, name, kind, form, method), name)
    question = _Question(Side.of(p, "p"), Side.of(q, "q"), name, kind, n, seed)
    _check_pair(question)
    possible = [one for one in _TABLE if one.can(question)]
    if method is not None:
        chosen = next((one for one in possible if one.name == method), None)
        result = None if chosen is None else chosen.run(question)
        if result is None:
            raise TargetError(_refusal(question, method, [one.name for one in possible if one.name != method]))
        return _finished(result, name)
    doubtful, doubts = None, []
    for one in possible:
        if not one.automatic:
            continue
        try:
            result = one.run(question)
        except TargetError as error:
            if one.name != "quadrature" or "normalized=True" in str(error):
                raise
            doubts.append(f"quadrature was refused: {error}")
            continue
        if result is None:
            continue
        if result.reliable or one.name not in _SAMPLE_METHODS:
            return _finished(replace(result, notes=(*result.notes, *doubts)), name)
        doubts.append(f"{one.name} gives {result.number} and says of itself that it isn't reliable here")
        doubtful = doubtful or result
    if doubtful is not None:
        return _finished(replace(doubtful, notes=(*doubtful.notes, *doubts[1:])), name)
    raise TargetError(_refusal(question, None, [one.name for one in possible]))


def _closed_form(ask: _Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if not isinstance(p, Distribution) or not isinstance(q, Distribution):
        return None
    result = closed_form.closed_form(p, q, ask.name)
    if result is not None and result.value == math.inf:  # the methods that name the region or the atoms say more
        for one in (_enumeration, _quadrature):
            try:
                explained = one(ask) if (ask.p.discrete if one is _enumeration else _on_the_line(ask)) else None
            except WhichklError:
                continue
            if explained is not None and explained.value == math.inf:
                return explained
    return result


def _enumeration(ask: _Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if p is None or q is None or ask.kind is None:
        return None
    listed = discrete.enumerate_atoms(p, q)
    return None if listed is None else discrete.enumeration(listed[0], listed[1], ask.kind, listed[2])


def _quadrature(ask: _Question) -> Estimate | None:
    return None if ask.kind is None else quadrature.divergence(_target(ask.p), _target(ask.q), ask.kind)


def _monte_carlo(ask: _Question) -> Estimate | None:
    p, q = _target(ask.p), _target(ask.q)
    if ask.name == "forward_kl":
        return monte_carlo.forward_kl(p, q, ask.n, ask.seed)
    if ask.name == "reverse_kl":
        return monte_carlo.reverse_kl(p, q, ask.n, ask.seed)
    if ask.name == "jeffreys":
        return monte_carlo.jeffreys(p, q, ask.n, ask.seed)
    return None if ask.kind is None else monte_carlo.by_both(p, q, ask.kind, ask.n, ask.seed)


def _self_normalised(ask: _Question) -> Estimate:
    return importance_sampling.forward_kl(_target(ask.p), _target(ask.q), ask.n, ask.seed)


def _knn(ask: _Question) -> Estimate:
    if ask.name == "jeffreys":
        there = _knn(replace(ask, name="forward_kl"))
        back = _knn(replace(ask, name="reverse_kl"))
        return Estimate(
            "jeffreys",
            there.value + back.value,
            there.stderr + back.stderr,  # the two share their draws: errors are added, not squared
            finite="infinite" if math.inf in (there.value, back.value) else "not certified",
            method=there.method,
            n=there.n,
            reliable=there.reliable and back.reliable,
            notes=tuple(dict.fromkeys((*there.notes, *back.notes))),
        )
    if ask.name == "reverse_kl":
        return replace(_knn(ask.swapped()), quantity="reverse_kl")
    p, q = _target(ask.p), _target(ask.q)
    if ask.q.density:
        return nearest_neighbors.one_sample_kl(_sample(p, ask), q.log_prob, seed=ask.seed)
    return nearest_neighbors.two_sample_kl(_sample(p, ask), _sample(q, ask, 1), seed=ask.seed)


def _classifier(ask: _Question) -> Estimate | None:
    if ask.kind is None:
        return None
    x, y = _rows(_sample(_target(ask.p), ask)), _rows(_sample(_target(ask.q), ask, 1))
    return ratio.classifier_divergence(x, y, ask.kind, seed=ask.seed)


def _bound(ask: _Question) -> Estimate:
    ask = ask if ask.name == "forward_kl" else ask.swapped()
    x, y = _rows(_sample(_target(ask.p), ask)), _rows(_sample(_target(ask.q), ask, 1))
    return ratio.variational_bound(x, y, seed=ask.seed)


def _distance(ask: _Question) -> Estimate:
    x, y = _rows(_sample(_target(ask.p), ask)), _rows(_sample(_target(ask.q), ask, 1))
    if ask.name == "energy":
        return sample_distances.energy_distance(x, y)
    if ask.name == "mmd":
        return sample_distances.mmd_squared(x, y)
    return sample_distances.sliced_wasserstein(x, y, seed=ask.seed)


def _on_the_line(ask: _Question) -> bool:
    return _continuous(ask) and _target(ask.p).dim == 1 and _both(ask, Access.LOG_PROB) and _both_sampled(ask)


def _monte_carlo_can(ask: _Question) -> bool:
    if not _continuous(ask) or not _both(ask, Access.LOG_PROB):
        return False
    if ask.name == "forward_kl":
        return ask.p.access.can_sample and ask.q.density
    if ask.name == "reverse_kl":
        return Access.SAMPLER in ask.q.access and ask.q.density
    return _both_sampled(ask) and (ask.name == "jeffreys" or (ask.p.density and ask.q.density))


def _knn_can(ask: _Question) -> bool:
    if not _continuous(ask) or ask.name not in _KLS:
        return False
    return _both_sampled(ask) or (ask.name == "forward_kl" and ask.p.access.can_sample and ask.q.density)


_TABLE = (
    _Method(
        "closed_form",
        "two torch distributions with an entry for this divergence",
        lambda ask: ask.p.distribution is not None and ask.q.distribution is not None and ask.name in _KLS,
        _closed_form,
    ),
    _Method("enumeration", "two discrete distributions whose atoms can be listed", lambda ask: ask.p.discrete, _enumeration),
    _Method(
        "quadrature",
        "a log density and draws of both, in one variable",
        lambda ask: ask.kind is not None and _on_the_line(ask),
        _quadrature,
    ),
    _Method(
        "monte_carlo",
        "log densities of both, with draws of what the expectation is under (of both for other divergences than the KLs)",
        lambda ask: ask.kind is not None and _monte_carlo_can(ask),
        _monte_carlo,
    ),
    _Method(
        "self_normalised",
        "a log density of p, and a normalised one with a sampler of q",
        lambda ask: (
            ask.name == "forward_kl"
            and _continuous(ask)
            and Access.LOG_PROB in ask.p.access
            and ask.q.density
            and Access.SAMPLER in ask.q.access
        ),
        _self_normalised,
    ),
    _Method("knn", "draws of both, or draws of p and a normalised density of q for forward KL", _knn_can, _knn),
    _Method(
        "classifier",
        "draws of both",
        lambda ask: ask.kind is not None and _continuous(ask) and _both_sampled(ask),
        _classifier,
    ),
    _Method(
        "bound",
        "draws of both, for a KL",
        lambda ask: ask.name in _KLS[:2] and _continuous(ask) and _both_sampled(ask),
        _bound,
        automatic=False,
    ),
    _Method("u_statistic", "draws of both", lambda ask: ask.kind is None and _continuous(ask) and _both_sampled(ask), _distance),
)
METHODS = tuple(one.name for one in _TABLE)


def _divergence(divergence: str | Kind, weight: float | None, order: float | None) -> tuple[str, Kind | None]:
    knobs = {name: value for name, value in (("weight", weight), ("order", order)) if value is not None}
    if isinstance(divergence, Kind):
        if knobs:
            because = "the divergence was given with its own"
            raise InputError(cannot(f"use `{', '.join(knobs)}`", because, "Set it there, or name the divergence by a string"))
        return divergence.name, divergence
    if divergence not in KINDS and divergence not in _DISTANCES:
        known = ", ".join((*KINDS, *_DISTANCES))
        raise InputError(cannot(f"estimate `{divergence}`", "there is no such divergence", f"Choose among {known}"))
    known_knobs = set(KINDS[divergence].__dataclass_fields__) if divergence in KINDS else set()
    strange = ", ".join(sorted(set(knobs) - known_knobs))
    if strange:
        instead = f"It takes {', '.join(sorted(known_knobs))}" if known_knobs else "Leave it out"
        raise InputError(cannot(f"use `{strange}=`", f"`{divergence}` has no such parameter", instead))
    return divergence, KINDS[divergence](**knobs) if divergence in KINDS else None


def _of_rows(p: Any, q: Any, name: str, kind: Kind | None, form: Form, method: str | None) -> Estimate:
    if kind is None or method not in (None, "enumeration"):
        because = f"atoms given by their {form} have no coordinates and are summed over, nothing else"
        raise TargetError(cannot(f"estimate `{name}` by `{method}`" if method else f"estimate `{name}`", because, "Use a KL"))
    a, b = as_rows(p, "p"), as_rows(q, "q")
    values = discrete.rows(a, b, kind, "logits" if form == "logits" else "probabilities")
    notes: tuple[str, ...] = ()
    if values.ndim and values.numel() > 1:
        notes = (f"mean over {values.numel():,} rows, from {float(values.min()):.6g} to {float(values.max()):.6g}",)
    value = float(values.mean())
    if not math.isfinite(value):
        notes = (*notes, _missed_atoms(a, b, form))
        return Estimate(name, value, finite="infinite", method="enumeration", exact=True, notes=notes)
    return Estimate(name, value, finite="certified", method="enumeration", exact=True, notes=notes)


def _missed_atoms(a: Any, b: Any, form: Form) -> str:
    zero = float("-inf") if form == "logits" else 0.0
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    for i, (one, other) in enumerate(zip(rows_a, rows_b, strict=True)):
        for here, there, who, whose in ((one, other, "p", "q"), (other, one, "q", "p")):
            missed = ((here > zero) & (there == zero)).nonzero().flatten()
            if len(missed):
                mass = float((here.softmax(-1) if form == "logits" else here)[missed].sum())
                shown = ", ".join(str(int(atom)) for atom in missed[:5]) + (", …" if len(missed) > 5 else "")
                return f"row {i}: {mass:.4g} of the mass of {who} lies on atoms without mass in {whose}: {shown}"
    return "it is infinite beyond what the atoms of zero mass explain"


def _check_pair(ask: _Question) -> None:
    if ask.p.discrete != ask.q.discrete:
        one = "p" if ask.p.discrete else "q"
        because = f"{one} lives on atoms, and the other doesn't say that it does"
        raise InputError(cannot("compare p and q", because, "Give both as discrete distributions, or both as continuous ones"))
    if ask.p.discrete:
        return
    p, q = _target(ask.p), _target(ask.q)
    if p.dim != q.dim:
        because = f"p has dimension {p.dim} and q has {q.dim}"
        raise InputError(cannot("compare p and q", because, "Give both the same columns, in the same order"))
    for fitted, other in ((ask.p, q), (ask.q, p)):
        if fitted.fitted_on is not None and other.samples is not None and _shares_rows(fitted.fitted_on, other.samples):
            because = f"{fitted.name} was fitted on these very rows, and looks better on them than it is"
            instead = "Give rows held out of the fit, or read the fit's `value`, which is cross-fitted"
            raise InputError(cannot("estimate a divergence from these samples", because, instead))
    if p.samples is not None and q.samples is not None and p.names != q.names and sorted(p.names) == sorted(q.names):
        because = f"the columns of p are {', '.join(p.names)} and those of q {', '.join(q.names)}"
        raise InputError(cannot("compare p and q", because, "Put them in one order"))


def _shares_rows(fitted_on: Tensor, x: Tensor) -> bool:
    """Whether more than half of the rows of x were fitted on."""
    known = {tuple(row) for row in fitted_on.to(torch.float64).tolist()}
    rows = x.to(torch.float64).tolist()
    return sum(tuple(row) in known for row in rows) > len(rows) / 2


def _refusal(ask: _Question, method: str | None, possible: list[str]) -> str:
    have = f"p has {ask.p.access.label}, q has {ask.q.access.label}"
    instead = f"Use one of: {', '.join(possible)}" if possible else "Pass samples of both, or log densities with draws"
    if method is None:
        return cannot(f"estimate `{ask.name}`", f"no method takes this access ({have})", instead)
    needs = next(one.needs for one in _TABLE if one.name == method)
    return cannot(f"use `{method}` for `{ask.name}` here", f"it requires {needs}, and {have}", instead)


def _finished(result: Estimate, name: str) -> Estimate:
    return replace(result, quantity=name, unit="none" if name in _UNITLESS else result.unit)


def _continuous(ask: _Question) -> bool:
    return not ask.p.discrete and not ask.q.discrete


def _both(ask: _Question, access: Access) -> bool:
    return access in ask.p.access and access in ask.q.access


def _both_sampled(ask: _Question) -> bool:
    return ask.p.access.can_sample and ask.q.access.can_sample


def _target(side: Side) -> Target:
    if side.target is None:
        raise TypeError("discrete")
    return side.target


def _sample(target: Target, ask: _Question, shift: int = 0) -> Target:
    """The fixed samples where there are any, else as many fresh draws as asked for, but no more than 10,000."""
    if target.samples is not None:
        return target
    x = target.draws(min(ask.n, 10_000), ask.seed + shift)
    return Target(samples=x)


def _rows(target: Target) -> Any:
    if target.weights is not None:
        because = "the samples are weighted, and this method takes equal weights"
        raise TargetError(cannot("compare these samples", because, "Resample them by their weights first"))
    return target.samples
