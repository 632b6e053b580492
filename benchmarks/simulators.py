"""Simulators: amortised posteriors of three tasks of sbibm, compared with reference posteriors and with sbi's NPE.

    python benchmarks/simulators.py [REFERENCES] [--tasks two_moons ...] [--simulations 10000] [--sbi]

Without REFERENCES only the KL of the Gaussian linear task is measured. REFERENCES is a folder with one file per task, such as
two_moons.npz: x1 (1, c), x2, … are observations, theta1 (4000, d), … draws of their posteriors. C2ST is the accuracy of sbibm's
classifier (Lueckmann et al., 2021) between 4,000 draws of each; 0.5 is perfect. Seconds are CPU-seconds of one thread: set
OMP_NUM_THREADS=1. The KL of the Gaussian linear task is exact up to the error of 4,000 fresh pairs, from simulations of the prior
and of proposals with twice its variance and twice its standard deviation. Of 100 sets of 1,000 simulations, it is counted how
many pass the calibration of the exact posterior, of a biased and of a narrow one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform

import whichkl as wk

DTYPE = torch.float64
_ROWS = 4_000


def two_moons(theta):
    """X = (r cos a + 0.25 − |θ₁ + θ₂|/√2, r sin a + (θ₂ − θ₁)/√2), a ~ U(−π/2, π/2), r ~ N(0.1, 0.01)."""
    a = math.pi * (torch.rand(len(theta), dtype=DTYPE) - 0.5)
    r = 0.1 + 0.01 * torch.randn(len(theta), dtype=DTYPE)
    turned = torch.stack([-theta.sum(1).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return torch.stack([r * a.cos() + 0.25, r * a.sin()], 1) + turned


def gaussian_linear(theta):
    """X = θ + √0.1 z."""
    return theta + math.sqrt(0.1) * torch.randn_like(theta)


def slcp(theta):
    """Four points of N((θ₁, θ₂), Σ) with standard deviations θ₃², θ₄² and correlation tanh θ₅."""
    z = torch.randn(len(theta), 4, 2, dtype=DTYPE)
    s1, s2, rho = theta[:, 2:3].square(), theta[:, 3:4].square(), theta[:, 4:5].tanh()
    first = theta[:, 0:1] + s1 * z[..., 0]
    second = theta[:, 1:2] + s2 * (rho * z[..., 0] + (1 - rho.square()).sqrt() * z[..., 1])
    return torch.stack([first, second], -1).reshape(len(theta), 8)


def box(d, end):
    """U(−end, end)ᵈ."""
    return Independent(Uniform(-end * torch.ones(d, dtype=DTYPE), end * torch.ones(d, dtype=DTYPE)), 1)


def normal(variance):
    """N(0, variance I₁₀)."""
    return Independent(Normal(torch.zeros(10, dtype=DTYPE), math.sqrt(variance) * torch.ones(10, dtype=DTYPE)), 1)


TASKS = {
    "two_moons": (box(2, 1.0), two_moons),
    "gaussian_linear": (normal(0.1), gaussian_linear),
    "slcp": (box(5, 3.0), slcp),
}


def c2st(x, y):
    """Return the accuracy of sbibm's classifier, in five folds."""
    x, y = x.double().numpy(), y.double().numpy()
    mean, sd, d = x.mean(0), x.std(0), x.shape[1]
    rows = (np.concatenate([x, y]) - mean) / sd
    labels = np.repeat([0, 1], [len(x), len(y)])
    net = MLPClassifier(activation="relu", hidden_layer_sizes=(10 * d, 10 * d), max_iter=1000, solver="adam", random_state=1)
    return float(cross_val_score(net, rows, labels, cv=KFold(5, shuffle=True, random_state=1), scoring="accuracy").mean())


def observations(folder, task):
    """Yield (x, reference draws) of every observation."""
    if folder is None:
        return
    held = np.load(folder / f"{task}.npz")
    for i in range(1, 1 + sum(name.startswith("x") for name in held.files)):
        yield torch.as_tensor(held[f"x{i}"], dtype=DTYPE), torch.as_tensor(held[f"theta{i}"], dtype=DTYPE)


def fitted(prior, simulate, n, seed, proposal=None):
    """Return the fit, and its CPU-seconds, those of simulating included."""
    begun = time.process_time()
    simulator = wk.Simulator(prior=prior, simulate=simulate, proposal=proposal)
    fit = wk.fit(wk.convert(simulator, n=n, seed=seed), wk.families.Flow(), seed=seed)
    return fit, time.process_time() - begun


def sbi_posterior(prior, simulate, n, seed):
    """Return sbi's amortised posterior with default settings and `nsf`, and its CPU-seconds of training."""
    from sbi.inference import NPE

    torch.manual_seed(seed)
    theta = prior.sample((n,))
    x = simulate(theta)
    narrow = type(prior.base_dist)(*(getattr(prior.base_dist, name).float() for name in prior.base_dist.arg_constraints))
    begun = time.process_time()
    inference = NPE(prior=Independent(narrow, 1), density_estimator="nsf", show_progress_bars=False)
    inference.append_simulations(theta.float(), x.float()).train()
    return inference.build_posterior(), time.process_time() - begun


def gaussian_kl(model, n=_ROWS):
    """Return E KL(p(θ|x) ‖ q(θ|x)) of the Gaussian linear task on fresh pairs, whose posterior is N(x/2, 0.05 I)."""
    torch.manual_seed(99)
    theta = TASKS["gaussian_linear"][0].sample((n,))
    x = gaussian_linear(theta)
    exact = MultivariateNormal(x / 2, 0.05 * torch.eye(10, dtype=DTYPE)).log_prob(theta)
    with torch.no_grad():
        gap = exact - model(x).log_prob(theta)
    return float(gap.mean()), float(gap.std()) / math.sqrt(n)


def calibrated(sets=100, n=1_000):
    """Return how many sets of simulations pass the exact Gaussian linear posterior, a biased and a narrow one."""
    prior, simulate = TASKS["gaussian_linear"]
    simulator = wk.Simulator(prior=prior, simulate=simulate)
    laws = {"exact": (0.0, 1.0), "biased by half an sd": (0.5, 1.0), "narrow by a fifth": (0.0, 0.8)}
    passed = dict.fromkeys(laws, 0)
    for seed in range(sets):
        made = simulator.run(n, seed=seed)
        for name, (bias, width) in laws.items():
            sd = math.sqrt(0.05)
            found = made.calibration(lambda x, m=bias * sd, s=width * sd: Independent(Normal(x / 2 + m, s), 1), seed=seed)
            passed[name] += not found.differs
    return passed


def measured(folder, task, n, seed, with_sbi):
    """Return the row of a task."""
    prior, simulate = TASKS[task]
    fit, seconds = fitted(prior, simulate, n, seed)
    scores, others = [], []
    posterior, sbi_seconds = sbi_posterior(prior, simulate, n, seed) if with_sbi else (None, None)
    for x, reference in observations(folder, task):
        torch.manual_seed(seed)
        with torch.no_grad():
            scores.append(c2st(reference, fit.model(x).sample((_ROWS,))[:, 0]))
        if posterior is not None:
            drawn = posterior.sample((_ROWS,), x=x.float(), show_progress_bars=False)
            others.append(c2st(reference, drawn.double()))
    row = {"task": task, "simulations": n, "c2st": scores, "cpu_s": round(seconds, 1)}
    row |= {"median": statistics.median(scores)} if scores else {}
    row |= {"calibration_p": fit.diagnostics.calibration.p_value, "findings": sorted(fit.findings)}
    if others:
        row |= {"sbi_c2st": others, "sbi_median": statistics.median(others), "sbi_cpu_s": round(sbi_seconds, 1)}
    if task == "gaussian_linear":
        row |= {"kl": gaussian_kl(fit.model), "of_100_sets_pass": calibrated()}
        for name, variance in (("variance", 0.2), ("sd", 0.4)):
            wide, spent = fitted(prior, simulate, n, seed, normal(variance))
            row |= {f"kl_from_twice_the_{name}": gaussian_kl(wide.model), f"cpu_s_from_twice_the_{name}": round(spent, 1)}
    return row


def main():
    """Measure the tasks, and print one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("references", type=Path, nargs="?")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sbi", action="store_true", help="compare with sbi's NPE, which must be installed")
    args = parser.parse_args()
    rows = []
    for task in args.tasks if args.references else ["gaussian_linear"]:
        rows.append(measured(args.references, task, args.simulations, args.seed, args.sbi))
        print(rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
