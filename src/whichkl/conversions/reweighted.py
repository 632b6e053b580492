"""Reweighted: the log density of a reference plus another term, differentiable where both are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access
from whichkl.arrays import tensor_of
from whichkl.process.torch_modes import autograd_on
from whichkl.targets import Target


class Reweighted:
    """x ↦ log r(x) + t(x).

    Args:
        reference: r, a target with a log density.
        term: t, (n, d) → (n,) or (n, k), which is summed; of tensors or of arrays.
    """

    def __init__(self, reference: Target, term: Callable[[Tensor], Any]) -> None:
        self.reference, self.term = reference, term
        self.differentiable = Access.DIFFERENTIABLE in reference.access and self._takes_gradients()

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return the log density at each row."""
        point = x if self.differentiable else x.detach()
        whole: Tensor = self.reference.log_prob(point) + tensor_of(self.term(point)).to(x)
        return whole if self.differentiable else whole.detach()

    def _takes_gradients(self) -> bool:
        """Whether the term takes tensors, and gradients flow through it."""
        point = self.reference.bijection.inside(self.reference.dtype, self.reference.device)
        try:
            with autograd_on():
                found = self.term(point.requires_grad_(True))
                return isinstance(found, Tensor) and found.requires_grad
        except Exception:  # a function of arrays
            return False
