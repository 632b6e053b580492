"""KL: the two directions, forward and reverse."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from whichkl.access import Access, Requirement
from whichkl.divergences import kinds
from whichkl.objectives.objective import Objective, Ratios, UpTo


class ForwardKL(Objective):
    """KL(p‖q) = −∫ p log q − H(p): maximum likelihood.

    Its samples come from p, so q must put mass wherever p does: it covers mass. Only the cross-entropy depends on
    q, so samples suffice for the fit; the value needs p's density. A density alone suffices too: solver `particles`.

    Source: Kullback & Leibler (1951); as maximum likelihood, Akaike (1973).
    """

    name = "forward_kl"
    title = "Forward KL"
    formula = "KL(p‖q) = E_p[log p − log q]"
    character = "mass-covering: q must put mass wherever p does"
    direction = "forward"
    requires = Requirement(Access.SAMPLES, Access.SAMPLER, Access.LOG_PROB)
    requires_of_model = Requirement(Access.LOG_PROB)
    reads_q = False
    log_z_share = 1.0
    kind = kinds.ForwardKLDivergence
    why = (
        "its expectation is under p, whose draws you have; minimising it is maximum likelihood (the entropy of p doesn't depend "
        "on q)"
    )

    def reason(self, access: Access) -> str:
        """Return why draws of p, or its density alone, are enough."""
        if access.can_sample:
            return super().reason(access)
        if Access.ENUMERABLE in access:
            return "its expectation is under p, a sum over all states"
        return (
            "its expectation is under p, to which particles are moved, and draws of q that are weighted to p improve the fit; "
            "this takes some 200,000 to 2,000,000 evaluations of log p, and holds as far as the particles reach p's modes"
        )

    def loss(self, at_p: Ratios, w_p: Float[Tensor, " n"], at_q: Ratios, w_q: Float[Tensor, " m"]) -> Float[Tensor, ...]:
        """Return Σ w_p ℓ.

        >>> import torch
        >>> one = torch.ones(1)
        >>> ForwardKL().loss(2 * one, one, one[:0], one[:0])
        tensor(2.)
        """
        return at_p @ w_p

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
    why = "its expectation is under q, which can always be sampled, and log p is what you can evaluate"
    why_unnormalized = ", even unnormalised (log Z doesn't depend on q)"

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
        if Access.LOG_PROB in access:
            return super().reason(access)
        return (
            "its expectation is under q, which can always be sampled, and its gradient needs p's score alone (log p "
            "follows up to a constant by integrating the score along lines, 9 to 33 scores a point)"
        )

    def up_to(self, access: Access) -> UpTo:
        """Return log Z where p is unnormalised."""
        return None if Access.NORMALIZED in access else "log_z"
