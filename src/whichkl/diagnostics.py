"""Diagnostics: whether a fit worked, on draws that it hasn't seen, and what to do where it didn't."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, WhichklError
from whichkl.access import Access
from whichkl.divergences import Estimate, Finite, monte_carlo, quadrature
from whichkl.families import Family, richer
from whichkl.importance import effective_sample_size, khat_limit, pareto_smooth
from whichkl.objectives import ForwardKL, Objective
from whichkl.solvers import Optimum, Solution, Solver, solver_for
from whichkl.targets import Target

FINDINGS = {
    "family_too_small": "The family can't follow the target: try a richer one, such as {richer}.",
    "other_modes_exist": (
        "Several local optima were found, and the fit shows the best: look at `fit.diagnostics.optima`, and at a richer "
        "family ({richer}) if they are far apart."
    ),
    "nodes_too_few": "The nodes don't settle the fit: raise `max_nodes` of the solver, or use a smaller family.",
    "not_converged": "The solver stopped before its own criterion was met: raise its `max_iterations`, or use a smaller family.",
    "weights_unreliable": "Importance weights can't repair this fit (k̂ is too large): don't reweight its draws.",
}
"""What can be found, each with the next step."""

DRAWS = 10_000
_TOO_FAR = 0.1
"""Nats of KL from which a family counts as too small."""
_FOLDS, _FOLD_LIMIT = 10, 10_000


@dataclass(frozen=True)
class Diagnostics:
    """What was measured about a fit; None where it doesn't apply."""

    optima: tuple[Optimum, ...]
    iterations: int
    residual: float
    nodes: int | None = None
    node_error: float | None = None
    elbo: Estimate | None = None
    ess: float | None = None
    khat: float | None = None
    held_out: Estimate | None = None
    """Mean −log q on draws that the fit hasn't seen (forward KL plus H(p))."""
    richer_gain: Estimate | None = None
    """By how many nats a draw the next richer family does better, paired on the same unseen draws."""
    evaluations: dict[str, int] | None = None


@dataclass(frozen=True)
class Judgement:
    """The value of the objective, the diagnostics, how the fit ended, and what was found."""

    value: Estimate
    diagnostics: Diagnostics
    status: str
    findings: frozenset[str]


def judge(
    target: Target, family: Family, objective: Objective, solver: Solver, solution: Solution, q: Target, seed: int
) -> Judgement:
    """Measure a fit with the access that there is."""
    best = solution.best
    diagnostics = Diagnostics(solution.optima, solution.iterations, solution.residual, solution.nodes, solution.node_error)
    findings: set[str] = set()
    if len(solution.optima) > 1 and not isinstance(objective, ForwardKL):
        findings.add("other_modes_exist")
    if not best.converged:
        findings.add("not_converged")
    if Access.LOG_PROB in target.access:
        diagnostics = _by_weights(target, q, diagnostics, seed)
        if diagnostics.khat is not None and diagnostics.khat > khat_limit(DRAWS):
            findings.add("weights_unreliable")
        if solution.nodes is not None and diagnostics.elbo is not None:
            gap = -best.loss - diagnostics.elbo.value
            if gap > max(0.1, 4 * diagnostics.elbo.stderr) or (solution.node_error or 0.0) > 0.05:
                findings.add("nodes_too_few")
    if isinstance(objective, ForwardKL):
        value, diagnostics = _forward_value(target, family, solver, q, diagnostics, seed)
    else:
        value = _reverse_value(target, q, diagnostics)
    gain = diagnostics.richer_gain
    far = value.interval[0] > _TOO_FAR if value.up_to is None and value.reliable else "weights_unreliable" in findings
    if far:
        findings.add("family_too_small")
    if gain is not None and gain.value > max(4 * gain.stderr, _TOO_FAR):
        findings.add("family_too_small")
    status = "converged" if best.converged else "stopped"
    diagnostics = replace(diagnostics, evaluations=dict(target.evaluations))
    return Judgement(value, diagnostics, status, frozenset(findings))


def explain(findings: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return a sentence with the next step for each finding."""
    return tuple(FINDINGS[name].format(richer=richer(family)) for name in sorted(findings))


def _by_weights(target: Target, q: Target, diagnostics: Diagnostics, seed: int) -> Diagnostics:
    """ELBO, ESS and k̂ on fresh draws of the model."""
    x = q.draws(DRAWS, seed + 1)
    log_weight = target.log_prob(x).to(torch.float64) - q.log_prob(x).to(torch.float64)
    log_weight = log_weight.detach()
    reverse = monte_carlo.mean_log_ratio("elbo", -log_weight, None, "draws of q")
    elbo = replace(reverse, value=-reverse.value, notes=reverse.notes)
    ess, khat = (
        effective_sample_size(log_weight),
        pareto_smooth(log_weight)[1] if bool((log_weight > -math.inf).any()) else math.inf,
    )
    return replace(diagnostics, elbo=replace(elbo, ess=ess, khat=khat), ess=ess, khat=khat)


def _reverse_value(target: Target, q: Target, diagnostics: Diagnostics) -> Estimate:
    if _on_the_line(target):
        try:
            return quadrature.kl(q, target, "reverse_kl")
        except WhichklError:  # heavy tails: Monte Carlo below says how far it can be trusted
            pass
    elbo = diagnostics.elbo
    if elbo is None:
        raise TypeError("reverse KL needs log_prob")
    value = 0.0 - elbo.value
    finite: Finite = "infinite" if value == math.inf else "not certified"
    return replace(elbo, quantity="reverse_kl", value=value, finite=finite, up_to=None if target.normalized else "log_z")


def _forward_value(
    target: Target, family: Family, solver: Solver, q: Target, diagnostics: Diagnostics, seed: int
) -> tuple[Estimate, Diagnostics]:
    if _on_the_line(target):
        try:
            return quadrature.kl(target, q), diagnostics
        except WhichklError:  # heavy tails: Monte Carlo below says how far it can be trusted
            pass
    if target.sampler is not None and Access.LOG_PROB in target.access:
        return monte_carlo.forward_kl(target, q, DRAWS, seed + 2), diagnostics
    held_out, gain = _held_out(target, family, solver, q, seed)
    return held_out, replace(diagnostics, held_out=held_out, richer_gain=gain)


def _held_out(target: Target, family: Family, solver: Solver, q: Target, seed: int) -> tuple[Estimate, Estimate | None]:
    """Mean −log q on unseen draws, and what the next richer family gains on the same ones."""
    larger = richer(family)
    if target.sampler is not None:
        x = target.draws(DRAWS, seed + 2)
        mine = -q.log_prob(x)
        other = _refit(target, larger, solver_for(ForwardKL(), larger, target.access), seed)
        theirs = None if other is None else -other.log_prob(x)
        return monte_carlo.cross_entropy(mine, f"mean over {len(x):,} fresh draws"), _gain(mine, theirs)
    own = cross_fit(target, family, solver, seed)
    others = cross_fit(target, larger, solver_for(ForwardKL(), larger, target.access), seed)
    if own is None:
        note = "too few rows to hold any out: the mean is over the rows that were fitted, and flatters the fit"
        loss = -q.log_prob(_samples(target))
        estimate = monte_carlo.cross_entropy(loss, "in-sample mean", target.weights)
        return replace(estimate, reliable=False, notes=(note,)), None
    order, mine, how = own
    w = None if target.weights is None else target.weights[order]
    return monte_carlo.cross_entropy(mine, how, w), _gain(mine, None if others is None else others[1], w)


def cross_fit(target: Target, family: Family, solver: Solver, seed: int) -> tuple[Tensor, Float[Tensor, " m"], str] | None:
    """Return −log q of rows under models fitted without them (their numbers, losses, and the scheme); None if too few.

    Up to 10,000 rows: ten folds. Above: one fifth is held out once.
    """
    x, n = _samples(target), len(_samples(target))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(n, generator=generator).to(x.device)
    folds = [*shuffled.tensor_split(min(_FOLDS, n))] if n <= _FOLD_LIMIT else [shuffled[: n // 5]]
    losses = []
    for fold in folds:
        keep = torch.ones(n, dtype=torch.bool, device=x.device)
        keep[fold] = False
        weights = None if target.weights is None else target.weights[keep]
        part = Target(samples=x[keep], weights=weights, names=target.names, support=target.bijection.constraints)
        fitted = _refit(part, family, solver, seed)
        if fitted is None:
            return None
        losses.append(-fitted.log_prob(x[fold]))
    how = f"{len(folds)}-fold cross-fitting, {n} rows" if len(folds) > 1 else f"{len(folds[0]):,} rows held out"
    return torch.cat(folds), torch.cat(losses), how


def model_target(model: Distribution, like: Target) -> Target:
    """Return a model as a target with all accesses: q, to be drawn from and evaluated like any p."""
    return Target(
        sampler=lambda n: model.sample((n,)),
        log_prob=model.log_prob,
        normalized=True,
        dim=like.dim,
        support=like.bijection.constraints,
        names=like.names,
        dtype=like.dtype,
        device=like.device,
    )


def _refit(target: Target, family: Family, solver: Solver, seed: int) -> Target | None:
    """Fit without judging; None where the rows don't allow it."""
    free, solver = target.unconstrained(), solver.quick()
    try:
        if free.samples is not None:
            family.check_samples(free.samples, target.names)
        return model_target(target.bijection.wrap(solver.solve(free, family, seed).best.model), target)
    except InputError:
        return None


def _gain(mine: Tensor, theirs: Tensor | None, weights: Tensor | None = None) -> Estimate | None:
    if theirs is None:
        return None
    return replace(monte_carlo.cross_entropy(mine - theirs, "paired on unseen draws", weights), quantity="gain", up_to=None)


def _samples(target: Target) -> Tensor:
    if target.samples is None:
        raise TypeError("no samples")
    return target.samples.to(torch.float64)


def _on_the_line(target: Target) -> bool:
    return target.dim == 1 and Access.LOG_PROB in target.access and target.sampler is not None
