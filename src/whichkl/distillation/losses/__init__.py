"""Losses for distillation: divergences between rows of logits, and penalties on sampled tokens."""

from whichkl.distillation.losses.linear import linear_divergence
from whichkl.distillation.losses.logits import of_logits
from whichkl.distillation.losses.penalties import kl_estimate, kl_penalty_loss
from whichkl.distillation.losses.rows import (
    DIVERGENCES,
    Entry,
    adaptive_kl,
    divergence_named,
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
from whichkl.distillation.losses.stored_rows import SampledTokens, TopK
from whichkl.divergences.kinds import AdaptiveKL as RowAdaptiveKL
from whichkl.divergences.kinds import ForwardKLDivergence as RowForwardKL
from whichkl.divergences.kinds import InterpolatedKL as RowInterpolatedKL
from whichkl.divergences.kinds import JeffreysDivergence as RowJeffreys
from whichkl.divergences.kinds import JensenShannonDivergence as RowJensenShannon
from whichkl.divergences.kinds import RenyiDivergence as RowRenyi
from whichkl.divergences.kinds import ReverseKLDivergence as RowReverseKL
from whichkl.divergences.kinds import RowDivergence
from whichkl.divergences.kinds import SkewForwardKLDivergence as RowSkewForwardKL
from whichkl.divergences.kinds import SkewReverseKLDivergence as RowSkewReverseKL
from whichkl.divergences.kinds import TotalVariation as RowTotalVariation

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
