"""KL from two samples of 100,000 rows in 8 dimensions: all of `two_sample_kl` and the bare neighbour queries that it needs.

The bare queries are SciPy's `cKDTree` with default settings on all cores: build two trees, ask each for the
neighbours of every row of x.
scikit-learn's `NearestNeighbors(n_jobs=2)` is asked for a random tenth of the rows, and its time is multiplied by ten.
`python benchmarks/nearest_neighbors.py 10000` takes fewer rows.
"""

import json
import resource
import statistics
import sys
import time

import numpy as np
from scipy.spatial import cKDTree
from sklearn.neighbors import NearestNeighbors

from whichkl.divergences.samples.nearest_neighbors import two_sample_kl
from whichkl.divergences.samples.neighbors import point_estimate

K, DIM, SHARE = 5, 8, 10


def bare(x, y):
    cKDTree(x).query(x, K + 1, workers=-1)
    cKDTree(y).query(x, K, workers=-1)


def sklearn(x, y):
    few = x[np.random.default_rng(2).choice(len(x), len(x) // SHARE, False)]
    for rows, k in ((x, K + 1), (y, K)):
        NearestNeighbors(n_neighbors=k, n_jobs=2).fit(rows).kneighbors(few)


def timed(go, x, y):
    wall, cpu = time.perf_counter(), time.process_time()
    go(x, y)
    return time.perf_counter() - wall, time.process_time() - cpu


def main(n=100_000, rounds=3):
    rng = np.random.default_rng(0)
    x, y = 0.9 * rng.normal(size=(n, DIM)), rng.normal(size=(n, DIM))
    x[:, 0] += 1
    truth = DIM * (0.81 / 2 - 0.5 - np.log(0.9)) + 0.5
    two_sample_kl(x[:1000], y[:1000])  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = two_sample_kl(x, y)
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    ways = {
        "bare cKDTree queries": (bare, 1),
        "whichkl, value alone": (point_estimate, 1),
        "whichkl, all": (two_sample_kl, 1),
        "scikit-learn": (sklearn, SHARE),
    }
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (go, scale) in ways.items():
            times[way].append([scale * one for one in timed(go, x, y)])
    medians = {way: [statistics.median(column) for column in zip(*rows, strict=True)] for way, rows in times.items()}
    floor = medians["bare cKDTree queries"]
    for way, (wall, cpu) in medians.items():
        print(f"{way:<22} {wall:7.2f} s  {wall / floor[0]:5.2f} ×   CPU {cpu:7.2f} s  {cpu / floor[1]:5.2f} ×")
    print(f"{found.number}, truth {truth:.4f}, reliable {found.reliable}; {extra:,.0f} MB more at the peak")
    table = [{"way": way, "seconds": wall, "cpu_seconds": cpu} for way, (wall, cpu) in medians.items()]
    print(json.dumps({"benchmark": "nearest_neighbors", "rows": n, "dim": DIM, "k": K, "extra_mb": extra, "ways": table}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
