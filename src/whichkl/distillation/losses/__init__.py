"""Losses for distillation: divergences between rows of logits, and penalties on tokens drawn; one source of truth for each."""

from whichkl.distillation.losses.adaptive import RowAdaptiveKL, RowInterpolatedKL
from whichkl.distillation.losses.kinds import (
    RowForwardKL,
    RowJeffreys,
    RowJensenShannon,
    RowRenyi,
    RowReverseKL,
    RowSkewForwardKL,
    RowSkewReverseKL,
    RowTotalVariation,
)
from whichkl.distillation.losses.linear import linear_divergence
from whichkl.distillation.losses.logits import of_logits
from whichkl.distillation.losses.partial_teacher import SampledTokens, TopK
from whichkl.distillation.losses.penalties import kl_estimate, kl_penalty_loss
from whichkl.distillation.losses.registry import DIVERGENCES, Entry, divergence_named
from whichkl.distillation.losses.row_divergence import RowDivergence
from whichkl.distillation.losses.rows import (
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
