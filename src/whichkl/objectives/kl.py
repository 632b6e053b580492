"""KL: the two directions, forward and reverse."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.access import Access, Requirement
from whichkl.families.family import NodeFamily
from whichkl.objectives.objective import Objective, UpTo


class ForwardKL(Objective):
    """KL(p‖q) = −∫ p log q − H(p): maximum likelihood.

    Its samples come from p, so q must put mass wherever p does: it covers mass. Only the cross-entropy depends on
    q, so that the fit needs samples alone; the value needs p's density.

    Source: Kullback & Leibler (1951); as maximum likelihood, Akaike (1973).
    """

    name = "forward_kl"
    title = "Forward KL"
    formula = "KL(p‖q) = E_p[log p − log q]"
    character = "mass-covering: q must put mass wherever p does"
    requires = Requirement(Access.SAMPLES, Access.SAMPLER)
    requires_of_model = Requirement(Access.LOG_PROB)

    def reason(self, access: Access) -> str:
        """Say that the expectation under p is at hand."""
        return (
            "its expectation is under p, whose draws you have; minimising it is maximum likelihood (the entropy of p "
            "doesn't depend on q)"
        )

    def up_to(self, access: Access) -> UpTo:
        """H(p) where p can't be evaluated, log Z where p is unnormalised."""
        if Access.LOG_PROB not in access:
            return "entropy_p"
        return None if Access.NORMALIZED in access else "log_z"

    def loss(self, model: Distribution, x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """Cross-entropy −Σ wᵢ log q(xᵢ), Σ wᵢ = 1: forward KL plus H(p), in nats.

        >>> import torch
        >>> x = torch.zeros(1, 1)
        >>> ForwardKL().loss(torch.distributions.Independent(torch.distributions.Normal(x[0], 1.0), 1), x, x[0] + 1)
        tensor(0.9189)
        """
        return -(w @ model.log_prob(x))


class ReverseKL(Objective):
    """KL(q‖p) = E_q[log q − log p] = −ELBO + log Z: variational inference.

    Its samples come from q, so that p's unnormalised log density is all that it needs. It tends to seek modes where
    p's modes are far apart for the family; close ones it covers.

    Source: Jordan, Ghahramani, Jaakkola & Saul (1999).
    """

    name = "reverse_kl"
    title = "Reverse KL"
    formula = "KL(q‖p) = E_q[log q − log p] = −ELBO + log Z"
    character = "tends to mode-seeking: q avoids places where p has no mass"
    requires = Requirement(Access.LOG_PROB, Access.SCORE)
    requires_of_model = Requirement(Access.LOG_PROB | Access.SAMPLER)

    def reason(self, access: Access) -> str:
        """Say that the expectation under q is at hand."""
        if Access.LOG_PROB not in access:
            return (
                "its expectation is under q, which can always be sampled, and its gradient needs p's score alone (log p "
                "follows up to a constant by integrating the score along lines, 9 to 33 scores a point)"
            )
        tail = "" if Access.NORMALIZED in access else ", even unnormalised (log Z doesn't depend on q)"
        return f"its expectation is under q, which can always be sampled, and log p is what you can evaluate{tail}"

    def up_to(self, access: Access) -> UpTo:
        """Log Z where p is unnormalised."""
        return None if Access.NORMALIZED in access else "log_z"

    def loss(
        self,
        family: NodeFamily,
        model: Distribution,
        log_prob_and_score: Callable[[Tensor], tuple[Tensor, Tensor]],
        z: Float[Tensor, "m d"],
        w: Float[Tensor, " m"],
        *,
        sticking_the_landing: bool = False,
    ) -> Float[Tensor, ""]:
        """−ELBO on a rule (z, w) for N(0, I): Σ wᵢ (log q(xᵢ) − log p(xᵢ)), x = x(z; q), in nats up to log Z.

        Args:
            family: the family of `model`, which carries the rule to it.
            model: q, its parameters attached to the graph where a gradient is wanted.
            log_prob_and_score: (n, d) → log p and ∇log p, as `Target.value_and_score`.
            z: points of the rule for a standard normal.
            w: their weights, summing to one.
            sticking_the_landing: hold q's parameters fixed inside log q, which leaves the gradient unbiased and
                makes it exactly zero at q = p (Roeder, Wu & Duvenaud, 2017).
        """
        x, weight = family.nodes(model, z, w)
        value, score = log_prob_and_score(x)
        log_p = value + ((x - x.detach()) * score).sum(-1)
        density = family.model({k: v.detach() for k, v in family.parameters(model).items()}) if sticking_the_landing else model
        return weight @ (density.log_prob(x) - log_p)
