"""Ensemble reweighting: 50,000 frames and 50 observables by `Moments`, and by SciPy's L-BFGS on the same dual."""

import json
import sys
import time

import numpy as np
import torch
from scipy.optimize import minimize

import whichkl as wk

SMALL = "--small" in sys.argv
FRAMES, OBSERVABLES = (5_000, 10) if SMALL else (50_000, 50)


def problem(seed=0):
    """Positive, skewed observables that share few causes, and values that weights of the frames have (ESS 40 %)."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(FRAMES, 10)) @ rng.normal(size=(10, OBSERVABLES)) / np.sqrt(10)
    f = np.exp(0.5 * causes) + 0.1 * rng.normal(size=causes.shape)
    w = np.exp((f - f.mean(0)) / f.std(0) @ rng.normal(size=OBSERVABLES) / np.sqrt(OBSERVABLES))
    return f, (w / w.sum()) @ f


def gap(f, m, multipliers):
    """Return the largest difference of a moment, in standard deviations."""
    logs = (f - m) @ multipliers
    w = np.exp(logs - logs.max())
    return float(np.abs((w / w.sum()) @ ((f - m) / f.std(0))).max())


def by_scipy(f, m):
    """Return λ by L-BFGS on the standardised dual."""
    unit = f.std(0)
    g = (f - m) / unit

    def dual(theta):
        logs = g @ theta
        top = logs.max()
        w = np.exp(logs - top)
        return top + np.log(w.mean()), g.T @ (w / w.sum())

    options = {"ftol": 0.0, "gtol": 1e-10, "maxiter": 10_000, "maxfun": 10_000}
    return minimize(dual, np.zeros(len(m)), jac=True, method="L-BFGS-B", options=options).x / unit


def main():
    """Print both, and one JSON line."""
    torch.set_num_threads(1)
    f, m = problem()
    wk.convert(wk.Moments(of=f[:100], values=f[:100].mean(0), reference=f[:100]))  # imports
    row = {"frames": FRAMES, "observables": OBSERVABLES}
    begun = time.process_time()
    target = wk.convert(wk.Moments(of=f, values=m, reference=f))
    row["whichkl_seconds"] = time.process_time() - begun
    row["whichkl_gap"] = gap(f, m, np.array(target.origin.multipliers))
    begun = time.process_time()
    other = by_scipy(f, m)
    row["scipy_seconds"], row["scipy_gap"] = time.process_time() - begun, gap(f, m, other)
    row["ratio"] = row["whichkl_seconds"] / row["scipy_seconds"]
    for name in ("whichkl", "scipy"):
        print(f"{name:8} {row[f'{name}_seconds']:.2f} CPU-s, largest gap {row[f'{name}_gap']:.1e} sd")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
