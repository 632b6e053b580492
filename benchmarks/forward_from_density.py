"""Forward KL from a density alone, and from few samples and a density: KL(p‖q) on unseen draws, evaluations, CPU-seconds.

GMM-40 by 40 components without a hint, ManyWell-32 by a block mixture, ½ N(±3, 1) by one Gaussian, and a 10-D Gaussian of 200
draws and a density next to the fit to the draws alone. `--seeds N` sets the number of seeds (5).
"""

import json
import statistics
import sys
import time

import torch
from torch.distributions import MultivariateNormal, kl_divergence

import whichkl as wk
from whichkl.families import BlockMixture, Gaussian, Mixture
from whichkl.problems.synthetic import gmm40_means

D = torch.float64
DRAWS = 200_000
LOG_Z = 164.69568


def timed(target, family, seed):
    """A fit, its CPU-seconds, and its evaluations."""
    begin = time.process_time()
    fit = wk.fit(target, family, objective="forward_kl", seed=seed)
    seconds = time.process_time() - begin
    return fit, seconds, target.evaluations["log_prob"] + target.evaluations["score"]


def on_draws(fit, problem, log_z):
    """KL(p‖q) on fresh draws of p."""
    x = problem.draws(DRAWS, 99)
    return float((problem.log_prob(x) - log_z - fit.model.log_prob(x)).mean())


def gmm40(seed):
    fit, seconds, evaluations = timed(wk.problems.gmm40("log_prob"), Mixture(40), seed)
    found = torch.bincount(torch.cdist(fit.draws(20_000), gmm40_means()).argmin(1), minlength=40)
    kl = on_draws(fit, wk.problems.gmm40(), 0.0)
    more = {"ess": fit.diagnostics.ess / fit.diagnostics.elbo.n, "modes": int((found > 50).sum())}
    return {"kl": kl, "value": fit.value.value, "seconds": seconds, "evaluations": evaluations, **more}


def many_well(seed):
    fit, seconds, evaluations = timed(wk.problems.many_well(32, "log_prob"), BlockMixture(2), seed)
    kl, log_z = on_draws(fit, wk.problems.many_well(32), LOG_Z), fit.diagnostics.log_z.value
    return {"kl": kl, "value": fit.value.value, "log_z": log_z, "seconds": seconds, "evaluations": evaluations}


def bimodal(seed):
    p = wk.problems.bimodal(3.0)
    fit, seconds, evaluations = timed(wk.Target(log_prob=lambda x: p.log_prob(x[:, 0]), dim=1), Gaussian(), seed)
    return {"variance": float(fit.model.variance), "value": fit.value.value, "seconds": seconds, "evaluations": evaluations}


def both(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(10, 10, generator=generator, dtype=D)
    p = MultivariateNormal(torch.randn(10, generator=generator, dtype=D), root @ root.T / 10 + 0.2 * torch.eye(10, dtype=D))
    x = p.loc + torch.randn(200, 10, generator=generator, dtype=D) @ p.scale_tril.T
    target = wk.Target(samples=x, log_prob=p.log_prob)
    fit, seconds, evaluations = timed(target, Gaussian(), seed)
    alone = wk.fit(wk.Target(samples=x), Gaussian(), seed=seed)
    kl, kl_alone = float(kl_divergence(p, fit.model)), float(kl_divergence(p, alone.model))
    return {"kl": kl, "kl of samples alone": kl_alone, "seconds": seconds, "evaluations": evaluations}


def main():
    """Print a line per problem, and one JSON line last."""
    torch.set_num_threads(1)
    seeds = int(sys.argv[sys.argv.index("--seeds") + 1]) if "--seeds" in sys.argv else 5
    results = {}
    for problem in (gmm40, many_well, bimodal, both):
        runs = [problem(seed) for seed in range(seeds)]
        columns = {name: [run[name] for run in runs] for name in runs[0]}
        results[problem.__name__] = {
            name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for name, values in columns.items()
        }
        shown = ", ".join(f"{name} {statistics.median(v):.5g} ({min(v):.5g} to {max(v):.5g})" for name, v in columns.items())
        print(f"{problem.__name__}: {shown}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
