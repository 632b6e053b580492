"""Everyday calls, each as a whole and with its judgement, and the peer that does the bare fit.

Medians of interleaved rounds. `python benchmarks/everyday.py [ROUNDS] [PART OF A NAME]`; by default five rounds of all. Run it on
idle cores.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import mixture
import numpy as np
import torch

import whichkl as wk
from whichkl._checks import require

POSTERIORS = Path(__file__).parents[2] / "shared" / "posteriors"


def normal(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def clusters(n, d, k, seed=0, distance=6.0):
    shape = np.random.default_rng(100 + k)
    centres = shape.normal(size=(k, d)) * distance
    rng = np.random.default_rng(seed)
    return centres[rng.integers(0, k, n)] + rng.normal(size=(n, d))


def gmm(k, n_init=1):
    return require("sklearn.mixture", "bench").GaussianMixture(k, n_init=n_init, random_state=0)


def bic_loop(x):
    return min((gmm(k, 5).fit(x) for k in range(1, 9)), key=lambda model: model.bic(x))


def moments(x):
    return x.mean(0), np.cov(x.T)


def labelled(n, d, seed=0):
    x = normal(n, d, seed)
    chance = 1 / (1 + np.exp(-(x @ np.linspace(-1, 1, d))))
    return x, (np.random.default_rng(seed + 1).random(n) < chance).astype(np.int64)


def logistic(x, y):
    return require("sklearn.linear_model", "bench").LogisticRegression(penalty=None).fit(x, y)


def search(estimator, grid, x):
    selection = require("sklearn.model_selection", "bench")
    return selection.GridSearchCV(estimator, grid, cv=5).fit(x)


def ours_searched(x):
    from whichkl.sklearn import DensityEstimator

    return search(DensityEstimator(), {"family": ["gaussian", "mixture:2", "mixture:3"]}, x)


def demo():
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "whichkl", "demo", "--out", folder], check=True, capture_output=True)


def jobs():
    """Yield a name, our call, the peer's call or None, and the bar: seconds as a function of the peer's."""
    small, wide, large = normal(1_000, 5), clusters(1_000, 5, 3), normal(100_000, 10)
    petals = wk.problems.petals()
    apart = clusters(100_000, 10, 8)
    many = mixture.rows(200_000, 1)
    pairs = labelled(10_000, 20)
    two = [torch.from_numpy(normal(1_000, 2, seed)) for seed in (1, 2)]
    line = [torch.from_numpy(normal(100_000, 1, seed)) for seed in (1, 2)]
    schools, cancer = wk.problems.eight_schools(), wk.problems.breast_cancer()
    bimodal = wk.problems.bimodal()
    yield "gaussian 150 x 2", lambda: wk.fit(small[:150, :2]), lambda: moments(small[:150, :2]), lambda peer: 0.12
    yield "gaussian 1,000 x 5", lambda: wk.fit(small), lambda: moments(small), lambda peer: 0.12
    yield "gaussian 100,000 x 10", lambda: wk.fit(large), lambda: moments(large), lambda peer: 3 * peer + 0.2
    yield "mixture:3 1,000 x 5", lambda: wk.fit(wide, "mixture:3"), lambda: gmm(3, 5).fit(wide), lambda peer: 2 * peer + 0.2
    yield "mixture:auto petals", lambda: wk.fit(petals, "mixture:auto"), lambda: bic_loop(values(petals)), lambda peer: peer + 0.3
    yield "mixture:auto 1,000 x 5", lambda: wk.fit(wide, "mixture:auto"), lambda: bic_loop(wide), lambda peer: peer + 0.3
    yield "mixture:8 of 8 clusters", lambda: wk.fit(apart, "mixture:8"), lambda: gmm(8).fit(apart), lambda peer: peer
    yield "mixture:8 of one Gaussian", lambda: wk.fit(large, "mixture:8"), lambda: gmm(8).fit(large), lambda peer: peer
    yield "mixture:16 200,000 x 16", lambda: wk.fit(many, "mixture:16"), lambda: gmm(16).fit(many), lambda peer: peer / 4
    yield "student_t 1,000 x 5", lambda: wk.fit(small, "student_t"), None, lambda peer: 1.0
    yield "product 1,000 x 5", lambda: wk.fit(small, "product"), None, lambda peer: 1.0
    family = "generalized_linear:bernoulli"
    yield "logistic 10,000 x 20", lambda: wk.fit(pairs, family), lambda: logistic(*pairs), lambda peer: 2 * peer + 0.2
    yield "eight schools", lambda: wk.fit(schools), None, lambda peer: 0.25
    if POSTERIORS.is_dir():
        kidscore = wk.problems.posterior("kidiq-kidscore_interaction", POSTERIORS)
        yield "kidscore", lambda: wk.fit(kidscore), None, lambda peer: 0.25
    yield "breast cancer", lambda: wk.fit(cancer), None, lambda peer: 0.6
    for objective in ("forward_kl", "reverse_kl"):
        yield f"bimodal, {objective}", lambda one=objective: wk.fit(bimodal, objective=one), None, lambda peer: 0.15
    yield "estimate 1,000 x 2", lambda: wk.estimate(p=two[0], q=two[1]), None, lambda peer: 0.3
    for name in ("forward_kl", "jensen_shannon", "total_variation", "energy", "sliced_wasserstein"):
        call = lambda one=name: wk.estimate(p=line[0], q=line[1], divergence=one)  # noqa: E731
        yield f"estimate {name} 100,000 x 1", call, None, lambda peer: 3.0
    grid = {"n_components": [1, 2, 3]}
    yield "grid search 1,000 x 5", lambda: ours_searched(small), lambda: search(gmm(1), grid, small), lambda peer: 2 * peer + 0.5
    yield "demo", demo, None, lambda peer: 8.0


def values(target):
    return target.samples.numpy()


def seconds(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(rounds=5, part=""):
    warnings.simplefilter("ignore")
    chosen = [job for job in jobs() if part in job[0]]
    times = {name: ([], []) for name, *_ in chosen}
    for _ in range(rounds):
        for name, ours, peer, _ in chosen:
            if not times[name][0]:
                ours()  # the first call imports what it needs
            times[name][0].append(seconds(ours))
            times[name][1].append(seconds(peer) if peer else float("nan"))
    figures = {}
    for name, _, _, bar in chosen:
        mine, theirs = (statistics.median(one) for one in times[name])
        limit = bar(theirs)
        figures[name] = {
            "seconds": round(mine, 4),
            "peer": None if theirs != theirs else round(theirs, 4),
            "bar": round(limit, 4),
        }
        print(
            f"{name:<36} {mine:8.3f} s   peer {theirs:8.3f} s   bar {limit:8.3f} s   {'' if mine <= limit else 'above'}",
            flush=True,
        )
    print(json.dumps({"benchmark": "everyday", "rounds": rounds, "jobs": figures}))


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, str), sys.argv[1:], strict=False)))
