"""Methods: how a divergence can be estimated, with the requirements of each on p and q, in the order of preference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.distributions import Distribution

from whichkl._checks import WhichklError
from whichkl.access import Access
from whichkl.divergences.draws import bridge, importance_sampling, monte_carlo
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact import closed_form, discrete, line_distances, products, quadrature
from whichkl.divergences.kinds import WeightedKLs
from whichkl.divergences.question import Question, target_of
from whichkl.divergences.samples import bound, nearest_neighbors, ratio, sample_distances

_KLS = ("forward_kl", "reverse_kl")
_ERROR_OF_THINNED_ROWS = math.sqrt((1 + math.exp(-2)) / (1 - math.exp(-2)))


@dataclass(frozen=True)
class Method:
    """A method: its requirements, whether it applies, how it runs, and whether it assumes independent draws."""

    name: str
    needs: str
    can: Callable[[Question], bool]
    run: Callable[[Question], Estimate | None]
    automatic: bool = True
    independent: bool = False

    def answer(self, ask: Question) -> Estimate | None:
        """Run the method; chains are thinned first, with a note, where it assumes independent draws.

        Kept neighbours, τ apart, still correlate by about e⁻²: the error is widened by √((1 + e⁻²)/(1 − e⁻²)) = 1.15.
        """
        if not self.independent:
            return self.run(ask)
        (p, of_p), (q, of_q) = ask.p.thinned(), ask.q.thinned()
        result = self.run(replace(ask, p=p, q=q))
        notes = [note for note in (of_p, of_q) if note is not None]
        if result is None or not notes:
            return result
        return replace(result, stderr=_ERROR_OF_THINNED_ROWS * result.stderr, notes=(*result.notes, *notes))


def _closed_form(ask: Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if ask.kind is None or not isinstance(p, Distribution) or not isinstance(q, Distribution):
        return None
    if not isinstance(ask.kind, WeightedKLs):
        return closed_form.gaussian(p, q, ask.kind)
    result = closed_form.closed_form(p, q, ask.kind)
    if result is not None and result.value == math.inf:  # other methods name the region or the atoms
        for one in (_enumeration, _quadrature):
            try:
                explained = one(ask) if (ask.p.discrete if one is _enumeration else _few_variables(ask)) else None
            except WhichklError:
                continue
            if explained is not None and explained.finite != "not certified":
                return explained  # the closed form may have overflowed
        doubt = "torch's closed form gives ∞, and no other method finds where: it may have overflowed"
        return replace(result, finite="not certified", reliable=False, exact=False, notes=(doubt,))
    return result


def _enumeration(ask: Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if p is None or q is None or ask.kind is None:
        return None
    listed = discrete.enumerate_atoms(p, q, ask.kind)
    return None if listed is None else discrete.enumeration(listed[0], listed[1], ask.kind, listed[2])


def _quadrature(ask: Question) -> Estimate | None:
    p, q = target_of(ask.p), target_of(ask.q)
    if ask.kind is None:
        return line_distances.energy_distance(p, q) if ask.name == "energy" else line_distances.wasserstein(p, q)
    joined = products.divergence(ask.p.distribution, ask.q.distribution, ask.kind)
    return joined or quadrature.divergence(p, q, ask.kind)


def _monte_carlo(ask: Question) -> Estimate | None:
    p, q = target_of(ask.p), target_of(ask.q)
    if ask.name in _KLS:
        run = monte_carlo.forward_kl if ask.name == "forward_kl" else monte_carlo.reverse_kl
        return run(p, q, ask.n, ask.seed)
    if isinstance(ask.kind, WeightedKLs):
        return monte_carlo.weighted_kls(p, q, ask.kind, ask.n, ask.seed)
    return None if ask.kind is None else monte_carlo.by_both(p, q, ask.kind, ask.n, ask.seed)


def _bridge(ask: Question) -> Estimate:
    run = bridge.forward_kl if ask.name == "forward_kl" else bridge.reverse_kl
    return run(target_of(ask.p), target_of(ask.q), ask.n, ask.seed)


def _self_normalised(ask: Question) -> Estimate | None:
    if not isinstance(ask.kind, WeightedKLs):
        return None
    return importance_sampling.self_normalised(target_of(ask.p), target_of(ask.q), ask.kind, ask.n, ask.seed)


def _importance(ask: Question) -> Estimate:
    p, q = target_of(ask.p), target_of(ask.q)
    if ask.name == "reverse_kl":
        return importance_sampling.from_other_side(q, p, ask.n, ask.seed)
    return importance_sampling.from_other_side(p, q, ask.n, ask.seed, ("p", "q"))


def _nearest_neighbors(ask: Question) -> Estimate | None:
    if ask.name == "reverse_kl":
        return _nearest_neighbors(ask.swapped())
    if ask.name == "forward_kl":
        if ask.q.density:
            return nearest_neighbors.one_sample_kl(ask.drawn(ask.p), target_of(ask.q).log_prob, seed=ask.seed)
        return nearest_neighbors.two_sample_kl(ask.drawn(ask.p), ask.drawn(ask.q, 1), seed=ask.seed)
    there, back = (_nearest_neighbors(replace(ask, name=name)) for name in _KLS)
    if there is None or back is None or not isinstance(ask.kind, WeightedKLs):
        return None
    a, b = ask.kind.kl_weights
    return replace(
        there,
        value=a * there.value + b * back.value,
        stderr=a * there.stderr + b * back.stderr,  # the two share their draws: errors are added, not squared
        finite="infinite" if math.inf in (there.value, back.value) else "not certified",
        khat=None,
        reliable=there.reliable and back.reliable,
        notes=tuple(dict.fromkeys((*there.notes, *back.notes))),
    )


def _classifier(ask: Question) -> Estimate | None:
    if ask.kind is None:
        return None
    x, y = ask.rows()
    return ratio.classifier_divergence(x, y, ask.kind, seed=ask.seed)


def _bound(ask: Question) -> Estimate:
    ask = ask if ask.name == "forward_kl" else ask.swapped()
    x, y = ask.rows()
    return bound.variational_bound(x, y, seed=ask.seed)


def _distance(ask: Question) -> Estimate:
    x, y = ask.rows()
    if ask.name == "energy":
        return sample_distances.energy_distance(x, y)
    if ask.name == "mmd":
        return sample_distances.mmd_squared(x, y)
    return sample_distances.sliced_wasserstein(x, y, seed=ask.seed)


def _few_variables(ask: Question) -> bool:
    """Whether quadrature applies; densities of one point at a time are too slow for its millions of points in a plane."""
    if not ask.continuous or not ask.evaluated:
        return False
    p, q = target_of(ask.p), target_of(ask.q)
    dim = max(p.bijection.free_dim, q.bijection.free_dim)
    batched = all(one.density is not None and one.density.batched for one in (p, q))
    return dim == 1 or (dim <= quadrature.MAX_DIMENSIONS and batched)


def _monte_carlo_can(ask: Question) -> bool:
    if not ask.continuous or not ask.evaluated:
        return False
    if ask.name == "forward_kl":
        return ask.p.access.can_sample and ask.q.density
    if ask.name == "reverse_kl":
        return ask.q.access.can_sample and ask.q.density
    normalisers_cancel = isinstance(ask.kind, WeightedKLs) and ask.kind.kl_weights[0] == ask.kind.kl_weights[1]
    return ask.sampled and (normalisers_cancel or (ask.p.density and ask.q.density))


def _bridge_can(ask: Question) -> bool:
    if not ask.continuous or ask.name not in _KLS or not ask.evaluated or not ask.sampled:
        return False
    weighted = target_of(ask.p).weights is not None or target_of(ask.q).weights is not None
    return not weighted and not (ask.p.density and ask.q.density)


def _importance_can(ask: Question) -> bool:
    if not ask.continuous or ask.name not in _KLS or not (ask.p.density and ask.q.density):
        return False
    drawn = target_of(ask.p if ask.name == "reverse_kl" else ask.q)
    return drawn.access.can_sample and drawn.weights is None


def _knn_can(ask: Question) -> bool:
    if not ask.continuous or not isinstance(ask.kind, WeightedKLs):
        return False
    return ask.sampled or (ask.name == "forward_kl" and ask.p.access.can_sample and ask.q.density)


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
        "log densities of both, in one to three variables (in one for distances), or independent coordinates",
        lambda ask: (
            (_few_variables(ask) and (ask.kind is not None or (ask.name != "mmd" and target_of(ask.p).dim == 1)))
            or (ask.continuous and products.applies(ask.p.distribution, ask.q.distribution, ask.kind))
        ),
        _quadrature,
    ),
    Method(
        "bridge",
        "log densities and equally weighted draws of both, at least one of the densities unnormalised, for a KL",
        _bridge_can,
        _bridge,
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
            isinstance(ask.kind, WeightedKLs)
            and ask.continuous
            and Access.LOG_PROB in ask.p.access
            and ask.q.density
            and Access.SAMPLER in ask.q.access
        ),
        _self_normalised,
    ),
    Method(
        "importance",
        "normalised log densities of both, and equally weighted draws of p for reverse KL, of q for forward KL",
        _importance_can,
        _importance,
    ),
    Method(
        "knn",
        "draws of both, or draws of p and a normalised density of q for forward KL",
        _knn_can,
        _nearest_neighbors,
        independent=True,
    ),
    Method(
        "classifier",
        "draws of both",
        lambda ask: ask.kind is not None and ask.continuous and ask.sampled,
        _classifier,
        independent=True,
    ),
    Method(
        "bound",
        "draws of both, for a KL",
        lambda ask: ask.name in _KLS and ask.continuous and ask.sampled,
        _bound,
        automatic=False,
        independent=True,
    ),
    Method(
        "u_statistic",
        "draws of both",
        lambda ask: ask.kind is None and ask.continuous and ask.sampled,
        _distance,
        independent=True,
    ),
)
METHODS = tuple(one.name for one in TABLE)
