"""Gradients of log p that a mixture by reverse KL takes, compared with the Gaussian that it starts from, and both ELBOs.

The counts are the same on every machine. ELBOs are means over fresh draws of each model.
`python benchmarks/reverse_mixture.py 2 3` takes mixtures of two and of three components. The posteriors of `../shared/posteriors`
take part where that folder is.
"""

import json
import sys
import time
from pathlib import Path

import torch

import whichkl as wk

POSTERIORS = Path(__file__).parents[2] / "shared" / "posteriors"
DRAWS = 20_000
D = torch.float64


def gaussian(x):
    tril = torch.linalg.cholesky(torch.eye(10, dtype=D) + 0.5)
    return -torch.linalg.solve_triangular(tril, x.T, upper=False).square().sum(0) / 2


def banana(x):
    return -x[:, 0].square() / 8 - 2 * (x[:, 1] - x[:, 0].square() / 4).square()


def funnel(x):
    return -x[:, 0].square() / 18 - x[:, 1:].square().sum(-1) / 2 * torch.exp(-x[:, 0]) - 1.5 * x[:, 0]


def three_modes(x):
    centres = torch.tensor([[0.0, 0], [6, 0], [0, 8]], dtype=D)
    return torch.logsumexp(-(x[:, None] - centres).square().sum(-1) / 2 + torch.tensor([0.0, -1, -0.5], dtype=D), 1)


def logistic():
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=D)
    sign = torch.where(x @ torch.tensor([1.0, -1, 0.5, 0, 2], dtype=D) > 0, 1.0, -1.0)
    return lambda b: -b.square().sum(-1) / 8 - torch.nn.functional.softplus(-sign * (b @ x.T)).sum(-1)


def targets():
    for function, dim in ((gaussian, 10), (banana, 2), (funnel, 4), (three_modes, 2), (logistic(), 5)):
        name = getattr(function, "__name__", "").replace("<lambda>", "logistic regression, 200 rows").replace("_", " ")
        yield name, lambda function=function, dim=dim: wk.Target(log_prob=function, dim=dim)
    yield "eight schools", wk.problems.eight_schools
    yield "breast cancer", wk.problems.breast_cancer
    if POSTERIORS.is_dir():
        for name in ("kidiq-kidscore_interaction", "arK-arK", "nes1980-nes", "garch-garch11"):
            yield name, lambda name=name: wk.problems.posterior(name, POSTERIORS)


def measured(target, family):
    begin = time.process_time()
    fit = wk.fit(target, family, objective="reverse_kl", judge=False)
    seconds = time.process_time() - begin
    x = fit.draws(DRAWS, seed=1)
    ratio = torch.cat([target.log_prob(part) for part in x.split(1_000)]) - fit.model.log_prob(x)
    return {
        "gradients": target.evaluations["score"],
        "elbo": round(float(ratio.mean()), 4),
        "stderr": round(float(ratio.std()) / DRAWS**0.5, 4),
        "cpu_seconds": round(seconds, 2),
        "status": fit.status,
    }


def main(*counts):
    figures = {}
    for name, make in targets():
        single = measured(wk.Target.of(make()), "gaussian")
        figures[name] = {"gaussian": single}
        line = f"{name:<30} Gaussian {single['gradients']:>7,}"
        for count in counts or ("2",):
            found = measured(wk.Target.of(make()), f"mixture:{count}")
            figures[name][f"mixture:{count}"] = found
            ratio, gain = found["gradients"] / single["gradients"], found["elbo"] - single["elbo"]
            line += f"   mixture:{count} {found['gradients']:>9,} = {ratio:>5.1f} ×, ELBO {gain:+.4f}"
        print(line, flush=True)
    print(json.dumps({"benchmark": "reverse_mixture", "targets": figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
