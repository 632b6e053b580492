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
from whichkl.divergences.exact import closed_form, discrete, line_distances, quadrature
from whichkl.divergences.exact.atoms import enumerate_atoms
from whichkl.divergences.exact.gaussians import with_error
from whichkl.divergences.kinds import WeightedKLs
from whichkl.divergences.question import Question
from whichkl.divergences.samples import bound, counting, nearest_neighbors, ratio, sample_distances
from whichkl.families.columns import IndependentColumns
from whichkl.samples.point_masses import Masses
from whichkl.targets import Target
from whichkl.targets.coordinates import in_free_coordinates

_ERROR_OF_THINNED_ROWS = math.sqrt((1 + math.exp(-2)) / (1 - math.exp(-2)))
"""Factor of the error of thinned chains: kept neighbours, τ apart, still correlate by about e⁻²."""

_MIN_DRAWS_OF_PART = 30
"""Draws of a component that give its part of a mean."""

Condition = Callable[[Question], bool]
Run = Callable[[Question], Estimate | None]


@dataclass(frozen=True)
class Method:
    """A method: its requirements, whether it applies, how it runs, and whether it assumes independent draws of equal weight."""

    name: str
    needs: str
    can: Condition
    run: Run
    automatic: bool
    independent: bool
    takes_weights: bool

    def answer(self, ask: Question) -> Estimate | None:
        """Run the method; where it assumes independent draws, chains are thinned first, with a note and a wider error.

        Where it takes no weights, rows stay with chance w / max w, with a note.
        """
        if not self.independent:
            return self.run(ask)
        if not self.takes_weights and any(one.weights is not None for one in ask.targets):
            (p, of_p), (q, of_q) = ask.p.of_equal_weight(ask.seed), ask.q.of_equal_weight(ask.seed)
            found = self.answer(replace(ask, p=p, q=q))
            return None if found is None else replace(found, notes=(*found.notes, *of_p, *of_q))
        (p, of_p), (q, of_q) = ask.p.thinned(), ask.q.thinned()
        result, notes = self.run(replace(ask, p=p, q=q)), of_p + of_q
        if result is None or not notes:
            return result
        return replace(result, stderr=_ERROR_OF_THINNED_ROWS * result.stderr, notes=(*result.notes, *notes))


TABLE: list[Method] = []
"""The methods, the most exact one first."""


def _both_ways(ask: Question, run: Run) -> Estimate | None:
    """Return the weighted sum of both KLs by one method."""
    there, back = (run(replace(ask, name=name)) for name in ("forward_kl", "reverse_kl"))
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


def _method(
    name: str,
    needs: str,
    can: Condition,
    *,
    atoms: bool = False,
    automatic: bool = True,
    independent: bool = False,
    takes_weights: bool = False,
) -> Callable[[Run], Run]:
    """Add the decorated function to the table, as a method of atoms or of two densities or samples."""

    def add(run: Run) -> Run:
        def fits(ask: Question) -> bool:
            return (atoms or ask.continuous) and can(ask)

        TABLE.append(Method(name, needs, fits, run, automatic, independent, takes_weights))
        return run

    return add


@_method(
    "closed_form",
    "two torch distributions with an entry for this divergence",
    lambda ask: ask.p.distribution is not None and ask.q.distribution is not None,
    atoms=True,
)
def _closed_form(ask: Question) -> Estimate | None:
    p, q = ask.p.distribution, ask.q.distribution
    if ask.kind is None or not isinstance(p, Distribution) or not isinstance(q, Distribution):
        return None
    if not isinstance(ask.kind, WeightedKLs):
        return closed_form.gaussian(p, q, ask.kind)
    result = closed_form.closed_form(p, q, ask.kind)
    if result is None or result.value != math.inf:
        return result
    # Other methods name the region or the atoms, and find out where the closed form has overflowed.
    try:
        explained = _enumeration(ask) if ask.atoms else _quadrature(ask) if _few_variables(ask) else None
    except WhichklError:
        explained = None
    return explained if explained is not None and explained.finite != "not certified" else result


@_method("enumeration", "the probabilities of two laws whose atoms can be listed", lambda ask: ask.atoms is not None, atoms=True)
def _enumeration(ask: Question) -> Estimate | None:
    if ask.kind is None or ask.atoms is None:
        return None
    if joined := quadrature.of_products(ask.p.distribution, ask.q.distribution, ask.kind):
        return joined
    listed = enumerate_atoms(*ask.atoms, ask.kind)
    found = None if listed is None else discrete.enumeration(listed[0], listed[1], ask.kind, listed[2])
    if found is None or listed is None or math.isinf(found.value) or listed[0].equal(listed[1]):
        return found
    noise = max(discrete.rounding_of_counts(one.law, listed[2]) for one in ask.atoms)
    return with_error(found, 2 * noise * (1 + found.value))


def _few_variables(ask: Question) -> bool:
    """Whether quadrature applies; densities of one point at a time are too slow for its millions of points in a plane."""
    if not ask.continuous or not ask.evaluated:
        return False
    dim = max(one.bijection.free_dim for one in ask.targets)
    batched = all(one.density is not None and one.density.batched for one in ask.targets)
    return dim == 1 or (dim <= quadrature.MAX_DIMENSIONS and batched)


def _quadrature_can(ask: Question) -> bool:
    if ask.atoms is not None:
        return False
    if ask.kind is None:
        return _few_variables(ask) and ask.name != "mmd" and ask.p.target.dim == 1
    return _few_variables(ask) or bool(quadrature.coordinate_pairs(ask.p.distribution, ask.q.distribution, ask.kind))


@_method(
    "quadrature",
    "log densities of both, in one to three variables (in one for distances), or independent coordinates",
    _quadrature_can,
    atoms=True,
)
def _quadrature(ask: Question) -> Estimate | None:
    p, q = ask.targets
    if ask.kind is None:
        return line_distances.energy_distance(p, q) if ask.name == "energy" else line_distances.wasserstein(p, q)
    joined = quadrature.of_products(ask.p.distribution, ask.q.distribution, ask.kind)
    return joined or (quadrature.divergence(p, q, ask.kind) if ask.continuous else None)


@_method(
    "bridge",
    "log densities and equally weighted draws of both, at least one of the densities unnormalised, for a KL",
    lambda ask: (
        ask.is_kl
        and ask.evaluated
        and ask.sampled
        and all(one.weights is None for one in ask.targets)
        and not (ask.p.density and ask.q.density)
    ),
)
def _bridge(ask: Question) -> Estimate:
    run = bridge.forward_kl if ask.name == "forward_kl" else bridge.reverse_kl
    return run(*ask.targets, ask.n, ask.seed)


def _monte_carlo_can(ask: Question) -> bool:
    if ask.kind is None or not ask.evaluated:
        return False
    if ask.is_kl:
        drawn = ask.p if ask.name == "forward_kl" else ask.q
        return drawn.access.can_sample and ask.q.density
    normalisers_cancel = isinstance(ask.kind, WeightedKLs) and ask.kind.kl_weights[0] == ask.kind.kl_weights[1]
    return ask.sampled and (normalisers_cancel or (ask.p.density and ask.q.density))


@_method(
    "monte_carlo",
    "log densities of both, with draws of what the expectation is under (of both for other divergences than the KLs)",
    _monte_carlo_can,
    atoms=True,
)
def _monte_carlo(ask: Question) -> Estimate | None:
    p, q = in_free_coordinates(*ask.targets)
    if ask.is_kl:
        run = monte_carlo.forward_kl if ask.name == "forward_kl" else monte_carlo.reverse_kl
        return _with_light_parts(run(p, q, ask.n, ask.seed), *((p, q) if ask.name == "forward_kl" else (q, p)))
    if isinstance(ask.kind, WeightedKLs):
        return monte_carlo.weighted_kls(p, q, ask.kind, ask.n, ask.seed)
    return None if ask.kind is None else monte_carlo.by_both(p, q, ask.kind, ask.n, ask.seed)


def _with_light_parts(found: Estimate, drawn: Target, other: Target) -> Estimate:
    """Mark a KL as unreliable where components that its draws can't hold add more to it than its error."""
    rare = (
        []
        if drawn.samples is not None
        else [part for part in drawn.light_parts if part.weight * (found.n or 0) < _MIN_DRAWS_OF_PART]
    )
    ratios = [(drawn.log_prob(part.draws) - other.log_prob(part.draws)).mean() for part in rare]
    missed = sum(part.weight * float(ratio) for part, ratio in zip(rare, ratios, strict=True))
    if abs(missed) <= found.stderr:
        return found
    note = f"components of less than {_MIN_DRAWS_OF_PART} expected draws add about {missed:.3g} nats, which the draws hardly show"
    return replace(found, reliable=False, notes=(note, *found.notes))


def _counting_can(ask: Question) -> bool:
    sides = (ask.p, ask.q)
    if isinstance(ask.kind, WeightedKLs) and _mixed(ask):
        return ask.is_kl or all(side.is_counted for side in sides)
    on_atoms = all(side.mass_on == "atoms" for side in sides) and ask.kind is not None
    return on_atoms and any(side.is_counted for side in sides) and all(side.is_counted or side.atoms for side in sides)


def _mixed(ask: Question) -> tuple[Target, IndependentColumns | Target, list[bool], Masses] | None:
    """Return p's rows, q's law or rows, the columns on atoms and values with mass, where both have columns of both kinds."""
    if ask.name == "reverse_kl":
        ask = ask.swapped()
    if not (ask.p.mass_on == ask.q.mass_on == "mixed" and ask.p.is_counted):
        return None
    other = ask.q.target if ask.q.is_counted else ask.q.distribution
    return (ask.p.target, other, ask.q.is_atomic, ask.q.masses) if isinstance(other, (IndependentColumns, Target)) else None


@_method(
    "counting",
    "rows of one side on atoms, and rows or probabilities of the other",
    _counting_can,
    atoms=True,
    independent=True,
    takes_weights=True,
)
def _counting(ask: Question) -> Estimate | None:
    if mixed := _mixed(ask):
        if not ask.is_kl:
            return _both_ways(ask, _counting)
        return (ask if ask.name == "forward_kl" else ask.swapped()).in_names(lambda: counting.mixed_kl(*mixed, ask.seed))
    if ask.kind is None:
        return None
    p, q = (side.target if side.is_counted or side.atoms is None else side.atoms for side in (ask.p, ask.q))
    return counting.divergence(p, q, ask.kind)


@_method(
    "self_normalised",
    "a log density of p, and a normalised one with a sampler of q",
    lambda ask: (
        isinstance(ask.kind, WeightedKLs) and Access.LOG_PROB in ask.p.access and ask.q.density and Access.SAMPLER in ask.q.access
    ),
)
def _self_normalised(ask: Question) -> Estimate | None:
    if not isinstance(ask.kind, WeightedKLs):
        return None
    return importance_sampling.self_normalised(*ask.targets, ask.kind, ask.n, ask.seed)


def _importance_can(ask: Question) -> bool:
    drawn = (ask.p if ask.name == "reverse_kl" else ask.q).target
    return ask.is_kl and ask.p.density and ask.q.density and drawn.access.can_sample and drawn.weights is None


@_method(
    "importance",
    "normalised log densities of both, and equally weighted draws of p for reverse KL, of q for forward KL",
    _importance_can,
)
def _importance(ask: Question) -> Estimate:
    p, q = ask.targets
    if ask.name == "reverse_kl":
        return importance_sampling.from_other_side(q, p, ask.n, ask.seed)
    return importance_sampling.from_other_side(p, q, ask.n, ask.seed, ("p", "q"))


@_method(
    "knn",
    "draws of both, or draws of p and a normalised density of q for forward KL",
    lambda ask: (
        isinstance(ask.kind, WeightedKLs)
        and (ask.sampled or (ask.name == "forward_kl" and ask.p.access.can_sample and ask.q.density))
    ),
    independent=True,
)
def _nearest_neighbors(ask: Question) -> Estimate | None:
    if ask.name == "reverse_kl":
        return _nearest_neighbors(ask.swapped())
    if ask.name == "forward_kl":
        x, log_q = ask.drawn(ask.p), ask.q.target.log_prob
        if ask.q.density:
            return ask.in_names(lambda: nearest_neighbors.one_sample_kl(x, log_q, seed=ask.seed))
        return ask.in_names(lambda: nearest_neighbors.two_sample_kl(x, ask.drawn(ask.q, 1), seed=ask.seed))
    return _both_ways(ask, _nearest_neighbors)


@_method("classifier", "draws of both", lambda ask: ask.kind is not None and ask.sampled, atoms=True, independent=True)
def _classifier(ask: Question) -> Estimate | None:
    kind = ask.kind
    return None if kind is None else ask.in_names(lambda: ratio.classifier_divergence(*ask.rows(), kind, seed=ask.seed))


@_method("bound", "draws of both, for a KL", lambda ask: ask.is_kl and ask.sampled, automatic=False, independent=True)
def _bound(ask: Question) -> Estimate:
    ask = ask if ask.name == "forward_kl" else ask.swapped()
    return ask.in_names(lambda: bound.variational_bound(*ask.rows(), seed=ask.seed))


@_method("u_statistic", "draws of both", lambda ask: ask.kind is None and ask.sampled, atoms=True, independent=True)
def _distance(ask: Question) -> Estimate:
    x, y = ask.rows()
    if ask.name == "energy":
        return ask.in_names(lambda: sample_distances.energy_distance(x, y))
    if ask.name == "mmd":
        return ask.in_names(lambda: sample_distances.mmd_squared(x, y))
    return ask.in_names(lambda: sample_distances.sliced_wasserstein(x, y, seed=ask.seed))


METHODS = tuple(one.name for one in TABLE)
