"""Multiplier errors: the Monte Carlo error of λ, of KL(q‖r) and of log Z where a projection rests on draws of a density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.conversions.projection import Dual, Projection

_MAX_SHOWN = 8


@dataclass(frozen=True)
class MultiplierErrors:
    """Standard errors of a projection."""

    multipliers: tuple[float, ...]
    """Of λ."""
    kl: float
    """Of KL(q‖r), in nats."""
    log_z: float
    """Of log ∫ r exp(λ·f), in nats, from that of λ alone."""

    def shown(self, found: Projection) -> str:
        """Return a sentence on KL(q‖r) and λ with their errors; those that are 0 aren't in it."""
        pairs = list(zip(found.multipliers.tolist(), self.multipliers, strict=True))
        shown = ", ".join(_with_error(value, stderr, 5) for value, stderr in pairs[:_MAX_SHOWN])
        shown += ", …" if len(pairs) > _MAX_SHOWN else ""
        return f"KL(q‖r) is {_with_error(found.kl, self.kl, 4)} nats, with λ = ({shown})."


def multiplier_errors(dual: Dual, log_r: Float[Tensor, " n"], found: Projection, islands: int | None) -> MultiplierErrors:
    """Return the standard errors of a projection on draws of r, by the delta method.

    With weights q of the draws, a draw moves the gradient of the dual, E_q f − m + s² λ, by q (f − E_q f), and λ by the inverse
    of its Hessian, Cov_q f + s², times this. KL(q‖r) = −D − ½ Σ s² λ² and log Z move with λ, and D also with the draw itself.

    Args:
        dual: f at the draws.
        log_r: natural logs of the draws' weights.
        found: the projection on them.
        islands: the number of groups of neighbouring rows that are independent; None where all rows are.
    """
    f, q, r = dual.f, found.log_weights.exp(), torch.softmax(log_r, 0)
    square, mean = dual.stderr.square(), q @ f
    apart = q[:, None] * (f - mean)
    hessian = apart.T @ (f - mean) + torch.diag(square)
    moved = -apart @ torch.linalg.pinv(hessian, hermitian=True)
    kl = -(q - r) - moved @ (square * found.multipliers)
    terms = torch.cat([moved, kl[:, None], (moved @ mean)[:, None]], 1)
    if islands is not None:
        terms = terms.view(islands, -1, terms.shape[1]).sum(1)
    size = (terms.square().sum(0) * (len(terms) / (len(terms) - 1))).sqrt().tolist()
    return MultiplierErrors(tuple(size[:-2]), size[-2], size[-1])


def _with_error(value: float, stderr: float, digits: int) -> str:
    """Write a number with its error, to the places that the error allows, or to some digits if the error is 0."""
    if not 0 < stderr < math.inf:
        return f"{value:.{digits}g}"
    places = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{places}f} ± {stderr:.{places}f}"
