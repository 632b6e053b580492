"""Diagnostics: whether a fit worked, on draws that it hasn't seen, and what to do where it didn't."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, TargetError, WhichklError, cannot
from whichkl.access import Access
from whichkl.divergences import Estimate, Finite, monte_carlo, quadrature
from whichkl.families import Family, Mixture, richer, simpler
from whichkl.families.family import NodeFamily
from whichkl.importance import effective_sample_size, khat_limit, pareto_smooth
from whichkl.objectives import ForwardKL, Objective
from whichkl.solvers import Optimum, Solution, Solver, solver_for
from whichkl.targets import Target

FINDINGS = {
    "family_too_small": "The family can't follow the target: try a richer one, such as {richer}.",
    "family_too_rich": "A simpler family does better on unseen draws: try {simpler}, or give more samples.",
    "other_modes_exist": (
        "Several local optima were found, and the fit shows the best: look at `fit.diagnostics.optima`, and at a richer "
        "family ({richer})."
    ),
    "accesses_disagree": (
        "The draws don't follow the log density (Stein's identity fails on them): check that both describe one target, in the "
        "same coordinates, and that the draws have converged."
    ),
    "heavy_tails": "The log ratio has so heavy a tail that the divergence may be infinite: don't rely on the value.",
    "nodes_too_few": "The nodes don't settle the fit: raise `max_nodes` of the solver, or use a smaller family.",
    "not_converged": "The solver stopped before its own criterion was met: raise its `max_iterations`, or use a smaller family.",
    "not_a_number_met": "The log density was NaN or +inf at points that the search tried: check it far from its mode.",
    "weights_unreliable": "Importance weights can't repair this fit: don't reweight its draws.",
}
"""What can be found, each with the next step."""

DRAWS = 10_000
_TOO_FAR = 0.1
"""Nats of KL from which a family counts as too small."""
_FOLDS, _FOLD_LIMIT = 10, 10_000
_STEIN = 2_000


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
    simpler_gain: Estimate | None = None
    """The same for the next simpler one."""
    least_kl: float | None = None
    """What reverse KL amounts to at least, in nats: from the importance weights, and from separate optima that q leaves out."""
    separate: int = 1
    """How many of the optima lie apart from each other: as many components could hold them all."""
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
    """Measure a fit with the access that there is.

    Raises:
        TargetError: the target was said to be normalised, and the KL would be negative.
    """
    diagnostics = Diagnostics(solution.optima, solution.iterations, solution.residual, solution.nodes, solution.node_error)
    is_forward = isinstance(objective, ForwardKL)
    if Access.LOG_PROB in target.access:
        diagnostics = _by_weights(target, family, q, diagnostics, seed, separate=not is_forward)
    if is_forward:
        value, diagnostics = _forward_value(target, family, solver, q, diagnostics, seed)
    else:
        value = _reverse_value(target, q, diagnostics)
    if value.up_to is None and value.value + 6 * value.stderr < -1e-6:
        because = f"`normalized=True` was said, and the KL would be {value.number} nats, below 0: its integral isn't one"
        raise TargetError(cannot("use this target", because, "Normalise it, or say `normalized=False`"))
    findings = _find(target, value, diagnostics, solution, is_forward=is_forward, seed=seed)
    diagnostics = replace(diagnostics, evaluations=dict(target.evaluations))
    return Judgement(value, diagnostics, "converged" if solution.best.converged else "stopped", findings)


def _find(target: Target, value: Estimate, d: Diagnostics, solution: Solution, *, is_forward: bool, seed: int) -> frozenset[str]:
    """Name what was found; the rules stand here and nowhere else."""
    known = value.up_to is None and value.reliable
    least = d.least_kl or 0.0
    left_out = d.separate > 1 and least > 0.01
    weights = d.khat is not None and d.ess is not None and d.khat > khat_limit(DRAWS) and d.ess < 0.9 * DRAWS
    overfit = d.elbo is not None and d.nodes is not None and -solution.best.loss - d.elbo.value > max(0.1, 4 * d.elbo.stderr)
    rules = {
        "family_too_small": (value.interval[0] > _TOO_FAR if known else least > _TOO_FAR and not is_forward)
        or (left_out and least > _TOO_FAR)
        or (d.richer_gain is not None and d.richer_gain.value > max(4 * d.richer_gain.stderr, _TOO_FAR)),
        "family_too_rich": d.simpler_gain is not None and d.simpler_gain.value > 2 * d.simpler_gain.stderr,
        "other_modes_exist": len(d.optima) > 1 and not is_forward and not (known and value.value < 0.01),
        "accesses_disagree": _accesses_disagree(target, seed),
        "heavy_tails": not value.reliable and value.khat is not None and value.khat >= 1,
        "nodes_too_few": overfit or (d.node_error or 0.0) > 0.05,
        "not_converged": not solution.best.converged,
        "not_a_number_met": target.evaluations["rejected"] > 0,
        "weights_unreliable": weights or left_out,
    }
    return frozenset(name for name, holds in rules.items() if holds)


def explain(findings: Iterable[str], family: Family, diagnostics: Diagnostics) -> tuple[str, ...]:
    """Return a sentence with the next step for each finding."""
    larger = richer(family)
    if isinstance(larger, Mixture) and diagnostics.separate > larger.components:
        larger = Mixture(diagnostics.separate, larger.covariance)
    return tuple(FINDINGS[name].format(richer=larger, simpler=simpler(family)) for name in sorted(findings))


def shown_khat(khat: float | None) -> str:
    """Write k̂; below 0 the tail is bounded, and how far doesn't matter."""
    if khat is None or math.isinf(khat):
        return "∞" if khat == math.inf else "below 0"
    return f"{khat:.2f}" if khat >= 0 else "below 0"


def _accesses_disagree(target: Target, seed: int) -> bool:
    """Stein's identity, E_p[∇log p] = 0 and E_p[xᵢ ∂ᵢ log p] = −1, on p's own draws, with six standard errors' room.

    Source: Stein (1972); as a check of samples, Gorham & Mackey (2015).
    """
    free = target.unconstrained()
    if not (free.access.can_sample and Access.LOG_PROB in free.access):
        return False
    free = free.thinned()[0]
    x = free.samples if free.samples is not None else free.draws(_STEIN, seed + 3)
    if len(x) < 30 or target.weights is not None:
        return False
    x = x[torch.linspace(0, len(x) - 1, min(len(x), _STEIN), dtype=torch.float64).long()].to(torch.float64)
    value, score = free.trial(x)
    known = value.isfinite()
    if float(known.double().mean()) < 0.99:
        return True
    x, score = x[known] - x[known].median(0).values, score[known]
    scale = x.square().mean(0).sqrt().clamp(min=1e-300)
    terms = torch.cat([score * scale, x * score + 1], dim=1)
    off, stderr = terms.mean(0).abs(), terms.std(0) / math.sqrt(len(x))
    return bool(((off > 6 * stderr) & (off > 0.25)).any())


def _by_weights(target: Target, family: Family, q: Target, diagnostics: Diagnostics, seed: int, *, separate: bool) -> Diagnostics:
    """ELBO, ESS, k̂ and what reverse KL amounts to at least, on fresh draws of the model."""
    x = q.draws(DRAWS, seed + 1)
    log_weight = (target.log_prob(x).to(torch.float64) - q.log_prob(x).to(torch.float64)).detach()
    reverse = monte_carlo.mean_log_ratio("elbo", -log_weight, None, "draws of q")
    ess, khat = effective_sample_size(log_weight), math.inf
    if bool((log_weight > -math.inf).any()):
        khat = pareto_smooth(log_weight)[1]
    elbo = replace(reverse, value=-reverse.value, ess=ess, khat=khat)
    gap = float(torch.logsumexp(log_weight, 0)) - math.log(DRAWS) - elbo.value
    apart = _apart(diagnostics.optima, family) if separate else diagnostics.optima[:1]
    missed = math.log(sum(math.exp(diagnostics.optima[0].loss - one.loss) for one in apart))
    return replace(diagnostics, elbo=elbo, ess=ess, khat=khat, least_kl=max(gap, missed), separate=len(apart))


def _apart(optima: tuple[Optimum, ...], family: Family) -> list[Optimum]:
    """The best optima that hardly overlap: Bhattacharyya distance of their Gaussians above 2 nats (overlap below 14 %)."""
    kept: list[tuple[Optimum, Tensor, Tensor]] = []
    if not isinstance(family, NodeFamily):
        raise TypeError(family)
    for one in optima:
        loc, tril = family.whitening(one.model)
        cov = tril @ tril.T
        if all(_bhattacharyya(loc, cov, other, theirs) > 2 for _, other, theirs in kept):
            kept.append((one, loc, cov))
    return [one for one, _, _ in kept]


def _bhattacharyya(a: Tensor, a_cov: Tensor, b: Tensor, b_cov: Tensor) -> float:
    middle = (a_cov + b_cov) / 2
    squared = (a - b) @ torch.linalg.solve(middle, a - b)
    volume = torch.logdet(middle) - (torch.logdet(a_cov) + torch.logdet(b_cov)) / 2
    return float(squared / 8 + volume / 2)


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
    return _held_out(target, family, solver, q, diagnostics, seed)


def _held_out(
    target: Target, family: Family, solver: Solver, q: Target, diagnostics: Diagnostics, seed: int
) -> tuple[Estimate, Diagnostics]:
    """Mean −log q (or log p − log q) on unseen draws, and what the neighbouring families gain on the same ones."""
    if target.sampler is not None:
        x = target.draws(DRAWS, seed + 2)
        mine, larger = -q.log_prob(x), richer(family)
        other = _refit(target, larger, solver_for(ForwardKL(), larger, target.access), seed)
        held_out = monte_carlo.cross_entropy(mine, f"mean over {len(x):,} fresh draws")
        gain = _gain(mine, None if other is None else -other.log_prob(x))
        return held_out, replace(diagnostics, held_out=held_out, richer_gain=gain)
    own = cross_fit(target, family, solver, seed)
    if own is None:
        note = "too few rows to hold any out: the mean is over the rows that were fitted, and flatters the fit"
        loss = -q.log_prob(_samples(target))
        estimate = monte_carlo.cross_entropy(loss, "in-sample mean", target.weights, target.chains)
        return replace(estimate, reliable=False, notes=(note,)), diagnostics
    order, mine, how = own
    w, chains = (None if one is None else one[order] for one in (target.weights, target.chains))
    gains = []
    for near in (richer(family), simpler(family)):
        theirs = None if near is None else cross_fit(target, near, solver_for(ForwardKL(), near, target.access), seed)
        gains.append(_gain(mine, None if theirs is None else theirs[1], w, chains))
    held_out = monte_carlo.cross_entropy(mine, how, w, chains)
    diagnostics = replace(diagnostics, held_out=held_out, richer_gain=gains[0], simpler_gain=gains[1])
    if Access.LOG_PROB not in target.access:
        return held_out, diagnostics
    log_p = target.log_prob(_samples(target)[order])
    absolute = monte_carlo.cross_entropy(mine + log_p, how, w, chains)
    return replace(absolute, up_to=None if target.normalized else "log_z"), diagnostics


def cross_fit(target: Target, family: Family, solver: Solver, seed: int) -> tuple[Tensor, Float[Tensor, " m"], str] | None:
    """Return −log q of rows under models fitted without them (their numbers, losses, and the scheme); None if too few.

    Up to 10,000 rows: ten folds. Above: one fifth is held out once. Folds are random rows; of chains, stretches in time.
    """
    x, n = _samples(target), len(_samples(target))
    folds = _folds(target, n, seed)
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
    order, loss = torch.cat(folds), torch.cat(losses)
    if target.chains is None:
        return order, loss, how
    in_time = order.argsort()
    return order[in_time], loss[in_time], how


def _folds(target: Target, n: int, seed: int) -> list[Tensor]:
    """Rows to hold out: random ones, or one stretch of each chain, since neighbours in time would tell of each other."""
    many = n <= _FOLD_LIMIT
    if target.chains is None:
        shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(_samples(target).device)
        return [*shuffled.tensor_split(min(_FOLDS, n))] if many else [shuffled[: n // 5]]
    own = [(target.chains == one).nonzero()[:, 0] for one in range(int(target.chains.max()) + 1)]
    count = min(_FOLDS if many else 5, max(map(len, own)))
    stretches = [rows.tensor_split(count) for rows in own]
    return [torch.cat([parts[i] for parts in stretches]) for i in (range(count) if many else [count - 1])]


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


def _gain(mine: Tensor, theirs: Tensor | None, weights: Tensor | None = None, chains: Tensor | None = None) -> Estimate | None:
    if theirs is None:
        return None
    gain = monte_carlo.cross_entropy(mine - theirs, "paired on unseen draws", weights, chains)
    return replace(gain, quantity="gain", up_to=None)


def _samples(target: Target) -> Tensor:
    if target.samples is None:
        raise TypeError("no samples")
    return target.samples.to(torch.float64)


def _on_the_line(target: Target) -> bool:
    return target.dim == 1 and Access.LOG_PROB in target.access and target.sampler is not None
