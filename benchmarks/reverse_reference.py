"""How far a full Gaussian by `fit` is from the best one, found by brute force: L-BFGS with autograd on 16,384 fixed nodes.

The brute force shares no code with the solver: torch's own L-BFGS with a strong Wolfe search, until nothing moves, over the mean
and the Cholesky factor, from three starts: our own answer, a Gaussian about it three times as wide, and the moments of long
chains' draws, or N(0, I) where there are none. Both ends are scored by one ELBO on 100,000 draws of common normals; what counts
is the paired difference.

    python benchmarks/reverse_reference.py FOLDER, with data_*.json and *.npz, as in posteriordb
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from reverse_posteriors import BREAST_CANCER, breast_cancer

import whichkl as wk
from whichkl.problems import POSTERIORS, posterior

NODES, JUDGED_ON, STEPS, PART, WIDE = 16_384, 100_000, 400, 2_048, 3.0
D = torch.float64


def nodes(count, dim, seed):
    """Scrambled Sobol points as normals, each with its mirror image, whitened."""
    u = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(count // 2, dtype=D)
    z = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    z = torch.cat([z, -z])
    return torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / count), z.T, upper=False).T


def values(log_prob, loc, tril, z):
    """Log p − log q at every node, up to what doesn't depend on the Gaussian."""
    return torch.cat([log_prob(loc + part @ tril.T) for part in z.split(PART)]) + tril.diagonal().log().sum()


def brute(log_prob, loc, tril, z):
    """The best Gaussian on these nodes from this start, in coordinates that it whitens, and its ELBO there."""
    dim = len(loc)
    below = torch.tril_indices(dim, dim, -1)
    theta = torch.zeros(2 * dim + below.shape[1], dtype=D, requires_grad=True)

    def read():
        factor = torch.diag(theta[dim : 2 * dim].exp()).index_put(tuple(below), theta[2 * dim :])
        return loc + tril @ theta[:dim], tril @ factor

    def loss():
        optimizer.zero_grad()
        at, scale = (part.detach().requires_grad_() for part in read())
        total = 0.0
        for part in z.split(PART):  # the graph of one part at a time
            one = -log_prob(at + part @ scale.T).sum() / len(z)
            one.backward()
            total += float(one.detach())
        whole = sum((a * b.grad).sum() for a, b in zip(read(), (at, scale), strict=True)) - theta[dim : 2 * dim].sum()
        whole.backward()
        return torch.tensor(total - float(theta[dim : 2 * dim].detach().sum()), dtype=D)

    optimizer = torch.optim.LBFGS(
        [theta], max_iter=STEPS, history_size=50, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    optimizer.step(loss)
    end = float(loss())
    with torch.no_grad():
        at, scale = read()
    return float(tril.diagonal().log().sum()) - end if math.isfinite(end) else -math.inf, at, scale


def row(name, folder):
    is_posterior = name != BREAST_CANCER
    target = posterior(name, folder) if is_posterior else breast_cancer()[0]
    chains = posterior(name, folder, draws=True).samples.to(D) if is_posterior else None
    log_prob, fit = target.density.function, wk.fit(target)
    loc, tril = fit.model.loc, fit.model.scale_tril
    begin = time.perf_counter()
    begun = [(loc, tril), (loc, WIDE * tril)]
    begun += (
        [(chains.mean(0), torch.linalg.cholesky(chains.T.cov()))] if is_posterior else [(0 * loc, torch.eye(len(loc), dtype=D))]
    )
    z = nodes(NODES, target.dim, 1)
    ends = [brute(log_prob, *start, z) for start in begun]
    best, at, scale = max(ends, key=lambda end: end[0])
    seconds = time.perf_counter() - begin
    common = torch.randn(JUDGED_ON, target.dim, generator=torch.Generator().manual_seed(20), dtype=D)
    with torch.no_grad():
        below = values(log_prob, at, scale, common) - values(log_prob, loc, tril, common)
    found = {"posterior": name, "below": float(below.mean()), "stderr": float(below.std()) / math.sqrt(JUDGED_ON)}
    found |= {"starts": [best - end[0] for end in ends], "seconds": seconds}
    found |= {"gradients": target.evaluations["score"], "status": fit.status, "findings": sorted(fit.findings)}
    return found


def main():
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[2] / "shared" / "posteriors")
    options.add_argument("--only", default="")
    given = options.parse_args()
    if not given.folder.is_dir():
        print(f"nothing is measured: there is no folder {given.folder} of posteriordb's data; name one")
        return
    rows = []
    for name in [*POSTERIORS, BREAST_CANCER]:
        if given.only in name:
            rows.append(row(name, given.folder))
            one = rows[-1]
            print(
                f"{name:<28} below the best by {one['below']:+.5f} ± {one['stderr']:.5f} nats   "
                f"{one['gradients']:,} gradients   {one['status']}   "
                f"starts end {', '.join(f'{gap:.1e}' for gap in one['starts'])} below   {one['seconds']:.0f} s",
                flush=True,
            )
    print(json.dumps({"benchmark": "reverse_reference", "rows": rows}))


if __name__ == "__main__":
    main()
