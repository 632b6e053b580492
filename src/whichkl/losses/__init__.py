"""Losses for distillation: divergences between rows of logits, and penalties on tokens drawn; one source of truth for each."""

from whichkl.losses.adaptive import RowAdaptiveKL, RowInterpolatedKL
from whichkl.losses.kinds import (
    RowForwardKL,
    RowJeffreys,
    RowJensenShannon,
    RowRenyi,
    RowReverseKL,
    RowSkewForwardKL,
    RowSkewReverseKL,
    RowTotalVariation,
)
from whichkl.losses.linear import linear_divergence
from whichkl.losses.logits import of_logits
from whichkl.losses.partial_teacher import SampledTokens, TopK
from whichkl.losses.penalties import kl_estimate, kl_penalty_loss
from whichkl.losses.registry import DIVERGENCES, Entry, divergence_named
from whichkl.losses.row_divergence import RowDivergence
from whichkl.losses.rows import (
    adaptive_kl,
    forward_kl,
    interpolated_kl,
    jeffreys,
    jensen_shannon,
    renyi,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)

__all__ = [
    "DIVERGENCES",
    "Entry",
    "RowAdaptiveKL",
    "RowDivergence",
    "RowForwardKL",
    "RowInterpolatedKL",
    "RowJeffreys",
    "RowJensenShannon",
    "RowRenyi",
    "RowReverseKL",
    "RowSkewForwardKL",
    "RowSkewReverseKL",
    "RowTotalVariation",
    "SampledTokens",
    "TopK",
    "adaptive_kl",
    "divergence_named",
    "forward_kl",
    "interpolated_kl",
    "jeffreys",
    "jensen_shannon",
    "kl_estimate",
    "kl_penalty_loss",
    "linear_divergence",
    "of_logits",
    "renyi",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]
