"""Margins of whole numbers: Bernoulli, Poisson and categorical."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families.atoms import Coin, Counts, codes
from whichkl.families.margins import Margin, Sums
from whichkl.families.value_ranges import BITS, COUNTS, codes_of


class BernoulliMargin(Margin):
    """0 or 1; the probability of 1 is their mean."""

    name, values = "bernoulli", BITS
    distribution, parameter_names = Coin, ("probs",)

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w x."""
        return {"total": w @ x}

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """Return the mean."""
        return {"probs": (sums["total"] / sums["weight"]).clamp(0, 1)}


class PoissonMargin(Margin):
    """λˣ exp(−λ) / x!: λ is the mean."""

    name, values = "poisson", COUNTS
    distribution, parameter_names = Counts, ("rate",)

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return Σ w x."""
        return {"total": w @ x}

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """Return the mean."""
        return {"rate": sums["total"] / sums["weight"]}


class CategoricalMargin(Margin):
    """Categories 0 … K−1 and their frequencies.

    Args:
        categories: K; None for one more than the largest code, where every code below must occur.
        smoothing: the number of rows that are added to every category.
    """

    name, parameter_names = "categorical", ("probs",)

    def __init__(self, categories: int | None = None, smoothing: float = 0.0) -> None:
        """Keep both."""
        self.categories, self.smoothing = categories, smoothing
        self.values = codes_of(categories)

    def sums(self, x: Tensor, w: Tensor, origin: Tensor) -> Sums:
        """Return the weight of each code and the number of its rows; a later block may have more codes."""
        code, least = x.long(), self.categories or 0
        return {
            "counts": torch.bincount(code, weights=w, minlength=least),
            "seen": torch.bincount(code, minlength=least),
        }

    def fitted(self, sums: Mapping[str, Tensor], origin: Tensor, column: str) -> dict[str, Tensor]:
        """Return the frequencies (n_k + s) / (n + s K), with s the smoothing."""
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
        return {"probs": share / share.sum()}

    def parameters(self, law: Distribution) -> dict[str, Tensor]:
        """Return `probs` (K,)."""
        logits: Tensor = law.logits  # type: ignore[attr-defined]
        return {"probs": logits.exp()}

    def law(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the law of categories."""
        return codes(parameters["probs"])

    def count_parameters(self, x: Tensor) -> int:
        """One less than the number of codes that occur."""
        return len(x.unique()) - 1
