"""Diagnostics: whether a fit worked, on draws that it hasn't seen, and what to do where it didn't."""

from whichkl.diagnostics.columns import next_richer
from whichkl.diagnostics.consistency import stein_terms
from whichkl.diagnostics.findings import FINDINGS, explain, shown_weights
from whichkl.diagnostics.judge import judge
from whichkl.diagnostics.judged_fit import JudgedFit
from whichkl.diagnostics.linear_response import linear_response
from whichkl.diagnostics.models import carried, model_target, reference_around
from whichkl.diagnostics.result import Diagnostics, Judgement, MissingModes
from whichkl.diagnostics.unseen_rows import cross_fitted_losses, stride_of

__all__ = [
    "FINDINGS",
    "Diagnostics",
    "JudgedFit",
    "Judgement",
    "MissingModes",
    "carried",
    "cross_fitted_losses",
    "explain",
    "judge",
    "linear_response",
    "model_target",
    "next_richer",
    "reference_around",
    "shown_weights",
    "stein_terms",
    "stride_of",
]
