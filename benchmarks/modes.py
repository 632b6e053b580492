"""Modes: what reverse KL misses on GMM-40 and ManyWell-32, from their log densities alone, and log Z by particles.

A fit without the search for missing modes stands beside one with it; log Z of the particles stands beside the truth, with the
error that they claim, over five seeds.
"""

import json
import math
import statistics
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


def main():
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
