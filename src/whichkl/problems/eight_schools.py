"""Eight schools: a small hierarchical model whose posterior can be evaluated and not sampled."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@plain_modes()
def eight_schools() -> Target:
    """Return the non-centred posterior, unnormalised, in u = (θ̃₁…₈, μ, log τ) ∈ ℝ¹⁰.

    yⱼ ~ N(μ + τ θ̃ⱼ, σⱼ), θ̃ⱼ ~ N(0, 1), μ ~ N(0, 5), τ ~ half-Cauchy(5); N(m, s) names the standard deviation.

    Source: Rubin (1981); priors as in posteriordb's eight_schools_noncentered.

    >>> eight_schools()
    Target(dim=10, access: log_prob, differentiable)
    """
    names = [f"school {i + 1}, standardised" for i in range(8)] + ["mean effect", "log spread"]
    return Target(log_prob=log_prob, dim=10, names=names)


def log_prob(u: Float[Tensor, "n 10"]) -> Float[Tensor, " n"]:
    """Return the unnormalised log density at (n, 10) points, in nats."""
    effects, errors = u.new_tensor(EFFECTS), u.new_tensor(ERRORS)
    standardized, mean, log_tau = u[:, :8], u[:, 8], u[:, 9]
    tau = log_tau.exp()
    prior = -0.5 * standardized.square().sum(-1) - 0.5 * (mean / 5).square() - torch.log1p((tau / 5).square()) + log_tau
    misfit = (effects - mean[:, None] - tau[:, None] * standardized) / errors
    return prior - 0.5 * misfit.square().sum(-1)
