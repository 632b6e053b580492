"""Margins of whole numbers: Bernoulli, Poisson and categorical."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families.atoms import Coin, Counts, codes
from whichkl.families.margins import Margin, Sums

MOST_CATEGORIES = 1_000_000


class BernoulliMargin(Margin):
    """0 or 1; the probability of 1 is their mean."""

    name = "bernoulli"
    takes = "0 and 1"
    discrete = True
    free = 1

    def allows(self, values: Tensor) -> Tensor:
        """0 and 1."""
        return (values == 0) | (values == 1)

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w x."""
        return {"total": w @ values}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return the law of this mean."""
        return Coin(probs=(sums["total"] / sums["weight"]).clamp(0, 1), validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `probs`, the probability of 1."""
        return {"probs": law.mean}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the Bernoulli law."""
        return Coin(probs=parameters["probs"], validate_args=False)


class PoissonMargin(Margin):
    """λˣ exp(−λ) / x!: λ is the mean."""

    name = "poisson"
    takes = "whole numbers from 0"
    discrete = True
    free = 1

    def allows(self, values: Tensor) -> Tensor:
        """Whole numbers from 0."""
        return values.isfinite() & (values >= 0) & (values == values.round())

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w x."""
        return {"total": w @ values}

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return the law of this mean."""
        return Counts(sums["total"] / sums["weight"], validate_args=False)

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `rate`."""
        return {"rate": law.mean}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the Poisson law."""
        return Counts(parameters["rate"], validate_args=False)


@dataclass(frozen=True)
class CategoricalMargin(Margin):
    """Categories 0 … K−1 and their frequencies.

    Args:
        categories: K; None for one more than the largest code, where every code below must occur.
        smoothing: how many further rows every category is counted as having.
    """

    categories: int | None = None
    smoothing: float = 0.0
    name = "categorical"
    takes = "whole numbers from 0 to K − 1, the codes of K categories"
    discrete = True

    def allows(self, values: Tensor) -> Tensor:
        """Whole numbers from 0 to K − 1."""
        most = self.categories or MOST_CATEGORIES
        return (values >= 0) & (values < most) & (values == values.round())

    def sums(self, values: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return the weight of each code, and how often it was seen; a later block may know more codes."""
        code = values.long()
        return {
            "counts": torch.bincount(code, weights=w, minlength=self.categories or 0),
            "seen": torch.bincount(code, minlength=self.categories or 0),
        }

    def law(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> Distribution:
        """Return the law of these frequencies: (n_k + s) / (n + s K), with s the smoothing."""
        missing = (sums["seen"] == 0).nonzero().flatten().tolist()
        if missing and self.categories is None:
            top, first = len(sums["seen"]) - 1, ", ".join(str(code) for code in missing[:5]) + ", …" * (len(missing) > 5)
            because = f"its codes go to {top}, and {first} {'never occurs' if len(missing) == 1 else 'never occur'}"
            instead = (
                f"Recode it (torch.unique(x, return_inverse=True)), or use Categorical(categories={top + 1}) "
                "if these are categories that happen not to occur"
            )
            self.refuse(column, because, instead)
        share = sums["counts"] / sums["weight"] * sums["rows"] + self.smoothing
        return codes(share / share.sum())

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `probs` (K,)."""
        logits: Tensor = law.logits  # type: ignore[attr-defined]
        return {"probs": logits.exp()}

    def rebuild(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the law of categories."""
        return codes(parameters["probs"])
