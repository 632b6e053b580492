"""What a fit costs as the rows grow, from 10⁴ to 10⁷ in 16 dimensions: the solver alone, and `fit` with its judging.

The rows are those of benchmarks/mixture.py. `python benchmarks/growth.py 4 7` goes from 10⁴ to 10⁷ rows (the largest take some
gigabytes of memory and a few minutes); by default it stops at 10⁵.
"""

import json
import sys
import time

from mixture import COUNT, DIM, rows

import whichkl as wk
from whichkl.families import Gaussian, Mixture
from whichkl.solvers import ClosedForm, ExpectationMaximization


def timed(job):
    start = time.perf_counter()
    result = job()
    return time.perf_counter() - start, result


def main(first, last):
    out = []
    print("| rows | Gaussian, solver | Gaussian, `fit` | Mixture(16), solver | its E steps | Mixture(16), `fit` |")
    print("|---|---|---|---|---|---|")
    wk.fit(rows(1_000, 1), Gaussian())
    for power in range(first, last + 1):
        x = rows(10**power, 1)
        target = wk.Target(samples=x)
        gaussian, _ = timed(lambda target=target: ClosedForm().solve(target, Gaussian(), 0))
        judged, _ = timed(lambda target=target: wk.fit(target, Gaussian()))
        mixture, solution = timed(lambda target=target: ExpectationMaximization().solve(target, Mixture(COUNT), 0))
        whole, _ = timed(lambda target=target: wk.fit(target, Mixture(COUNT)))
        print(
            f"| 10^{power} | {gaussian:.2f} s | {judged:.2f} s | {mixture:.1f} s | {solution.iterations} | {whole:.1f} s |",
            flush=True,
        )
        row = {"rows": 10**power, "gaussian": gaussian, "gaussian_fit": judged, "mixture": mixture, "mixture_fit": whole}
        out.append({**row, "steps": solution.iterations})
    print(json.dumps({"benchmark": "growth", "dim": DIM, "components": COUNT, "rows": out}))


if __name__ == "__main__":
    given = [int(one) for one in sys.argv[1:]]
    main(*(given if len(given) == 2 else (4, 5)))
