"""Comparisons: the KL of a density from the one that noisy answers become, and BoTorch's `PairwiseGP` on the same answers.

    python benchmarks/comparisons.py [--pairs 2000] [--seeds 5] [--botorch]

Winners are drawn with P(a ≻ b) = σ(log p(a) − log p(b)). KL(p‖p̂) is by quadrature in two dimensions, and on 10⁵ draws of p in
five, with log Ẑ by importance sampling. With `--botorch`, both are fitted to 500 answers and scored by the mean −log P of 2,000
others. Seconds are CPU-seconds of one thread: set OMP_NUM_THREADS=1.
"""

import argparse
import json
import math
import statistics
import time

import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.nn.functional import softplus

import whichkl as wk

D = torch.float64
_DRAWS = 100_000


def bimodal(dim):
    means = torch.zeros(2, dim, dtype=D)
    means[:, 0] = torch.tensor([-2.0, 2.0])
    return MixtureSameFamily(Categorical(probs=torch.ones(2, dtype=D)), MultivariateNormal(means, torch.eye(dim, dtype=D)))


def moon(x):
    return -((x.norm(dim=-1) - 2) / 0.4).square() / 2 - ((x[:, 0] - 2) / 0.6).square() / 2


def correlated():
    i = torch.arange(5, dtype=D)
    return MultivariateNormal(torch.zeros(5, dtype=D), 0.5 ** (i[:, None] - i).abs())


def uniform(reach):
    return lambda n, g: reach * (2 * torch.rand(n, 2, generator=g, dtype=D) - 1)


def wide(n, g):
    return 2 * torch.randn(n, 5, generator=g, dtype=D)


CASES = {
    "bimodal, 2-D": (bimodal(2), uniform(5.0), 0.05),
    "one moon": (moon, uniform(4.0), 0.12),
    "Gaussian, 5-D": (correlated(), wide, 0.05),
    "bimodal, 5-D": (bimodal(5), wide, 0.15),
}
"""The density, the proposal of points, and the bar for the KL."""


def log_density(p):
    return p if callable(p) else p.log_prob


def answers(name, n, seed):
    p, proposal, _ = CASES[name]
    g = torch.Generator().manual_seed(seed)
    a, b = proposal(n, g), proposal(n, g)
    wins = torch.rand(n, generator=g, dtype=D) < torch.sigmoid(log_density(p)(a) - log_density(p)(b))
    return torch.where(wins[:, None], a, b), torch.where(wins[:, None], b, a)


def kl(p, target):
    log_p = log_density(p)
    if target.dim == 2:
        line = torch.linspace(-8, 8, 401, dtype=D)
        x = torch.cartesian_prod(line, line)
        one, other = log_p(x).log_softmax(0), target.log_prob(x).log_softmax(0)
        return float((one.exp() * (one - other)).sum())
    torch.manual_seed(0)
    x, broad = p.sample((_DRAWS,)), MultivariateNormal(torch.zeros(5, dtype=D), 9 * torch.eye(5, dtype=D))
    z = torch.cat([p.sample((_DRAWS,)), broad.sample((_DRAWS,))])
    mixed = torch.logaddexp(log_p(z), broad.log_prob(z)) - math.log(2)
    log_z = (target.log_prob(z) - mixed).logsumexp(0) - math.log(len(z))
    return float((log_p(x) - target.log_prob(x)).mean() + log_z)


def timed(function):
    start = time.process_time()
    return function(), time.process_time() - start


def botorch_loss(name, winners, losers, unseen):
    """Mean −log P of unseen answers by BoTorch's Laplace GP, and its seconds; its points are in the unit cube, as it asks."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models.pairwise_gp import PairwiseGP, PairwiseLaplaceMarginalLogLikelihood

    both = torch.cat([winners, losers])
    low, high = both.amin(0), both.amax(0)

    def fitted():
        order = torch.arange(len(winners))
        model = PairwiseGP((both - low) / (high - low), torch.stack([order, order + len(winners)], 1))
        fit_gpytorch_mll(PairwiseLaplaceMarginalLogLikelihood(model.likelihood, model))
        return model

    model, seconds = timed(fitted)
    points = (torch.cat(unseen) - low) / (high - low)
    with torch.no_grad():
        posterior = model.posterior(points)
        mean, covariance = posterior.mean[:, 0], posterior.mvn.covariance_matrix
    n = len(unseen[0])
    variance = covariance.diagonal()[:n] + covariance.diagonal()[n:] - 2 * covariance.diagonal(n)[:n]
    z = (mean[:n] - mean[n:]) / (2 + variance).sqrt()  # its likelihood is a probit with noise √2
    return float(-torch.special.log_ndtr(z).mean()), seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--botorch", action="store_true")
    given, out = parser.parse_args(), []
    for name, (p, _, bar) in CASES.items():
        values, seconds = [], []
        for seed in range(given.seeds):
            winners, losers = answers(name, given.pairs, seed)
            target, spent = timed(lambda a=winners, b=losers, s=seed: wk.convert(wk.Comparisons(winners=a, losers=b), seed=s))
            values.append(kl(p, target))
            seconds.append(spent)
        row = {"case": name, "pairs": given.pairs, "kl": statistics.median(values), "worst": max(values), "bar": bar}
        row["seconds"] = statistics.median(seconds)
        if given.botorch:
            winners, losers = answers(name, 500, 100)
            unseen = answers(name, 2_000, 101)
            target, spent = timed(lambda a=winners, b=losers: wk.convert(wk.Comparisons(winners=a, losers=b)))
            ours = float(softplus(target.log_prob(unseen[1]) - target.log_prob(unseen[0])).mean())
            theirs, long = botorch_loss(name, winners, losers, unseen)
            row |= {"unseen loss": ours, "its seconds": spent, "botorch loss": theirs, "botorch seconds": long}
        out.append(row)
        print(", ".join(f"{key}: {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items()))
    print(json.dumps({"benchmark": "comparisons", "seeds": given.seeds, "cases": out}))


if __name__ == "__main__":
    main()
