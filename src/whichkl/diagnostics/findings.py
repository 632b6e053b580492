"""Findings: what can be wrong with a fit, the condition of each finding, and its next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from whichkl.diagnostics.ends import Ends
from whichkl.diagnostics.judged_fit import JudgedFit
from whichkl.diagnostics.result import MAX_LOSS_GAP, SMALL_KL, Diagnostics, draws_in
from whichkl.diagnostics.suggestions import preferred
from whichkl.divergences import Estimate
from whichkl.families import Family, Mixture, simpler
from whichkl.importance import MIN_SHARE_OF_DRAWS, khat_limit, shown_khat

MAX_KL = 0.1
"""Largest KL, in nats, from a family that is large enough."""
_MAX_P_VALUE, _MIN_AUC = 1e-4, 0.6
"""The classifier test counts up to this p-value, and from this AUC."""
MIN_SPREAD_RATIO = 1.25
"""Least ratio of a standard deviation by linear response to mean field's at which mean field is too narrow."""
_MAX_JUMP = 0.05
"""Largest change of log p, in nats, that its gradient need not explain, averaged over lines between draws."""
_MAX_NODE_ERROR = 0.05


@dataclass(frozen=True)
class _Evidence:
    """What the conditions read."""

    fit: JudgedFit
    value: Estimate
    d: Diagnostics
    disagree: bool

    @property
    def is_forward(self) -> bool:
        return self.fit.objective.direction == "forward"

    @property
    def is_known(self) -> bool:
        """Whether the value is the divergence itself, and reliable."""
        return self.value.up_to is None and self.value.reliable

    @property
    def least_kl(self) -> float:
        return self.d.least_kl or 0.0

    @property
    def misses_modes(self) -> bool:
        return self.d.missing_modes is not None and self.d.missing_modes.found

    @property
    def has_heavy_ratio(self) -> bool:
        """Whether the terms of the value have a tail so heavy that their mean may be infinite."""
        return not self.fit.family.conditional and not self.value.reliable and (self.value.khat or 0.0) >= 1

    @property
    def draws(self) -> int:
        return (self.d.elbo and self.d.elbo.n) or draws_in(self.fit.target.dim)

    @property
    def has_bad_weights(self) -> bool:
        draws = self.draws
        return self.d.weights_miss_mass or (
            self.d.khat is not None
            and self.d.ess is not None
            and self.d.khat > khat_limit(draws)
            and self.d.ess < MIN_SHARE_OF_DRAWS * draws
        )

    @property
    def is_followed(self) -> bool:
        """Whether nearly all importance weights are equal, so the best optimum is p."""
        is_even = (self.d.ess or 0.0) > 0.99 * self.draws
        return is_even and self.least_kl < SMALL_KL and not self.misses_modes and not self.has_bad_weights


def _is_too_small(e: _Evidence) -> bool:
    """By the value, the weights, separate optima, the gain of a richer family, or tests on unseen rows."""
    gain = e.d.richer_gain
    is_far = e.value.interval[0] > MAX_KL * e.fit.objective.curvature
    return not e.fit.masses and (
        (is_far if e.is_known else e.least_kl > MAX_KL and not e.is_forward)
        or (e.d.leaves_optima_out and e.least_kl > MAX_KL)
        or (gain is not None and gain.value > max(4 * gain.stderr, MAX_KL))
        or (e.is_forward and _is_distinguishable(e.d))
    )


def _is_distinguishable(d: Diagnostics) -> bool:
    """Whether unseen rows differ from the model's draws, significantly and by much."""
    two, calibration = d.two_sample, d.calibration
    if two is not None and two.auc is not None and two.p_value is not None:
        if two.p_value < _MAX_P_VALUE and two.auc > _MIN_AUC:
            return True
    columns = () if calibration is None else calibration.columns
    return any(one.differs_much for one in columns)


def _has_other_modes(e: _Evidence) -> bool:
    best = e.d.optima[0].loss
    several = sum(one.loss - best < MAX_LOSS_GAP for one in e.d.optima) > 1
    is_exact = e.is_known and e.value.value < SMALL_KL
    return several and not e.is_forward and not is_exact and not e.is_followed


def _has_too_few_nodes(e: _Evidence) -> bool:
    """The ELBO on fresh draws is worse than on the nodes, or doubling the nodes moved the fit."""
    elbo, overfit = e.d.elbo, False
    if elbo is not None and e.d.nodes is not None and e.fit.objective.direction == "reverse":
        excess = -e.fit.solution.best.loss - elbo.value
        overfit = math.isfinite(excess) and excess > max(MAX_KL, 1e-3 * e.fit.target.dim, 4 * elbo.stderr)
    return overfit or (e.d.node_error or 0.0) > _MAX_NODE_ERROR


@dataclass(frozen=True)
class Finding:
    """One thing that can speak against a fit."""

    holds: Callable[[_Evidence], bool]
    sentence: str
    next_step: str


FINDINGS: dict[str, Finding] = {
    "chains_disagree": Finding(
        lambda e: bool(e.fit.chains_apart),
        "The chains of the samples disagree, so that they aren't draws of one law.",
        "Run them longer, or leave out a chain that the value's notes name.",
    ),
    "family_too_small": Finding(
        _is_too_small,
        "The family can't follow the target.",
        "Try a richer one, such as {richer}.",
    ),
    "family_too_rich": Finding(
        lambda e: e.d.simpler_gain is not None and e.d.simpler_gain.value > 2 * e.d.simpler_gain.stderr,
        "A simpler family does better on unseen draws.",
        "Try {simpler}, or give more samples.",
    ),
    "other_modes_exist": Finding(
        _has_other_modes,
        "The solver found several local optima, and the fit is the best of them.",
        "Look at `fit.diagnostics.optima`, and at a richer family ({richer}).",
    ),
    "accesses_disagree": Finding(
        lambda e: e.disagree,
        "The draws don't follow the log density: Stein's identity fails on them, or they miss a mode of it (see the notes).",
        "Check that both describe one target, in the same coordinates, and that the draws have converged.",
    ),
    "heavy_tails": Finding(
        lambda e: e.has_heavy_ratio and Ends(e.fit.target).may_be_heavy,
        "The tail of the log ratio is so heavy that the divergence may be infinite.",
        "Don't rely on the value.",
    ),
    "log_density_jumps": Finding(
        lambda e: (e.d.jump or 0.0) > _MAX_JUMP,
        "Between draws of the model, log p changes by more than its gradient explains, as where it jumps (`round()`, a "
        "threshold, a table). A fit that follows the gradient can't see that, and its optimum may be elsewhere.",
        "Smooth the jumps, or correct the gradient.",
    ),
    "modes_missing": Finding(
        lambda e: e.misses_modes,
        "The target has mass at modes that the fit doesn't reach (`fit.diagnostics.missing_modes`).",
        "Try {holding}, a flow, or objective='forward_kl', which drops no mode that is found.",
    ),
    "nodes_too_few": Finding(
        _has_too_few_nodes,
        "More nodes would change the fit.",
        "Raise `max_nodes` of the solver, or use a smaller family.",
    ),
    "not_converged": Finding(
        lambda e: not e.fit.solution.best.converged,
        "The solver stopped before it met its own criterion.",
        "Let it run longer (`solver=` with more iterations, steps or epochs), or use a smaller family.",
    ),
    "not_a_number_met": Finding(
        lambda e: e.fit.target.evaluations["rejected"] > 0 or e.fit.measured.met_no_number,
        "At some points the log density was NaN or +inf, or its gradient wasn't finite, or it raised an error.",
        "Check the log density far from its mode and at cusps, and whether it still answers.",
    ),
    "not_measured": Finding(
        lambda e: bool(e.fit.measured.notes),
        "A diagnostic failed, so what it would have found isn't known: `fit.diagnostics.notes` has the diagnostic and the error.",
        "Correct the cause, and fit again.",
    ),
    "outside_support": Finding(
        lambda e: not e.is_forward and e.d.elbo is not None and e.d.elbo.value == -math.inf,
        "The log density is -inf at draws of the model, so reverse KL is infinite.",
        "Pass `support=`, or use objective='forward_kl'.",
    ),
    "point_masses": Finding(
        lambda e: bool(e.fit.masses),
        "A column has one and the same value in many rows, and its other values are continuous. No density has mass at a value: "
        "KL(p‖q) is infinite for every density q.",
        "Fit the share of these rows and the other rows apart, such as `x[x[:, 0] != 0]`.",
    ),
    "rows_too_few": Finding(
        lambda e: e.d.rows_too_few is not None,
        "The model is too rich for its rows: on unseen rows it does so much worse than on fitted ones that these rows can't show "
        "how well it does on others.",
        "Give more rows, or use {fewer}.",
    ),
    "score_not_conservative": Finding(
        lambda e: e.fit.target.line_integral is not None and e.fit.target.line_integral.is_open,
        "Integrals of the score around triangles differ from 0 by more than 0.05 nats: it isn't the gradient of a log density, "
        "and the value depends on the lines.",
        "Give a score that is a gradient, or `log_prob=`.",
    ),
    "skewed_rows": Finding(
        lambda e: e.has_heavy_ratio and not (ends := Ends(e.fit.target)).may_be_heavy and ends.is_skewed,
        "The rows are skewed: few of them, at the long end of a column, set the value, whose error is too small.",
        "Try {richer}, or give more rows.",
    ),
    "target_in_doubt": Finding(
        lambda e: e.fit.doubted_origin is not None,
        "What the target was converted from can't carry a conclusion: `print(target)` reports why.",
        "Collect more of it, or better.",
    ),
    "variances_understated": Finding(
        lambda e: e.d.understated is not None and e.d.understated >= MIN_SPREAD_RATIO,
        "By linear response, mean field makes columns too narrow, as it does if they are correlated.",
        "Use the covariance of `fit.linear_response()`, or try {richer}.",
    ),
    "weights_unreliable": Finding(
        lambda e: e.has_bad_weights or e.d.leaves_optima_out or e.misses_modes,
        "Importance weights can't repair this fit: don't reweight its draws.",
        "Use `fit.expect(f)`, which moves particles to p or explains why it can't, or try {richer}.",
    ),
}
"""Everything that can be found."""


def find(fit: JudgedFit, value: Estimate, d: Diagnostics, *, disagree: bool) -> frozenset[str]:
    """Return the names of what was found; `disagree` means that draws and log density of the target contradict each other."""
    evidence = _Evidence(fit, value, d, disagree)
    return frozenset(name for name, one in FINDINGS.items() if one.holds(evidence))


def names_richer(findings: Iterable[str]) -> bool:
    """Whether a sentence of these findings names a richer family."""
    return any("{richer}" in FINDINGS[name].next_step for name in findings)


def explain(findings: Iterable[str], family: Family, diagnostics: Diagnostics) -> tuple[str, ...]:
    """Return a sentence and the next step for each finding, in the order of their names."""
    missed = 0 if diagnostics.missing_modes is None else diagnostics.missing_modes.count
    holding = Mixture((family.count if isinstance(family, Mixture) else 1) + missed)
    larger = diagnostics.richer or str(preferred(family, diagnostics))
    fewer = "fewer components" + ("" if diagnostics.curve else ", such as `mixture:auto` chooses")
    words = {"fewer": fewer, "richer": larger, "simpler": diagnostics.simpler or simpler(family), "holding": f"`{holding}`"}
    chosen = [FINDINGS[name] for name in sorted(findings)]
    return tuple(f"{one.sentence} {one.next_step.format(**words)}" for one in chosen)


def shown_weights(ess: float, khat: float | None, draws: int | None) -> str:
    """Write k̂, and why a large one does no harm if nearly all draws count."""
    share = ess / (draws or math.inf)
    harmless = khat is not None and draws is not None and khat > khat_limit(draws) and share >= MIN_SHARE_OF_DRAWS
    return shown_khat(khat) + (f" (of a tail that hardly counts: ESS is {share:.1%})" if harmless else "")
