"""Modes: what reverse KL misses on GMM-40 and ManyWell-32, from their log densities alone, and log Z by particles.

A fit without the search for missing modes is compared with one with it, and log Z of the particles with the truth and with the
error that they report, over five seeds. With `--hard`, ten targets with a mode that is light, narrow or far away, 15 seeds each:
how often it is found.
"""

import json
import math
import statistics
import sys
import time

import torch

import whichkl as wk
from whichkl.particles import Reference, temper

D = torch.float64
PROBLEMS = {
    "GMM-40": (lambda: wk.problems.gmm40("log_prob"), 0.0, 40.0),
    "ManyWell-32": (lambda: wk.problems.many_well(32, "log_prob"), 164.69568, 10.0),
}
SEEDS = 5


def searched(make):
    """What a fit says of the modes that it misses, and what finding that out costs."""
    seconds, plain, fits = [], [], []
    for seed in range(3):
        begin = time.perf_counter()
        wk.fit(make(), seed=seed, judge=False)
        plain.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        fits.append(wk.fit(make(), seed=seed))
        seconds.append(time.perf_counter() - begin)
    fit = fits[0]
    found = fit.diagnostics.missing_modes
    return {
        "found": all("modes_missing" in one.findings for one in fits),
        "modes": found.count,
        "mass": round(found.mass, 4),
        "stderr": round(found.stderr, 4),
        "least_kl": round(found.least_kl, 3),
        "khat": round(fit.diagnostics.khat, 2),
        "gradients": found.gradients,
        "calls": found.calls,
        "fit_gradients": fit.diagnostics.evaluations["score"] - found.gradients,
        "seconds": round(statistics.median(seconds), 3),
        "seconds_without_judging": round(statistics.median(plain), 3),
    }


def normalised(make, truth, scale):
    """Log Z by 4,096 particles on 8 islands, and how far it is from the truth."""
    runs, begin = [], time.perf_counter()
    for seed in range(SEEDS):
        target = make()
        base = Reference(torch.zeros(target.dim, dtype=D), scale * torch.eye(target.dim, dtype=D))
        runs.append(temper(target, base, particles=4096, islands=8, keep=0.9, seed=seed))
    off = [run.log_z - truth for run in runs]
    return {
        "base": scale,
        "mean_absolute_error": round(statistics.mean(map(abs, off)), 4),
        "claimed_error": round(math.sqrt(statistics.mean(run.log_z_stderr**2 for run in runs)), 4),
        "worst_z": round(max(abs(error) / run.log_z_stderr for error, run in zip(off, runs, strict=True)), 2),
        "gradients": int(statistics.mean(run.gradients for run in runs)),
        "calls": int(statistics.mean(run.calls for run in runs)),
        "seconds": round((time.perf_counter() - begin) / SEEDS, 3),
    }


HARD = {  # dimension, share of the mass, standard deviation of q, where the mode is, its standard deviation
    "light and narrow": (2, 0.02, 1.0, 15.0, 0.3),
    "a fifth as wide": (3, 0.15, 5.0, 40.0, 1.0),
    "a third as wide": (3, 0.15, 3.0, 30.0, 1.0),
    "half as wide": (5, 0.3, 1.0, 12.0, 0.5),
    "light": (5, 0.02, 1.0, 15.0, 1.0),
    "light and narrower": (8, 0.03, 1.0, 15.0, 0.7),
    "heavy and narrower": (10, 0.4, 1.0, 15.0, 0.7),
    "light in 10 dimensions": (10, 0.025, 1.0, 10.0, 1.0),
    "light in 20 dimensions": (20, 0.05, 1.0, 10.0, 1.0),
    "narrower in 20 dimensions": (20, 0.6, 1.0, 10.0, 0.8),
}


def two_modes(dim, share, width, away, narrow):
    """N(0, width² I) and, at (away, away / 3, 0, …), N(·, narrow² I)."""
    log_w = torch.tensor([1 - share, share], dtype=D).log()
    loc, scale = torch.zeros(2, dim, dtype=D), torch.tensor([width, narrow], dtype=D)
    loc[1, 0], loc[1, 1] = away, away / 3

    def log_prob(x):
        squared = ((x[:, None] - loc) / scale[:, None]).square().sum(-1)
        return torch.logsumexp(log_w - squared / 2 - dim * scale.log(), -1)

    return wk.Target(log_prob=log_prob, dim=dim)


def hard(seeds=15):
    """How often a mode that is hard to find is found."""
    rows = []
    for name, law in HARD.items():
        found = [wk.fit(two_modes(*law), seed=seed).diagnostics.missing_modes for seed in range(seeds)]
        row = {"target": name, "found": sum(one.found for one in found), "of": seeds}
        rows.append(row | {"gradients": int(statistics.mean(one.gradients for one in found))})
        print(f"{name:<26} found in {rows[-1]['found']:2d} of {seeds}, {rows[-1]['gradients']:,} gradients")
    total = sum(row["found"] for row in rows)
    print(json.dumps({"benchmark": "modes_hard", "found": total, "of": seeds * len(rows), "rows": rows}))


def main():
    if "--hard" in sys.argv:
        return hard()
    rows = []
    for name, (make, truth, scale) in PROBLEMS.items():
        row = {"problem": name, "missing": searched(make), "log_z": normalised(make, truth, scale)}
        rows.append(row)
        m, z = row["missing"], row["log_z"]
        print(
            f"{name:<12} modes_missing {m['found']}: {m['modes']} modes, {m['mass']:.1%} ± {m['stderr']:.1%} of the mass, "
            f"at least {m['least_kl']:.2f} nats, k̂ {m['khat']:.2f}; {m['gradients']:,} gradients in {m['calls']} calls; "
            f"fit {m['seconds']:.2f} s, without judging {m['seconds_without_judging']:.2f} s"
        )
        print(
            f"{'':<12} log Z off by {z['mean_absolute_error']:.3f} (claims {z['claimed_error']:.3f}, worst z {z['worst_z']:.1f}) "
            f"with {z['gradients']:,} gradients in {z['calls']} calls, {z['seconds']:.2f} s"
        )
    print(json.dumps({"benchmark": "modes", "rows": rows}))


if __name__ == "__main__":
    main()
