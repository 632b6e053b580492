"""Mixture: a weighted sum of Gaussians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from whichkl._checks import InputError, cannot
from whichkl.families.family import NodeFamily
from whichkl.families.gaussian import (
    Covariance,
    check_covariance,
    gaussian,
    loc_and_tril,
    pack_gaussian,
    size,
    unpack_gaussian,
)


@dataclass(frozen=True)
class Mixture(NodeFamily):
    """q(x) = Σₖ πₖ N(x; mₖ, Σₖ) with K components.

    Args:
        components: K ≥ 1.
        covariance: ``"full"`` or ``"diagonal"``, for every component its own.

    Raises:
        InputError: K isn't a whole number of at least 1, or another word for `covariance`.

    >>> Mixture(3)
    Mixture(components=3, covariance='full')
    """

    components: int
    covariance: Covariance = "full"

    def __post_init__(self) -> None:
        """Check both fields."""
        if isinstance(self.components, bool) or not isinstance(self.components, int) or self.components < 1:
            because = "the number of components must be a whole number of at least 1"
            raise InputError(cannot(f"use `Mixture({self.components!r})`", because, "Give, say, Mixture(2)"))
        check_covariance(self.covariance)

    @property
    def label(self) -> str:
        """Such as ``"a mixture of 3 full Gaussians"``."""
        return f"a mixture of {self.components} {self.covariance} Gaussian{'s' * (self.components > 1)}"

    def minimum_rows(self, dim: int) -> int:
        """Return K times what one component needs."""
        return self.components * (dim + 1 if self.covariance == "full" else 2)

    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return `probs` (K,), `loc` (K, d) and `scale_tril` (K, d, d)."""
        probs, loc, tril = mixture_parts(model)
        return {"probs": probs, "loc": loc, "scale_tril": tril}

    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model from `probs`, `loc` and `scale_tril`."""
        return mixture(parameters["probs"], parameters["loc"], parameters["scale_tril"], self.covariance)

    def pack(self, model: Distribution) -> Float[Tensor, " k"]:
        """Write log π, then each component as a Gaussian does."""
        probs, loc, tril = mixture_parts(model)
        each = [pack_gaussian(m, s, self.covariance) for m, s in zip(loc, tril, strict=True)]
        return torch.cat([probs.log(), *each])

    def unpack(self, theta: Float[Tensor, " k"], dim: int) -> Distribution:
        """Read the vector that `pack` writes; π is the softmax of its first K entries."""
        logits, rest = theta[: self.components], theta[self.components :].reshape(self.components, -1)
        if rest.shape[1] != size(dim, self.covariance):
            raise InputError(cannot("read the mixture", f"{len(theta)} numbers don't fit dimension {dim}", "Pack it anew"))
        parts = [unpack_gaussian(one, dim, self.covariance) for one in rest]
        loc, tril = torch.stack([m for m, _ in parts]), torch.stack([s for _, s in parts])
        return mixture(logits.softmax(0), loc, tril, self.covariance)

    def nodes(
        self, model: Distribution, z: Float[Tensor, "m d"], w: Float[Tensor, " m"]
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
        """Return the same nodes under every component, weighted by πₖ (stratified)."""
        probs, loc, tril = mixture_parts(model)
        x = loc[:, None] + torch.einsum("kij,mj->kmi", tril, z)
        return x.reshape(-1, z.shape[1]), (probs[:, None] * w).reshape(-1)

    def affine(self, model: Distribution, shift: Float[Tensor, " d"], scale: Float[Tensor, "d d"]) -> Distribution:
        """Carry every component over; the weights stay."""
        probs, loc, tril = mixture_parts(model)
        return mixture(probs, shift + loc @ scale.T, scale @ tril, self.covariance)

    def whitening(self, model: Distribution) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """Return the mean and the Cholesky factor of the covariance of the whole mixture."""
        probs, loc, tril = mixture_parts(model)
        mean = probs @ loc
        apart = loc - mean
        covariance = torch.einsum("k,kij,klj->il", probs, tril, tril) + torch.einsum("k,ki,kj->ij", probs, apart, apart)
        if self.covariance == "diagonal":
            return mean, torch.diag(covariance.diagonal().sqrt())
        return mean, torch.linalg.cholesky(covariance)


def mixture(probs: Tensor, loc: Tensor, tril: Tensor, covariance: Covariance) -> MixtureSameFamily:
    """Build the torch distribution Σ πₖ N(mₖ, LₖLₖᵀ)."""
    weights = Categorical(probs=probs, validate_args=False)
    return MixtureSameFamily(weights, gaussian(loc, tril, covariance), validate_args=False)


def mixture_parts(model: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """Return π (K,), means (K, d) and Cholesky factors (K, d, d) of a mixture of Gaussians.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(model, MixtureSameFamily):
        because = f"it is a `{type(model).__name__}`"
        raise InputError(cannot("read a mixture from this model", because, "Use a MixtureSameFamily of Gaussians"))
    return (model.mixture_distribution.probs, *loc_and_tril(model.component_distribution))
