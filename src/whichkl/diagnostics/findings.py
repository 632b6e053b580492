"""Findings: what speaks against a fit, by rules that stand here and nowhere else, and the next step for each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from whichkl.diagnostics.correlation import next_richer
from whichkl.diagnostics.measured import Measured
from whichkl.diagnostics.result import NEGLIGIBLE, Diagnostics, draws_in
from whichkl.divergences import Estimate
from whichkl.families import Autoregressive, Categorical, Family, Gaussian, Mixture, Product, simpler
from whichkl.importance import khat_limit
from whichkl.objectives import Objective
from whichkl.solvers import Solution
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
    "log_density_jumps": (
        "Between draws of the model log p changes by more than its gradient says, as where it jumps (`round()`, a threshold, a "
        "table): a fit that follows the gradient is blind to that, and its optimum may lie elsewhere. Smooth the jumps, or mend "
        "the gradient."
    ),
    "modes_missing": (
        "The target has mass at modes that the fit never visits (`fit.diagnostics.missing_modes`): try {holding}, a flow, or "
        "forward KL where the target can be drawn from."
    ),
    "nodes_too_few": "The nodes don't settle the fit: raise `max_nodes` of the solver, or use a smaller family.",
    "not_converged": (
        "The solver stopped before its own criterion was met: let it go on longer (`solver=` with more iterations, steps or "
        "epochs), or use a smaller family."
    ),
    "not_a_number_met": (
        "The log density was NaN or +inf, or its gradient not finite, or it raised, at points that were tried: check it far from "
        "its mode, and where it has a cusp; and whether it still answers."
    ),
    "not_measured": (
        "A diagnostic failed, so that nothing is known of what it would have found: `fit.diagnostics.notes` says which one and "
        "why. Mend the cause, and fit again."
    ),
    "outside_support": (
        "The log density is -inf at draws of the model, so that reverse KL is infinite: pass `support=`, or use forward KL where "
        "the target can be drawn from."
    ),
    "score_not_conservative": (
        "Integrals of the score round triangles aren't 0, by more than 0.05 nats: it's the gradient of no log density, and the "
        "value depends on the lines taken. Give a score that is a gradient, or `log_prob=`."
    ),
    "variances_understated": (
        "By linear response mean field makes columns too narrow, as it does where they hang together: `fit.linear_response()` "
        "has their covariance; or try {richer}."
    ),
    "weights_unreliable": (
        "Importance weights can't repair this fit: don't reweight its draws. `fit.expect(f)` goes on to particles, or says "
        "why not; or try {richer}."
    ),
}
"""What can be found, each with the next step."""

_TOO_FAR = 0.1
"""Nats of KL from which a family counts as too small."""
_SURE, _TOLD, _OFF = 1e-4, 0.6, 0.06
"""A test on unseen rows counts from this p-value and this AUC, or this distance of the transform from uniform, on."""
NARROW = 1.25
"""Mean field counts as too narrow where linear response makes a column so many times as wide."""
_JUMP = 0.05
"""Nats that log p changes beyond its gradient, in the mean over lines between draws."""
_STEIN = 2_000
_WIDE = 200
"""In more dimensions than these a low rank is richer enough; a full covariance would take long."""


def find(
    target: Target,
    family: Family,
    value: Estimate,
    d: Diagnostics,
    solution: Solution,
    objective: Objective,
    measured: Measured,
    *,
    disagree: bool,
) -> frozenset[str]:
    """Name what was found; the rules stand here and nowhere else."""
    is_forward = objective.direction == "forward"
    too_far = _TOO_FAR * objective.curvature
    known = value.up_to is None and value.reliable
    least = d.least_kl or 0.0
    left_out = d.separate > 1 and least > 0.01
    best = d.optima[0].loss
    several = sum(one.loss - best < NEGLIGIBLE for one in d.optima) > 1
    missing = d.missing_modes is not None and d.missing_modes.found
    draws = draws_in(target.dim)
    weights = d.khat is not None and d.ess is not None and d.khat > khat_limit(draws) and d.ess < 0.9 * draws
    followed = (d.ess or 0.0) > 0.99 * draws and least < 0.01 and not missing and not weights
    overfit = False
    if d.elbo is not None and d.nodes is not None and objective.direction == "reverse":
        excess = -solution.best.loss - d.elbo.value
        overfit = math.isfinite(excess) and excess > max(_TOO_FAR, 1e-3 * target.dim, 4 * d.elbo.stderr)
    rules = {
        "family_too_small": (value.interval[0] > too_far if known else least > _TOO_FAR and not is_forward)
        or (left_out and least > _TOO_FAR)
        or (d.richer_gain is not None and d.richer_gain.value > max(4 * d.richer_gain.stderr, _TOO_FAR))
        or (is_forward and _is_told_apart(d)),
        "family_too_rich": d.simpler_gain is not None and d.simpler_gain.value > 2 * d.simpler_gain.stderr,
        "other_modes_exist": several and not is_forward and not (known and value.value < 0.01) and not followed,
        "accesses_disagree": disagree,
        "heavy_tails": not family.conditional and not value.reliable and value.khat is not None and value.khat >= 1,
        "log_density_jumps": (d.jump or 0.0) > _JUMP,
        "modes_missing": missing,
        "nodes_too_few": overfit or (d.node_error or 0.0) > 0.05,
        "not_converged": not solution.best.converged,
        "not_a_number_met": target.evaluations["rejected"] > 0 or measured.met_no_number,
        "not_measured": bool(measured.notes),
        "outside_support": not is_forward and d.elbo is not None and d.elbo.value == -math.inf,
        "score_not_conservative": target.line_integral is not None and target.line_integral.is_open,
        "variances_understated": d.understated is not None and d.understated >= NARROW,
        "weights_unreliable": weights or left_out or missing,
    }
    return frozenset(name for name, holds in rules.items() if holds)


def _is_told_apart(d: Diagnostics) -> bool:
    """Whether unseen rows are far from the model's draws: surely, and by much."""
    two, calibration = d.two_sample, d.calibration
    if two is not None and two.auc is not None and two.p_value is not None and two.p_value < _SURE and two.auc > _TOLD:
        return True
    columns = () if calibration is None else calibration.columns
    return any(one.p_value < _SURE and one.distance > _OFF for one in columns)


def explain(findings: Iterable[str], family: Family, diagnostics: Diagnostics) -> tuple[str, ...]:
    """Return a sentence with the next step for each finding."""
    otherwise = "Autoregressive()" if isinstance(family, (Categorical, Product)) else "a flow, or a family of your own"
    otherwise = "one with wider layers, `hidden=`" if isinstance(family, Autoregressive) else otherwise
    larger = next_richer(family, diagnostics) or otherwise
    if isinstance(larger, Mixture) and diagnostics.separate > larger.count:
        larger = replace(larger, components=diagnostics.separate)
    if larger == Gaussian() and diagnostics.optima[0].model.event_shape[0] > _WIDE:
        larger = Gaussian("low_rank", rank=10)
    missed = 0 if diagnostics.missing_modes is None else diagnostics.missing_modes.count
    holding = Mixture((family.count if isinstance(family, Mixture) else 1) + missed)
    words = {"richer": larger, "simpler": diagnostics.simpler or simpler(family), "holding": f"`{holding}`"}
    return tuple(FINDINGS[name].format(**words) for name in sorted(findings))


def shown_weights(ess: float, khat: float | None, draws: int | None) -> str:
    """Write k̂, and why a large one does no harm where nearly all draws count."""
    share = ess / (draws or math.inf)
    harmless = khat is not None and draws is not None and khat > khat_limit(draws) and share >= 0.9
    return shown_khat(khat) + (f" (of a tail that hardly counts: ESS is {share:.1%})" if harmless else "")


def shown_khat(khat: float | None) -> str:
    """Write k̂; below 0 the tail is bounded, and how far doesn't matter."""
    if khat is None or math.isinf(khat):
        return "∞" if khat == math.inf else "below 0"
    return f"{khat:.2f}" if khat >= 0 else "below 0"


def accesses_disagree(target: Target, seed: int) -> bool:
    """Stein's identity, E_p[∇log p] = 0 and E_p[xᵢ ∂ᵢ log p] = −1, on p's own draws, with six standard errors' room.

    Source: Stein (1972); as a check of samples, Gorham & Mackey (2015).
    """
    if target.bijection.is_discrete:
        return False
    free = target.unconstrained()
    if not (free.access.can_sample and free.access.can_evaluate):
        return False
    free = free.thinned()[0]
    x = free.samples if free.samples is not None else free.draws(_STEIN, seed + 3)
    if len(x) < 30 or target.weights is not None:
        return False
    x = x[torch.linspace(0, len(x) - 1, min(len(x), _STEIN), dtype=torch.float64, device="cpu").long()].to(torch.float64)
    value, score = free.trial(x)
    known = value.isfinite()
    if float(known.double().mean()) < 0.99:
        return True
    x, score = x[known] - x[known].median(0).values, score[known]
    scale = x.square().mean(0).sqrt().clamp(min=1e-300)
    terms = torch.cat([score * scale, x * score + 1], dim=1)
    off, stderr = terms.mean(0).abs(), terms.std(0) / math.sqrt(len(x))
    return bool(((off > 6 * stderr) & (off > 0.25)).any())
