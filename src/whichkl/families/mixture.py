"""Mixture: a weighted sum of Gaussians, or of Student-t distributions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot
from whichkl.families.family import Family
from whichkl.families.gaussian import check_covariance, gaussian, loc_and_tril
from whichkl.families.student_t import MultivariateStudentT

SHAPES = ("full", "diagonal", "tied")
LAWS = ("gaussian", "student_t")


@dataclass(frozen=True)
class Mixture(Family):
    """q(x) = Σₖ πₖ N(x; mₖ, Σₖ) with K components, or Σₖ πₖ t(x; νₖ, mₖ, Σₖ).

    Args:
        components: K ≥ 1, or ``"auto"``: chosen on held-out samples, the curve in `fit.diagnostics.curve`.
        covariance: ``"full"`` or ``"diagonal"``, for every component its own, or ``"tied"``: one full Σ for all.
        law: what the components are: ``"gaussian"`` or ``"student_t"``, which stands outliers.

    Raises:
        InputError: K isn't a whole number of at least 1 or ``"auto"``, or another word for `covariance` or `law`.

    >>> Mixture(3)
    Mixture(components=3, covariance='full', law='gaussian')
    """

    components: int | str
    covariance: str = "full"
    law: str = "gaussian"

    def __post_init__(self) -> None:
        """Check the fields."""
        is_count = isinstance(self.components, int) and not isinstance(self.components, bool)
        if self.components != "auto" and not (is_count and self.count >= 1):
            because = "the number of components must be a whole number of at least 1, or 'auto'"
            raise InputError(cannot(f"use `Mixture({self.components!r})`", because, "Give, say, Mixture(2)"))
        check_covariance(self.covariance, SHAPES)
        if self.law not in LAWS:
            because = "components of that law can't be mixed here"
            raise InputError(cannot(f"use `law={self.law!r}`", because, f"Choose among {', '.join(map(repr, LAWS))}"))

    @property
    def count(self) -> int:
        """K.

        Raises:
            InputError: it is still to be chosen.
        """
        if isinstance(self.components, str):
            raise InputError(cannot(f"use `{self}` here", "its number of components is still open", "Give a number"))
        return self.components

    @property
    def label(self) -> str:
        """Such as ``"a mixture of 3 full Gaussians"``."""
        many = self.components != 1
        word = {"gaussian": "Gaussian", "student_t": "Student-t"}[self.law]
        tied = " with one covariance" if self.covariance == "tied" else ""
        shape = "full" if self.covariance == "tied" else self.covariance
        number = "some" if isinstance(self.components, str) else self.components
        return f"a mixture of {number} {shape} {word}{'s' * (many and word == 'Gaussian')}{tied}"

    def minimum_rows(self, dim: int) -> int:
        """Return K times what one component needs; with a tied covariance, what it needs and a row for each further mean."""
        one = 2 if self.covariance == "diagonal" else dim + 1
        return one + self._least - 1 if self.covariance == "tied" else self._least * one

    @property
    def _least(self) -> int:
        return 1 if isinstance(self.components, str) else self.components

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
    """Return π (K,), means (K, d), Cholesky factors (K, d, d) and, of Student-t, ν (K,), of a mixture.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(model, MixtureSameFamily):
        because = f"it is a `{type(model).__name__}`"
        raise InputError(cannot("read a mixture from this model", because, "Use a MixtureSameFamily of Gaussians"))
    parts, probs = model.component_distribution, model.mixture_distribution.probs
    if isinstance(parts, MultivariateStudentT):
        return probs, parts.loc, parts.scale_tril, parts.df
    return (probs, *loc_and_tril(parts), None)
