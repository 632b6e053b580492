"""What samples alone are worth: bias, error and coverage of the KL from two samples, by dimension and number of rows.

p is Gaussian with standard deviations 0.9 and a mean at distance 1, q standard normal. Three answers are judged: nearest
neighbours, the classifier, and the automatic one, which is the first of the two that calls itself reliable. Coverage is that of
the 95 % interval among the answers that call themselves reliable.

`python benchmarks/intervals.py 200 100 3` makes 200, 100 and 3 repeats at 1,000, 10,000 and 100,000 rows: an hour or more;
numbers after these are dimensions.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

import whichkl as wk

DIMENSIONS, ROWS = (1, 5, 10, 20, 50), (1_000, 10_000, 100_000)
WAYS = ("knn", "classifier", "automatic")


def truth(dim):
    return 0.5 + dim * (0.81 / 2 - 0.5 - math.log(0.9))


def once(cell):
    dim, rows, seed = cell
    rng = np.random.default_rng([dim, rows, seed])
    x, y = 0.9 * rng.normal(size=(rows, dim)) + 1 / math.sqrt(dim), rng.normal(size=(rows, dim))
    start = time.perf_counter()
    found = {way: wk.estimate(p=x, q=y, method=way, seed=seed) for way in WAYS[:2]}
    found["automatic"] = next((one for one in found.values() if one.reliable), found["knn"])
    answers = {way: (one.value, *one.interval, one.reliable) for way, one in found.items()}
    return dim, rows, answers, time.perf_counter() - start


def judged(way, dim, answers):
    """Bias over all answers; coverage over those that call themselves reliable."""
    values = [answer[way][0] for answer in answers]
    trusted = [answer[way] for answer in answers if answer[way][3]]
    inside = sum(low <= truth(dim) <= high for _, low, high, _ in trusted)
    return {
        "bias": statistics.fmean(values) - truth(dim),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "reliable": len(trusted) / len(values),
        "coverage": inside / len(trusted) if trusted else None,
    }


def main(repeats, dimensions):
    cells = [(dim, rows, seed) for rows, many in zip(ROWS, repeats, strict=True) for dim in dimensions for seed in range(many)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        table = {}
        for dim, rows, answers, seconds in pool.imap(once, cells):
            table.setdefault((rows, dim), []).append((answers, seconds))
    out = []
    print("| rows | d | truth | method | bias | sd | called reliable | coverage |\n|---|---|---|---|---|---|---|---|")
    for (rows, dim), all_of_it in table.items():
        for way in WAYS:
            one = judged(way, dim, [answers for answers, _ in all_of_it])
            sd = "" if one["sd"] is None else f"{one['sd']:.3f}"
            covered = "" if one["coverage"] is None else f"{one['coverage']:.1%}"
            print(
                f"| {rows:,} | {dim} | {truth(dim):.3f} | {way} | {one['bias']:+.3f} | {sd} | {one['reliable']:.0%} | {covered} |"
            )
            out.append({"rows": rows, "dim": dim, "truth": truth(dim), "way": way, "repeats": len(all_of_it), **one})
        out[-1]["seconds"] = statistics.fmean(seconds for _, seconds in all_of_it)
    print(json.dumps({"benchmark": "intervals", "repeats": repeats, "cells": out}))


if __name__ == "__main__":
    given = [int(one) for one in sys.argv[1:]]
    main(given[:3] or [20, 4, 0], given[3:] or DIMENSIONS)
