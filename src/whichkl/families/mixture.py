"""Mixture: a weighted sum of Gaussians, or of Student-t distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot
from whichkl.families.family import Family
from whichkl.families.field_checks import check_choice, check_whole, expect
from whichkl.families.gaussian import gaussian, loc_and_tril
from whichkl.families.student_t import MultivariateStudentT

SHAPES = ("full", "diagonal", "tied")
LAWS = ("gaussian", "student_t")


@dataclass(frozen=True)
class Mixture(Family):
    """q(x) = Σₖ πₖ N(x; mₖ, Σₖ) with K components, or Σₖ πₖ t(x; νₖ, mₖ, Σₖ).

    Args:
        components: K ≥ 1, or ``"auto"``: chosen on held-out samples, with the curve in `fit.diagnostics.curve`.
        covariance: ``"full"`` or ``"diagonal"``: every component has its own; or ``"tied"``: all share one full Σ.
        law: of the components: ``"gaussian"`` or ``"student_t"``, which tolerates outliers.

    Raises:
        InputError: K isn't a whole number of at least 1 or ``"auto"``, or another word for `covariance` or `law`.

    >>> Mixture(3)
    Mixture(components=3, covariance='full', law='gaussian')
    """

    components: int | str
    covariance: str = "full"
    law: str = "gaussian"

    def __post_init__(self) -> None:
        if not isinstance(self.components, str) or self.components != "auto":
            check_whole(self, "components", "Give, say, components=2, or components='auto'")
        check_choice(self, "covariance", SHAPES)
        check_choice(self, "law", LAWS)

    @property
    def count(self) -> int:
        """K."""
        if isinstance(self.components, str):
            raise InputError(cannot(f"use `{self}` here", "its number of components hasn't been chosen", "Give a number"))
        return self.components

    @property
    def label(self) -> str:
        """Such as ``"a mixture of 3 full Gaussians"``."""
        word = "Student-t" if self.law == "student_t" else "Gaussian" + "s" * (self.components != 1)
        shape = "full" if self.covariance == "tied" else self.covariance
        number = "some" if self.components == "auto" else self.components
        return f"a mixture of {number} {shape} {word}{' with one covariance' * (self.covariance == 'tied')}"

    def minimum_rows(self, dim: int) -> int:
        """Return K times the rows of one component; with a tied covariance, those of one and a row per further mean."""
        count = 1 if isinstance(self.components, str) else self.components
        one = 2 if self.covariance == "diagonal" else dim + 1
        return one + count - 1 if self.covariance == "tied" else count * one

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return `probs` (K,), `loc` (K, d), `scale_tril` (K, d, d) and, for Student-t, `df` (K,)."""
        probs, loc, tril, df = mixture_parts(model)
        return {"probs": probs, "loc": loc, "scale_tril": tril} | ({} if df is None else {"df": df})

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from what `parameters` gives."""
        p = parameters
        return mixture(p["probs"], p["loc"], p["scale_tril"], self.covariance, p.get("df"))


def mixture(probs: Tensor, loc: Tensor, tril: Tensor, covariance: str, df: Tensor | None = None) -> MixtureSameFamily:
    """Build the torch distribution Σ πₖ N(mₖ, LₖLₖᵀ), or of Student-t with ν = df."""
    weights = Categorical(probs=probs, validate_args=False)
    if df is not None:
        parts: Distribution = MultivariateStudentT(df, loc, tril, validate_args=False)
    else:
        parts = gaussian(loc, tril, "diagonal" if covariance == "diagonal" else "full")
    return MixtureSameFamily(weights, parts, validate_args=False)


def mixture_parts(model: Distribution) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return π (K,), means (K, d), Cholesky factors (K, d, d) and ν (K,) of Student-t components (else None) of a mixture."""
    mixed = expect(model, MixtureSameFamily, "a mixture", "Use a MixtureSameFamily of Gaussians")
    parts, probs = mixed.component_distribution, mixed.mixture_distribution.probs
    if isinstance(parts, MultivariateStudentT):
        return probs, parts.loc, parts.scale_tril, parts.df
    return (probs, *loc_and_tril(parts), None)


def components(model: Distribution) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the same of a mixture or a single Gaussian, K = 1."""
    if isinstance(model, MixtureSameFamily):
        return mixture_parts(model)
    loc, tril = loc_and_tril(model)
    return torch.ones_like(loc[:1]), loc[None], tril[None], None
