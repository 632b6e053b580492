"""Where the time of everyday calls goes: the solver, each diagnostic, and the rest, next to the fastest bare fit.

The floor of a call is the fastest bare fit that we know: that of NumPy or scikit-learn, or the solver alone. Medians of rounds on
idle cores. `python benchmarks/everyday_parts.py [ROUNDS] [PART OF A NAME]`; by default three rounds of all fits.
"""

import json
import statistics
import sys
import time
import warnings
from collections import defaultdict

import everyday

from whichkl.diagnostics.judged_fit import Measured
from whichkl.fitting import run

PARTS = {
    "the gain of": "neighbours",
    "the value on": "value",
    "a model without": "value",
    "the two-sample test": "two-sample test",
    "the calibration": "calibration",
    "the ELBO": "ELBO",
    "a sample of the model": "ELBO",
    "the mass at missing modes": "missing modes",
}


class Watched:
    """Adds up the seconds of the solver and of each diagnostic, less those of the diagnostics inside it."""

    def __init__(self):
        self.seconds, self.inside = defaultdict(float), [0.0]

    def time(self, name, call):
        """Call a function, and add its seconds to those of `name`."""
        begin = time.perf_counter()
        self.inside.append(0.0)
        try:
            return call()
        finally:
            spent = time.perf_counter() - begin
            self.seconds[name] += spent - self.inside.pop()
            self.inside[-1] += spent

    def fit(self, call):
        """Call `fit`, and return the seconds of its parts."""
        solve, measure = run.solve, Measured.__call__

        def measured(one, what, function, otherwise):
            name = next((part for start, part in PARTS.items() if what.startswith(start)), "other diagnostics")
            return self.time(name, lambda: measure(one, what, function, otherwise))

        run.solve = lambda *args, **kwargs: self.time("solver", lambda: solve(*args, **kwargs))
        Measured.__call__ = measured
        try:
            begin = time.perf_counter()
            call()
            whole = time.perf_counter() - begin
        finally:
            run.solve, Measured.__call__ = solve, measure
        return {"whole": whole, **self.seconds, "rest": whole - sum(self.seconds.values())}


def main(rounds=3, part=""):
    warnings.simplefilter("ignore")
    figures = {}
    for name, ours, peer, _ in everyday.jobs():
        if part not in name or name.startswith(("estimate", "grid", "demo")):
            continue
        ours()  # the first call imports what it needs
        found = [Watched().fit(ours) for _ in range(rounds)]
        parts = {
            key: statistics.median(one.get(key, 0.0) for one in found) for key in dict.fromkeys(k for one in found for k in one)
        }
        bare = statistics.median(everyday.seconds(peer) for _ in range(rounds)) if peer else parts["solver"]
        figures[name] = {"floor": round(min(bare, parts["solver"]), 4), **{key: round(value, 4) for key, value in parts.items()}}
        shares = ", ".join(f"{key} {value / parts['whole']:.0%}" for key, value in parts.items() if key != "whole")
        print(f"{name:<28} {parts['whole']:6.3f} s, floor {figures[name]['floor']:6.3f} s: {shares}", flush=True)
    print(json.dumps({"benchmark": "everyday_parts", "rounds": rounds, "calls": figures}))


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, str), sys.argv[1:], strict=False)))
