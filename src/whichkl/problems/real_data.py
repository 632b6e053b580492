"""Real data: eight schools and breast cancer, whose posteriors can be evaluated and not sampled, and samples of iris petals."""

from __future__ import annotations

from importlib.resources import as_file, files

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from whichkl._checks import require
from whichkl.process.torch_modes import plain_modes
from whichkl.samples import read_samples
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
    return Target(log_prob=eight_schools_log_prob, dim=10, names=names)


def eight_schools_log_prob(u: Float[Tensor, "n 10"]) -> Float[Tensor, " n"]:
    """Return the unnormalised log density at (n, 10) points, in nats."""
    effects, errors = u.new_tensor(EFFECTS), u.new_tensor(ERRORS)
    standardized, mean, log_tau = u[:, :8], u[:, 8], u[:, 9]
    tau = log_tau.exp()
    prior = -0.5 * standardized.square().sum(-1) - 0.5 * (mean / 5).square() - torch.log1p((tau / 5).square()) + log_tau
    misfit = (effects - mean[:, None] - tau[:, None] * standardized) / errors
    return prior - 0.5 * misfit.square().sum(-1)


@plain_modes()
def breast_cancer() -> Target:
    """Return the posterior of a logistic regression, unnormalised, in β ∈ ℝ³¹: an intercept and 30 coefficients.

    yᵢ ~ Bernoulli(σ(β₀ + xᵢ β)) for 569 tumours, the columns of x at mean 0 and standard deviation 1, and β ~ N(0, 1).

    Raises:
        InputError: scikit-learn, which has the data, isn't installed.

    Source: Street, Wolberg & Mangasarian (1993).

    >>> breast_cancer()
    Target(dim=31, access: log_prob, differentiable)
    """
    x, y, names = breast_cancer_rows()

    def log_prob(u: Float[Tensor, "n 31"]) -> Float[Tensor, " n"]:
        z = u @ x.to(u).T
        return (y.to(u) * z - softplus(z)).sum(-1) - u.square().sum(-1) / 2

    return Target(log_prob=log_prob, dim=x.shape[1], names=names)


def breast_cancer_rows() -> tuple[Float[Tensor, "569 31"], Float[Tensor, " 569"], list[str]]:
    """Return the design with its column of ones, the labels (1 where the tumour is benign) and the columns' names."""
    data = require("sklearn.datasets", "sklearn").load_breast_cancer()
    x, y = torch.from_numpy(data.data), torch.from_numpy(data.target).to(torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    return torch.cat([torch.ones(len(x), 1, dtype=x.dtype, device="cpu"), x], 1), y, ["intercept", *map(str, data.feature_names)]


@plain_modes()
def petals() -> Target:
    """Return lengths and widths of 150 iris petals in centimetres, 50 from each of three species; the species aren't in it.

    Source: Fisher (1936), "The use of multiple measurements in taxonomic problems", measured by Anderson (1935).

    >>> petals()
    Target(dim=2, n=150, access: samples)
    """
    with as_file(files("whichkl.problems") / "data" / "petals.csv") as path:
        table = read_samples(path)
    return Target(samples=table.values, names=[name.replace("_", " ") for name in table.names])
