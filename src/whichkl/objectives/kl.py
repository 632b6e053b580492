"""KL: the two directions, forward and reverse, and their weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access, Requirement
from whichkl.divergences import kinds
from whichkl.objectives.objective import DRAWS_AND_LOG_P, Objective, Ratios, UpTo, check_weight


class ForwardKL(Objective):
    """KL(p‖q) = −∫ p log q − H(p): maximum likelihood.

    Its samples come from p, so q must put mass wherever p does: it covers mass. Only the cross-entropy depends on
    q, so samples suffice for the fit; the value needs p's density.

    Source: Kullback & Leibler (1951); as maximum likelihood, Akaike (1973).
    """

    name = "forward_kl"
    title = "Forward KL"
    formula = "KL(p‖q) = E_p[log p − log q]"
    character = "mass-covering: q must put mass wherever p does"
    direction = "forward"
    requires = Requirement(Access.SAMPLES, Access.SAMPLER)
    requires_of_model = Requirement(Access.LOG_PROB)
    reads_q = False
    log_z_share = 1.0
    kind = kinds.ForwardKLDivergence

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return Σ w_p ℓ.

        >>> import torch
        >>> one = torch.ones(1)
        >>> ForwardKL().loss(2 * one, one, one[:0], one[:0])
        tensor(2.)
        """
        return at_p @ w_p

    def reason(self, access: Access) -> str:
        """Return that draws of p are available for the expectation under p."""
        return (
            "its expectation is under p, whose draws you have; minimising it is maximum likelihood (the entropy of p "
            "doesn't depend on q)"
        )

    def up_to(self, access: Access) -> UpTo:
        """Return H(p) where p can't be evaluated, log Z where p is unnormalised."""
        if Access.LOG_PROB not in access:
            return "entropy_p"
        return None if Access.NORMALIZED in access else "log_z"


class ReverseKL(Objective):
    """KL(q‖p) = E_q[log q − log p] = −ELBO + log Z: variational inference.

    Its samples come from q, so p's unnormalised log density suffices. It tends to seek modes where p's modes are far
    apart for the family; it covers modes that are close.

    Source: Jordan, Ghahramani, Jaakkola & Saul (1999).
    """

    name = "reverse_kl"
    title = "Reverse KL"
    formula = "KL(q‖p) = E_q[log q − log p] = −ELBO + log Z"
    character = "tends to mode-seeking: q avoids places where p has no mass"
    direction = "reverse"
    requires = Requirement(Access.LOG_PROB, Access.SCORE)
    reads_p = False
    log_z_share = -1.0
    kind = kinds.ReverseKLDivergence

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return −Σ w_q ℓ: −ELBO where p is unnormalised.

        >>> import torch
        >>> one = torch.ones(1)
        >>> ReverseKL().loss(one[:0], one[:0], -3 * one, one)
        tensor(3.)
        """
        return -(at_q @ w_q)

    def reason(self, access: Access) -> str:
        """Return that p can be evaluated, or its score, at draws of q."""
        if Access.LOG_PROB not in access:
            return (
                "its expectation is under q, which can always be sampled, and its gradient needs p's score alone (log p "
                "follows up to a constant by integrating the score along lines, 9 to 33 scores a point)"
            )
        tail = "" if Access.NORMALIZED in access else ", even unnormalised (log Z doesn't depend on q)"
        return f"its expectation is under q, which can always be sampled, and log p is what you can evaluate{tail}"

    def up_to(self, access: Access) -> UpTo:
        """Return log Z where p is unnormalised."""
        return None if Access.NORMALIZED in access else "log_z"


@dataclass(frozen=True)
class Jeffreys(Objective):
    """w KL(p‖q) + (1 − w) KL(q‖p): a path from reverse KL (w = 0) to forward KL (w = 1), with both as its ends.

    Args:
        weight_on_forward: w in [0, 1]. Half of the sum that Jeffreys wrote down is w = ½.

    Raises:
        InputError: w is something else.

    Source: Jeffreys (1946).

    >>> Jeffreys(0.3).spec
    'jeffreys:0.3'
    """

    weight_on_forward: float = 0.5

    name = "jeffreys"
    title = "Jeffreys"
    formula = "w KL(p‖q) + (1 − w) KL(q‖p)"
    character = "covers mass as far as w is on forward KL; w leads from one direction to the other"
    requires = DRAWS_AND_LOG_P

    def __post_init__(self) -> None:
        """Check the weight."""
        check_weight("weight_on_forward", self.weight_on_forward, closed=True)

    def reason(self, access: Access) -> str:
        """Return that both expectations are available."""
        tail = "" if Access.NORMALIZED in access else " (log Z doesn't depend on q, and cancels at w = ½)"
        return f"you have draws of p for the forward part, and log p at draws of q for the reverse part{tail}"

    @property
    def reads_p(self) -> bool:
        """True if w > 0."""
        return self.weight_on_forward > 0

    @property
    def reads_q(self) -> bool:
        """True if w < 1."""
        return self.weight_on_forward < 1

    @property
    def log_z_share(self) -> float:
        """2w − 1: forward KL contains + log Z, reverse KL − log Z."""
        return 2 * self.weight_on_forward - 1

    @property
    def kinds(self) -> tuple[tuple[float, kinds.Kind], ...]:
        """Both KLs, weighted."""
        w = self.weight_on_forward
        parts = ((w, kinds.ForwardKLDivergence()), (1 - w, kinds.ReverseKLDivergence()))
        return tuple(one for one in parts if one[0] > 0)

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return w Σ w_p ℓ − (1 − w) Σ w_q ℓ.

        >>> import torch
        >>> one = torch.ones(1)
        >>> Jeffreys(0.25).loss(2 * one, one, -one, one)
        tensor(1.2500)
        """
        w = self.weight_on_forward
        forward = w * (at_p @ w_p) if self.reads_p else at_q.new_zeros(())
        return forward - (1 - w) * (at_q @ w_q) if self.reads_q else forward
