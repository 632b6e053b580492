"""Control variate: a mean of sums over drawn tokens, Rao-Blackwellised and corrected by what the draws missed by chance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.distillation.language.clusters import ratio_of_sums

_FOLDS = 10
_MIN_FREEDOM = 25
"""Degrees of freedom below which a coefficient would add more noise than it removes."""


@dataclass(frozen=True)
class PromptSums:
    """A number per draw: sums of conditional KLs, of log ratios at the drawn tokens, and of tokens; and the draw's prompt."""

    prompt: Int[Tensor, " m"]
    """Numbers from 0 on, each of which occurs."""
    conditional: Float[Tensor, " m"]
    log_ratio: Float[Tensor, " m"]
    tokens: Float[Tensor, " m"]

    def per_sequence(self) -> tuple[float, float]:
        """Return the mean of the sums, and its standard error, with the prompts as independent units."""
        return self._per(torch.ones_like(self.conditional))

    def per_token(self) -> tuple[float, float]:
        """Return the ratio of the sums to the tokens, and its standard error by linearisation."""
        return self._per(self.tokens.double())

    def _per(self, units: Float[Tensor, " m"]) -> tuple[float, float]:
        rough = self.conditional.sum() / units.sum()
        corrected = self._corrected(self.conditional - rough * units) + rough * units
        if float(corrected.sum()) < 0:  # no KL is: only the correction can be so large
            corrected = self.conditional
        return ratio_of_sums(*(torch.bincount(self.prompt, one.double()) for one in (corrected, units)))

    def _corrected(self, y: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return y + b M, where M = log ratio − conditional has mean 0 after each prompt, with the b of the other folds.

        b = −Cov(y, M) / Var(M) of the draws of the same prompt, since differences between prompts are no error of M; over all
        prompts where most have one draw; and 0 where there is too little of both. b = 0 is Rao-Blackwellisation, b = 1 plain
        Monte Carlo; each has the smaller variance on some pairs of models.
        """
        missed, fold = self.log_ratio - self.conditional, torch.empty_like(self.prompt)
        # the draws of a prompt are spread over the folds
        fold[self.prompt.argsort(stable=True)] = torch.arange(len(y), device="cpu") % _FOLDS
        corrected = y.clone()
        for k in range(min(_FOLDS, len(y))):
            rest = fold != k
            corrected[~rest] += _coefficient(y[rest], missed[rest], self.prompt[rest]) * missed[~rest]
        return corrected


def _coefficient(y: Float[Tensor, " m"], missed: Float[Tensor, " m"], prompt: Int[Tensor, " m"]) -> float:
    prompts = len(prompt.unique())
    within = len(y) - prompts
    if max(within, prompts - 1) < _MIN_FREEDOM:
        return 0.0
    if within < _MIN_FREEDOM:
        prompt = torch.zeros_like(prompt)
    m, other = (one - (torch.bincount(prompt, one) / torch.bincount(prompt).clamp(1))[prompt] for one in (missed, y))
    variance = float(m.square().sum())
    return -float((other * m).sum()) / variance if variance > 0 else 0.0
