"""Reverse KL to a full Gaussian: ours and Adam on the reparameterised ELBO in plain torch, the usual recipe.

Adam gets the best of four learning rates, ten draws a step. Both are scored by one ELBO on 100,000 fresh draws.
"""

import json
import math
import statistics
import time

import torch
from torch.distributions import MultivariateNormal

import whichkl as wk

D = torch.float64


def gaussian():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, generator=generator, dtype=D)
    p = MultivariateNormal(torch.randn(20, generator=generator, dtype=D), root @ root.T / 20 + 0.1 * torch.eye(20, dtype=D))
    return wk.Target(log_prob=p.log_prob, dim=20)


def logistic():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 8, generator=generator, dtype=D)
    y = (x @ torch.linspace(-1, 1, 8, dtype=D) + torch.randn(200, generator=generator, dtype=D) > 0).to(D)
    return wk.Target(
        log_prob=lambda b: (y * (b @ x.T) - torch.nn.functional.softplus(b @ x.T)).sum(-1) - 0.5 * b.square().sum(-1), dim=8
    )


PROBLEMS = {"gaussian, d=20": gaussian, "logistic, d=8": logistic, "eight schools, d=10": wk.problems.eight_schools}


def adam(target, rate, steps=5000, draws=10):
    torch.manual_seed(0)
    dim = target.dim
    loc, raw = torch.zeros(dim, dtype=D, requires_grad=True), torch.zeros(dim, dim, dtype=D, requires_grad=True)
    optimizer = torch.optim.Adam([loc, raw], lr=rate)
    for _ in range(steps):
        tril = raw.tril(-1) + torch.diag(raw.diagonal().exp())
        x = loc + torch.randn(draws, dim, dtype=D) @ tril.T
        loss = -target.log_prob(x).mean() - raw.diagonal().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return MultivariateNormal(loc.detach(), scale_tril=(raw.tril(-1) + torch.diag(raw.diagonal().exp())).detach())


def elbo(target, q):
    torch.manual_seed(1)
    value = []
    for _ in range(10):
        x = q.sample((10_000,))
        value.append(float((target.log_prob(x) - q.log_prob(x)).mean()))
    return statistics.mean(value)


def main():
    rows = []
    for name, make in PROBLEMS.items():
        seconds = []
        for _ in range(3):
            target, begin = make(), time.perf_counter()
            fit = wk.fit(target)
            seconds.append(time.perf_counter() - begin)
        ours = {"seconds": statistics.median(seconds), "gradients": target.evaluations["score"], "elbo": elbo(make(), fit.model)}
        best = None
        for rate in (1e-1, 3e-2, 1e-2, 3e-3):
            begin = time.perf_counter()
            q = adam(make(), rate)
            row = {"seconds": time.perf_counter() - begin, "gradients": 50_000, "elbo": elbo(make(), q), "rate": rate}
            best = row if best is None or (math.isfinite(row["elbo"]) and row["elbo"] > best["elbo"]) else best
        rows.append({"problem": name, "whichkl": ours, "adam": best})
        print(
            f"{name:<22} whichkl {ours['seconds']:6.2f} s {ours['gradients']:7d} gradients ELBO {ours['elbo']:10.4f}   "
            f"adam {best['seconds']:6.2f} s {best['gradients']:7d} gradients ELBO {best['elbo']:10.4f} (best rate {best['rate']})"
        )
    print(json.dumps({"benchmark": "reverse_gaussian", "rows": rows}))


if __name__ == "__main__":
    main()
