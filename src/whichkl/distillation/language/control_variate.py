"""Control variate: a mean of sums over drawn tokens, Rao-Blackwellised and corrected by what the draws missed by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_FOLDS = 10


@dataclass(frozen=True)
class PromptMeans:
    """Means over the draws of each prompt: sums of conditional KLs, of log ratios at the drawn tokens, and of tokens."""

    conditional: Float[Tensor, " n"]
    log_ratio: Float[Tensor, " n"]
    tokens: Float[Tensor, " n"]

    @classmethod
    def of(cls, prompt: Int[Tensor, " m"], *sums: Float[Tensor, " m"]) -> PromptMeans:
        """Average the draws of each prompt: the three fields, a number per draw."""
        count = torch.bincount(prompt)
        return cls(*(torch.bincount(prompt, one.double(), len(count)) / count for one in sums))

    def per_sequence(self) -> tuple[float, float]:
        """Return the mean of the sums, and its standard error, with the prompts as independent units."""
        corrected = self._corrected(self.conditional)
        return float(corrected.mean()), float(corrected.std()) / math.sqrt(len(corrected))

    def per_token(self) -> tuple[float, float]:
        """Return the ratio of the sums to the tokens, and its standard error by linearisation."""
        tokens, rough = self.tokens.mean(), self.conditional.mean() / self.tokens.mean()
        corrected = self._corrected(self.conditional - rough * self.tokens) + rough * self.tokens
        ratio = corrected.mean() / tokens
        return float(ratio), float((corrected - ratio * self.tokens).std() / tokens) / math.sqrt(len(corrected))

    def _corrected(self, y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return y + b M, where M = log ratio − conditional has mean 0, with b = −Cov(y, M) / Var(M) of the other folds.

        b = 0 is Rao-Blackwellisation, b = 1 plain Monte Carlo; each has the smaller variance on some pairs of models.
        """
        missed = self.log_ratio - self.conditional
        fold = torch.arange(len(y), device="cpu") % _FOLDS
        corrected = y.clone()
        for k in range(min(_FOLDS, len(y))):
            rest = fold != k
            m, other = missed[rest] - missed[rest].mean(), y[rest] - y[rest].mean()
            variance = float(m.square().sum())
            slope = -float((other * m).sum()) / variance if variance > 0 else 0.0
            corrected[~rest] += slope * missed[~rest]
        return corrected
