"""Trust: one sentence on what to use in place of p, which stands first wherever a fit is shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whichkl.importance import MIN_SHARE_OF_DRAWS, khat_limit, shown_khat

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit

_BROKEN = {
    "accesses_disagree": "the draws and the log density of the target contradict each other",
    "chains_disagree": "the chains that drew the samples disagree",
    "score_not_conservative": "the score isn't the gradient of a log density",
    "outside_support": "it puts mass where p has none",
    "target_in_doubt": "what the target was converted from can't carry a conclusion",
    "not_converged": "the solver stopped too early",
    "point_masses": "many rows have one and the same value, which no density gives them",
}
"""Findings that leave nothing to use, in the order in which they matter."""


def trust(fit: Fit) -> str:
    """Say whether to use q, its draws corrected by importance weights, or neither."""
    d, findings = fit.diagnostics, fit.findings
    for name, why in _BROKEN.items():
        if name in findings:
            return f"Use neither the fit nor its corrected draws yet: {why}."
    if d.ess is not None and d.elbo is not None and d.elbo.n:
        return _by_weights(fit, d.ess / d.elbo.n, d.khat, d.elbo.n)
    if "modes_missing" in findings:
        return "Don't use the fit for p: it misses modes of p."
    if not fit.value.reliable and d.held_out is None and d.two_sample is None and fit.value.up_to is not None:
        return "Nothing was checked on unseen draws: check the fit before you use it."
    if "rows_too_few" in findings:
        return "Don't rely on the fit yet: these rows are too few to show how well so rich a model does on others."
    if "family_too_small" in findings:
        return "Use the fit as a rough picture only: unseen draws of p differ from it, and without log p it can't be corrected."
    if not fit.value.reliable:
        return "Use the fit with care: its value isn't reliable."
    if "family_too_rich" in findings:
        return "Use a simpler family, which does better on unseen draws."
    if fit.value.value == math.inf:
        return "Don't use the fit for new rows: some that it hasn't seen are impossible under it."
    if findings:
        return "Use the fit: apart from what the findings say."
    doubts = [name for name, test in (("a classifier", d.two_sample), ("calibration", d.calibration)) if test and test.differs]
    if doubts:
        return f"Use the fit where small differences don't matter: {' and '.join(doubts)} can tell it from unseen rows."
    return f"Use the fit: nothing that was checked on unseen draws speaks against it{_few_rows(fit)}."


def _few_rows(fit: Fit) -> str:
    """Say how few rows of equal weight the unseen ones are worth, if it is less than half of them."""
    n, ess = fit.value.n, fit.value.ess
    return "" if n is None or ess is None or 2 * ess >= n else f", but these {n:,} rows are worth only {ess:,.0f} of equal weight"


def _by_weights(fit: Fit, share: float, khat: float | None, draws: int) -> str:
    known = f"{share:.0%} of its draws count when they are reweighted to p, PSIS k̂ {shown_khat(khat)}"
    if fit.findings & {"modes_missing"} or fit.diagnostics.leaves_optima_out:
        missed = "it misses mass of p that its draws don't reach"
        return f"Use neither the fit nor its weights: corrected draws move particles to p, or say why they can't ({missed})."
    if fit.diagnostics.weights_miss_mass:
        missed = f"at least {fit.diagnostics.beyond or 0.0:.0%} of p lies where its draws hardly come"
        return f"Use neither the fit nor its weights: corrected draws move particles to p, or say why they can't ({missed})."
    if share >= MIN_SHARE_OF_DRAWS:
        return f"Use the fit: it is close to p wherever it reaches ({known})."
    if (khat if khat is not None else math.inf) <= khat_limit(draws):
        return f"Use the corrected draws and expectations, not the fit itself: the weights can be trusted ({known})."
    return f"Use neither the fit nor its weights: corrected draws move particles to p, or say why they can't ({known})."
