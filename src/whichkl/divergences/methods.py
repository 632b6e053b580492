"""Methods: the ways to a divergence, each with what it takes of p and q, in the order of preference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch.distributions import Distribution

from whichkl._checks import TargetError, WhichklError, cannot
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
from whichkl.divergences.sides import Side
from whichkl.targets import Target

_KLS = ("forward_kl", "reverse_kl", "jeffreys")


@dataclass(frozen=True)
class Question:
    """What is asked: both sides, the divergence, and how many draws."""

    p: Side
    q: Side
    name: str
    kind: Kind | None
    n: int
    seed: int

    def swapped(self) -> Question:
        """KL(q‖p) as the forward KL of q from p."""
        return replace(self, p=self.q, q=self.p, name="forward_kl", kind=KINDS["forward_kl"]())


@dataclass(frozen=True)
class Method:
    """A way to the number: what it takes, why it can't (None if it can), and how."""

    name: str
    needs: str
    can: Callable[[Question], bool]
    run: Callable[[Question], Estimate | None]
    automatic: bool = True


def _closed_form(ask: Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if not isinstance(p, Distribution) or not isinstance(q, Distribution):
        return None
    if ask.name not in _KLS:
        return None if ask.kind is None else closed_form.gaussian(p, q, ask.kind)
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


def _enumeration(ask: Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if p is None or q is None or ask.kind is None:
        return None
    listed = discrete.enumerate_atoms(p, q)
    return None if listed is None else discrete.enumeration(listed[0], listed[1], ask.kind, listed[2])


def _quadrature(ask: Question) -> Estimate | None:
    return None if ask.kind is None else quadrature.divergence(target_of(ask.p), target_of(ask.q), ask.kind)


def _monte_carlo(ask: Question) -> Estimate | None:
    p, q = target_of(ask.p), target_of(ask.q)
    if ask.name == "forward_kl":
        return monte_carlo.forward_kl(p, q, ask.n, ask.seed)
    if ask.name == "reverse_kl":
        return monte_carlo.reverse_kl(p, q, ask.n, ask.seed)
    if ask.name == "jeffreys":
        return monte_carlo.jeffreys(p, q, ask.n, ask.seed)
    return None if ask.kind is None else monte_carlo.by_both(p, q, ask.kind, ask.n, ask.seed)


def _self_normalised(ask: Question) -> Estimate:
    return importance_sampling.forward_kl(target_of(ask.p), target_of(ask.q), ask.n, ask.seed)


def _knn(ask: Question) -> Estimate:
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
    p, q = target_of(ask.p), target_of(ask.q)
    if ask.q.density:
        return nearest_neighbors.one_sample_kl(_sample(p, ask), q.log_prob, seed=ask.seed)
    return nearest_neighbors.two_sample_kl(_sample(p, ask), _sample(q, ask, 1), seed=ask.seed)


def _classifier(ask: Question) -> Estimate | None:
    if ask.kind is None:
        return None
    x, y = _rows(_sample(target_of(ask.p), ask)), _rows(_sample(target_of(ask.q), ask, 1))
    return ratio.classifier_divergence(x, y, ask.kind, seed=ask.seed)


def _bound(ask: Question) -> Estimate:
    ask = ask if ask.name == "forward_kl" else ask.swapped()
    x, y = _rows(_sample(target_of(ask.p), ask)), _rows(_sample(target_of(ask.q), ask, 1))
    return ratio.variational_bound(x, y, seed=ask.seed)


def _distance(ask: Question) -> Estimate:
    x, y = _rows(_sample(target_of(ask.p), ask)), _rows(_sample(target_of(ask.q), ask, 1))
    if ask.name == "energy":
        return sample_distances.energy_distance(x, y)
    if ask.name == "mmd":
        return sample_distances.mmd_squared(x, y)
    return sample_distances.sliced_wasserstein(x, y, seed=ask.seed)


def _on_the_line(ask: Question) -> bool:
    return _continuous(ask) and target_of(ask.p).dim == 1 and _both(ask, Access.LOG_PROB) and _both_sampled(ask)


def _monte_carlo_can(ask: Question) -> bool:
    if not _continuous(ask) or not _both(ask, Access.LOG_PROB):
        return False
    if ask.name == "forward_kl":
        return ask.p.access.can_sample and ask.q.density
    if ask.name == "reverse_kl":
        return Access.SAMPLER in ask.q.access and ask.q.density
    return _both_sampled(ask) and (ask.name == "jeffreys" or (ask.p.density and ask.q.density))


def _knn_can(ask: Question) -> bool:
    if not _continuous(ask) or ask.name not in _KLS:
        return False
    return _both_sampled(ask) or (ask.name == "forward_kl" and ask.p.access.can_sample and ask.q.density)


TABLE = (
    Method(
        "closed_form",
        "two torch distributions with an entry for this divergence",
        lambda ask: ask.p.distribution is not None and ask.q.distribution is not None,
        _closed_form,
    ),
    Method("enumeration", "two discrete distributions whose atoms can be listed", lambda ask: ask.p.discrete, _enumeration),
    Method(
        "quadrature",
        "a log density and draws of both, in one variable",
        lambda ask: ask.kind is not None and _on_the_line(ask),
        _quadrature,
    ),
    Method(
        "monte_carlo",
        "log densities of both, with draws of what the expectation is under (of both for other divergences than the KLs)",
        lambda ask: ask.kind is not None and _monte_carlo_can(ask),
        _monte_carlo,
    ),
    Method(
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
    Method("knn", "draws of both, or draws of p and a normalised density of q for forward KL", _knn_can, _knn),
    Method(
        "classifier",
        "draws of both",
        lambda ask: ask.kind is not None and _continuous(ask) and _both_sampled(ask),
        _classifier,
    ),
    Method(
        "bound",
        "draws of both, for a KL",
        lambda ask: ask.name in _KLS[:2] and _continuous(ask) and _both_sampled(ask),
        _bound,
        automatic=False,
    ),
    Method("u_statistic", "draws of both", lambda ask: ask.kind is None and _continuous(ask) and _both_sampled(ask), _distance),
)
METHODS = tuple(one.name for one in TABLE)


def _continuous(ask: Question) -> bool:
    return not ask.p.discrete and not ask.q.discrete


def _both(ask: Question, access: Access) -> bool:
    return access in ask.p.access and access in ask.q.access


def _both_sampled(ask: Question) -> bool:
    return ask.p.access.can_sample and ask.q.access.can_sample


def target_of(side: Side) -> Target:
    """The target of a continuous side."""
    if side.target is None:
        raise TypeError("discrete")
    return side.target


def _sample(target: Target, ask: Question, shift: int = 0) -> Target:
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
