"""KL of two densities in a plane and in space, by quadrature: whichkl and SciPy's `cubature`, which gets the integrand alone.

SciPy integrates p log(p/q) over ℝᵈ by its own change of variables. whichkl, besides, checks that p and q integrate to one, looks
for mass that q misses and for tails that diverge, and integrates again from another partition.
"""

import json
import math
import time

import numpy as np
import torch
from scipy.integrate import cubature
from torch.distributions import (
    Categorical,
    Cauchy,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from whichkl import Target
from whichkl.divergences.exact.quadrature import kl

D = torch.float64
MOST = 4_000


def t(*values):
    return torch.tensor(values, dtype=D)


def mvn(mean, covariance):
    return MultivariateNormal(t(*mean), torch.tensor(covariance, dtype=D))


def pairs():
    tight, loose = mvn([0.0, 0.0], [[1.0, 0.9], [0.9, 1.0]]), mvn([1.0, -0.5], [[1.0, -0.3], [-0.3, 2.0]])
    yield "Gaussians, d = 2", tight, loose, float(kl_divergence(tight, loose))
    ridge = mvn([0.0, 3.0], [[1.0, 0.9995], [0.9995, 1.0]])
    yield "a ridge, d = 2", ridge, loose, float(kl_divergence(ridge, loose))
    kinks, normal = (Independent(one(t(0.0, 0.0), t(1.0, 1.0)), 1) for one in (Laplace, Normal))
    yield "Laplace and normal, d = 2", kinks, normal, 2 * (0.5 * math.log(2 * math.pi) - math.log(2))
    modes = MixtureSameFamily(
        Categorical(t(0.3, 0.7)),
        MultivariateNormal(
            t(-30.0, 50.0, 3.0, 0.0).reshape(2, 2), scale_tril=torch.stack([0.01 * torch.eye(2, dtype=D), torch.eye(2, dtype=D)])
        ),
    )
    wide = mvn([0.0, 0.0], [[1000.0, 0.0], [0.0, 1000.0]])
    both = modes.component_distribution
    parts = [MultivariateNormal(m, scale_tril=s) for m, s in zip(both.loc, both.scale_tril, strict=True)]
    yield (
        "a narrow mode, d = 2",
        modes,
        wide,
        sum(w * float(kl_divergence(one, wide) + math.log(w)) for w, one in zip((0.3, 0.7), parts, strict=True)),
    )
    heavy = Independent(Cauchy(t(0.0, 0.0, 0.0), t(1.0, 1.0, 1.0)), 1)
    three = Independent(Normal(t(0.0, 0.0, 0.0), t(1.0, 1.0, 1.0)), 1)
    yield "normal and Cauchy, d = 3", three, heavy, 3 * 0.2592445
    a = mvn([0.0, 0.0, 0.0], [[1.0, 0.9, 0.2], [0.9, 1.0, 0.3], [0.2, 0.3, 1.0]])
    b = mvn([1.0, -0.5, 0.0], [[1.0, -0.3, 0.0], [-0.3, 2.0, 0.5], [0.0, 0.5, 0.5]])
    yield "Gaussians, d = 3", a, b, float(kl_divergence(a, b))


def by_scipy(p, q, rule):
    dim, calls = p.event_shape[0], [0]

    def integrand(x):
        calls[0] += len(x)
        at = torch.from_numpy(np.ascontiguousarray(x))
        log_p = p.log_prob(at)
        return torch.where(log_p < -700, 0.0, log_p.exp() * (log_p - q.log_prob(at))).numpy()

    found = cubature(integrand, [-np.inf] * dim, [np.inf] * dim, rule=rule, rtol=1e-7, atol=1e-7, max_subdivisions=MOST)
    return float(found.estimate), found.status == "converged", calls[0]


def by_whichkl(p, q):
    one, other = Target.of(p), Target.of(q)
    found = kl(one, other)
    return found.value, found.exact, one.evaluations["log_prob"]


def main():
    by_whichkl(Normal(t(0.0)[0], t(1.0)[0]), Normal(t(1.0)[0], t(1.0)[0]))  # imports
    out = []
    for name, p, q, truth in pairs():
        for way, go in (
            ("whichkl", by_whichkl),
            ("SciPy, Gauss–Kronrod", lambda p, q: by_scipy(p, q, "gk15")),
            ("SciPy, Genz–Malik", lambda p, q: by_scipy(p, q, "genz-malik")),
        ):
            start = time.perf_counter()
            value, sure, points = go(p, q)
            seconds = time.perf_counter() - start
            out.append(
                {"pair": name, "way": way, "seconds": seconds, "points": points, "error": abs(value - truth), "sure": bool(sure)}
            )
            trust = "sure" if sure else "not sure"
            off = f"off by {abs(value - truth):.1e}"
            print(f"{name:26} {way:22} {seconds:7.2f} s {points:>12,} points   {off}   {trust}", flush=True)
    print(json.dumps({"benchmark": "quadrature", "cells": out}))


if __name__ == "__main__":
    main()
