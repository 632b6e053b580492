"""Reverse KL to a full Gaussian on real posteriors: ours, NumPyro SVI, PyMC ADVI and blackjax Pathfinder.

    python benchmarks/reverse_posteriors.py [FOLDER] [--rounds 5] [--peers numpyro,pymc,blackjax] [--only NAME]

FOLDER holds posteriordb's data (`data_*.json`) and reference draws (`<name>.npz`); without it the Bayesian logistic
regression of scikit-learn's breast-cancer data (31 parameters) runs alone. NumPyro gets, for each posterior, the best
point of a grid of learning rates and step counts: the fastest whose ELBO lies within 0.01 nats of the best that any library
reaches, or of the grid's best where no point comes so far. All are scored by one ELBO on 100,000 draws from common normals.
Every timed run has a process of its own, as a user's first fit has: its seconds begin once the libraries are imported, and
include all compilation. In brackets stands a second run in the same process: what is compiled isn't compiled again. Ours
include every diagnostic, and stand next to ours without the search for modes that the fit misses (`judge=False`), which no peer
has; the floor is what the gradients of the former would take at 512 points a call.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import whichkl as wk
from whichkl.problems import POSTERIORS, posterior
from whichkl.problems.real_data import breast_cancer_rows

D = torch.float64
TOLERANCE = 0.01
OURS = ("whichkl", "unsearched")
RATES, STEPS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003), (1_000, 3_000, 10_000, 30_000, 100_000, 300_000)


def breast_cancer():
    """31 coefficients with N(0, 1) priors on standardised columns."""
    x, y = (part.numpy() for part in breast_cancer_rows()[:2])

    def theirs(m, u):
        z = m.dot(x, u)
        return (y * z - m.softplus(z)).sum() - 0.5 * (u**2).sum()

    return wk.problems.breast_cancer(), theirs


def density(name, folder):
    """The same density of one point, in what JAX and PyTensor have in common; `m` holds their functions."""
    data = json.loads((folder / f"data_{DATA[name]}.json").read_text())

    def cauchy(m, log_s, scale):
        return -m.log1p((m.exp(log_s) / scale) ** 2)

    def regression(x, y, prior):
        def value(m, u):
            return prior(m, u) - (len(y) - 1) * u[-1] - ((y - m.dot(x, u[:-1])) ** 2).sum() * m.exp(-2 * u[-1]) / 2

        return value

    if name == "arK-arK":
        y, k = np.array(data["y"]), data["K"]
        x = np.stack([np.ones(len(y) - k), *(y[k - 1 - i : len(y) - 1 - i] for i in range(k))], 1)
        return regression(x, y[k:], lambda m, u: -((u[:-1] / 10) ** 2).sum() / 2 + cauchy(m, u[-1], 2.5))
    if name == "kidiq-kidscore_interaction":
        y, hs, iq = (np.array(data[key], dtype=float) for key in ("kid_score", "mom_hs", "mom_iq"))
        return regression(np.stack([np.ones_like(iq), hs, iq, hs * iq], 1), y, lambda m, u: cauchy(m, u[-1], 2.5))
    if name == "nes1980-nes":
        c = {key: np.array(value, dtype=float) for key, value in data.items() if isinstance(value, list)}
        ages = [(c["age_discrete"] == k).astype(float) for k in (2, 3, 4)]
        x = [np.ones_like(c["income"]), c["real_ideo"], c["race_adj"], *ages, c["educ1"], c["gender"], c["income"]]
        return regression(np.stack(x, 1), c["partyid7"], lambda m, u: 0.0 * u[-1])
    if name.startswith("eight_schools"):
        y, s = np.array(data["y"], dtype=float), np.array(data["sigma"], dtype=float)

        def schools(m, u):
            prior = cauchy(m, u[9], 5.0) - (u[8] / 5) ** 2 / 2 + u[9]
            if name.endswith("noncentered"):
                return prior - (u[:8] ** 2).sum() / 2 - (((y - u[8] - m.exp(u[9]) * u[:8]) / s) ** 2).sum() / 2
            return prior - (((u[:8] - u[8]) * m.exp(-u[9])) ** 2).sum() / 2 - 8 * u[9] - (((y - u[:8]) / s) ** 2).sum() / 2

        return schools
    if name == "garch-garch11":
        y, first = np.array(data["y"]), data["sigma1"]
        n = len(y)
        lag = np.maximum(np.arange(n)[:, None] - np.arange(n), 0).astype(float)
        below = np.tril(np.ones((n, n)))

        def volatility(m, u):
            a, room = m.sigmoid(u[2]), m.sigmoid(-u[2])
            b = room * m.sigmoid(u[3])
            squared = (y - u[0]) ** 2
            into = m.concatenate([first**2 + 0 * u[:1], m.exp(u[1]) + a * squared[:-1]])
            s = m.dot(below * m.exp(lag * m.log(b)), into)
            jacobian = u[1] - m.softplus(-u[2]) - 2 * m.softplus(u[2]) - m.softplus(-u[3]) - m.softplus(u[3])
            return jacobian - (m.log(s) + squared / s).sum() / 2

        return volatility
    y = np.array(data["y"])

    def components(m, u):
        high = u[0] + m.exp(u[1])
        prior = -((u[0] / 2) ** 2 + (high / 2) ** 2) / 2 + u[1] + u[2] + u[3]
        prior = prior - ((m.exp(u[2]) / 2) ** 2 + (m.exp(u[3]) / 2) ** 2) / 2 - 5 * m.softplus(-u[4]) - 5 * m.softplus(u[4])
        one = -m.softplus(-u[4]) - u[2] - ((y - u[0]) * m.exp(-u[2])) ** 2 / 2
        two = -m.softplus(u[4]) - u[3] - ((y - high) * m.exp(-u[3])) ** 2 / 2
        return prior + (one + m.softplus(two - one)).sum()

    return components


BREAST_CANCER = "breast cancer"
DATA = {
    "arK-arK": "arK",
    "kidiq-kidscore_interaction": "kidiq",
    "eight_schools-noncentered": "eight_schools",
    "eight_schools-centered": "eight_schools",
    "garch-garch11": "garch",
    "low_dim_gauss_mix": "low_dim_gauss_mix",
    "nes1980-nes": "nes1980",
}


def elbo(target, loc, tril, n=100_000):
    """On common standard normals, with its standard error."""
    z = torch.randn(n, target.dim, generator=torch.Generator().manual_seed(20), dtype=D)
    loc, tril = (torch.as_tensor(np.array(part), dtype=D) if not torch.is_tensor(part) else part for part in (loc, tril))
    log_p = torch.cat([target.log_prob(x) for x in (loc + z @ tril.T).split(2_000)])
    value = log_p + tril.diagonal().abs().log().sum() + (0.5 * z.square().sum(-1)) + 0.5 * target.dim * math.log(2 * math.pi)
    return float(value.mean()), float(value.std()) / math.sqrt(n)


def ours(target, judge=True):
    begin = time.perf_counter()
    fit = wk.fit(target, judge=judge)
    seconds = time.perf_counter() - begin
    gradients = target.evaluations["score"]
    begin = time.perf_counter()
    wk.fit(target, judge=judge)
    again = time.perf_counter() - begin
    one = floor(target, fit, gradients)
    return {
        "seconds": seconds,
        "run": again,
        "loc": fit.model.loc,
        "tril": fit.model.scale_tril,
        "gradients": gradients,
        "floor": one,
    }


def floor(target, fit, gradients, calls=7):
    """The time of this number of gradients, by the shortest of some calls at 512 points."""
    x, seconds = fit.model.sample((512,)), []
    for _ in range(calls):
        begin = time.perf_counter()
        target.value_and_score(x)
        seconds.append(time.perf_counter() - begin)
    return gradients * min(seconds) / len(x)


def jax_functions():
    import jax
    import jax.numpy as jnp

    class M:
        exp, log, log1p, dot, concatenate = jnp.exp, jnp.log, jnp.log1p, jnp.dot, jnp.concatenate
        softplus, sigmoid = jax.nn.softplus, jax.nn.sigmoid

    return M


def numpyro_svi(value, dim, rate, steps, seed=0):
    """AutoMultivariateNormal, Adam, one particle a step; steps run in one compiled scan."""
    import jax
    import numpyro
    from numpyro.distributions import ImproperUniform, constraints
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoMultivariateNormal

    m = jax_functions()

    def model():
        u = numpyro.sample("u", ImproperUniform(constraints.real_vector, (), (dim,)))
        numpyro.factor("log_prob", value(m, u))

    begin = time.perf_counter()
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(rate), Trace_ELBO())
    state = svi.init(jax.random.PRNGKey(seed))
    run = jax.jit(lambda s: jax.lax.scan(lambda c, _: (svi.update(c)[0], None), s, None, length=steps)[0])
    end = jax.block_until_ready(run(state))
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    jax.block_until_ready(run(state))
    again = time.perf_counter() - begin
    parameters = svi.get_params(end)
    return {"seconds": seconds, "run": again, "loc": parameters["auto_loc"], "tril": parameters["auto_scale_tril"]}


def pathfinder(value, dim, seed=0):
    """Blackjax's single path with its defaults, from the same kind of start as NumPyro's."""
    import blackjax
    import jax

    m = jax_functions()
    begin = time.perf_counter()
    key = jax.random.PRNGKey(seed)
    start = jax.random.uniform(key, (dim,), minval=-2.0, maxval=2.0)
    run = jax.jit(lambda k, x: blackjax.vi.pathfinder.approximate(k, lambda u: value(m, u), x)[0])
    state = jax.block_until_ready(run(key, start))
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    jax.block_until_ready(run(key, start))
    again = time.perf_counter() - begin
    draws = np.array(blackjax.vi.pathfinder.sample(jax.random.PRNGKey(seed + 1), state, 20 * dim + 20_000)[0])
    covariance = np.cov(draws.T).reshape(dim, dim)
    return {"seconds": seconds, "run": again, "loc": draws.mean(0), "tril": np.linalg.cholesky(covariance)}


def advi(value, dim, steps=30_000, seed=0):
    """PyMC's full-rank ADVI with its default optimiser."""
    import pymc as pm
    import pytensor.tensor as pt

    class M:
        exp, log, log1p, dot, concatenate = pt.exp, pt.log, pt.log1p, pt.dot, pt.concatenate
        softplus, sigmoid = pt.softplus, pt.sigmoid

    begin = time.perf_counter()
    with pm.Model():
        u = pm.Flat("u", shape=dim)
        pm.Potential("log_prob", value(M, u))
        method = pm.FullRankADVI(random_seed=seed)
        method.fit(1, progressbar=False)
        compiled = time.perf_counter() - begin
        approximation = method.fit(steps, progressbar=False)
    seconds = time.perf_counter() - begin
    loc = approximation.mean.eval()
    return {"seconds": seconds, "run": seconds - compiled, "loc": loc, "tril": np.linalg.cholesky(approximation.cov.eval())}


def scored(target, row):
    if not all(math.isfinite(float(row[key].sum())) for key in ("loc", "tril")):
        return {**row, "elbo": -math.inf, "stderr": math.inf}
    value, stderr = elbo(target, row["loc"], row["tril"])
    return {**row, "elbo": value if math.isfinite(value) else -math.inf, "stderr": stderr}


def best_of_grid(target, value, dim, best):
    """The fastest grid point whose ELBO is within the tolerance of `best`, else of the grid's own; few steps are tried first."""
    rows = []
    for steps in STEPS:
        for rate in RATES:
            rows.append({**scored(target, numpyro_svi(value, dim, rate, steps)), "rate": rate, "steps": steps})
        best = max(best, *(row["elbo"] for row in rows))
        if any(row["elbo"] >= best - TOLERANCE for row in rows):
            break
    top = best if any(row["elbo"] >= best - TOLERANCE for row in rows) else max(row["elbo"] for row in rows)
    found = min((row for row in rows if row["elbo"] >= top - TOLERANCE), key=lambda row: row["seconds"])
    return {**found, "reached": top == best, "tried": len(rows)}


def read(name, folder):
    return breast_cancer() if name == BREAST_CANCER else (posterior(name, folder), density(name, folder))


def alone(options):
    """One run of one library, in this process alone; its last line is what it found."""
    target, value = read(options.only, options.folder)
    if options.one in ("numpyro", "blackjax"):
        import jax

        jax.config.update("jax_enable_x64", True)
    if options.one == "numpyro":
        import numpyro.infer.autoguide  # noqa: F401
    elif options.one == "blackjax":
        import blackjax  # noqa: F401
    elif options.one == "pymc":
        import pymc  # noqa: F401
    else:
        wk.fit  # noqa: B018
    if options.one in OURS:
        row = ours(target, judge=options.one == "whichkl")
    elif options.one == "numpyro":
        row = numpyro_svi(value, target.dim, options.rate, options.steps, options.seed)
    else:
        row = {"blackjax": pathfinder, "pymc": advi}[options.one](value, target.dim, seed=options.seed)
    print(json.dumps({key: np.asarray(part).tolist() for key, part in row.items()}))


def run(who, name, folder, seed, point=None):
    """The same in a process of its own."""
    command = [sys.executable, __file__, *([str(folder)] if folder else []), "--one", who, "--only", name, "--seed", str(seed)]
    if point:
        command += ["--rate", str(point["rate"]), "--steps", str(point["steps"])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return {key: np.array(part) if key in ("loc", "tril") else part for key, part in row.items()}


def median(rows):
    return {key: statistics.median(row[key] for row in rows) for key in ("seconds", "run", "elbo")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="numpyro,pymc,blackjax")
    parser.add_argument("--only")
    parser.add_argument("--points", type=Path, help="what an earlier run printed: its points of NumPyro's grid are taken")
    parser.add_argument("--one", help="a library to run once, as the rounds do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    if options.one:
        return alone(options)
    folder, peers = options.folder, [name for name in options.peers.split(",") if name]
    earlier = json.loads(options.points.read_text().splitlines()[-1])["rows"] if options.points else []
    known = {row["posterior"]: row["numpyro_point"] for row in earlier}
    if "numpyro" in peers:
        import jax

        jax.config.update("jax_enable_x64", True)
    table = []
    for name in [*(POSTERIORS if folder else ()), BREAST_CANCER]:
        if options.only and options.only not in name:
            continue
        target, value = read(name, folder)
        points = {}
        if "numpyro" in peers:
            points["numpyro"] = known.get(name) or best_of_grid(target, value, target.dim, scored(target, ours(target))["elbo"])
        runs = {who: [] for who in (*OURS, *peers)}
        for seed in range(options.rounds):
            for who, found in runs.items():
                found.append(scored(target, run(who, name, folder, seed, points.get(who))))
        last = runs["whichkl"][-1]
        row = {"posterior": name} | {who: median(found) for who, found in runs.items()}
        row |= {key: last[key] for key in ("gradients", "floor", "stderr")}
        if folder and (folder / f"{name}.npz").exists():
            with np.load(folder / f"{name}.npz") as file:
                row["mean_off"] = float(np.abs((last["loc"] - file["mean"]) / file["sd"]).max())
        row |= {
            f"{who}_point": {key: point[key] for key in ("rate", "steps", "reached", "tried")} for who, point in points.items()
        }
        table.append(row)
        line = f"{name:<27} {row['gradients']:7d} gradients (floor {row['floor']:.2f} s)"
        for who in runs:
            line += f"   {who} {row[who]['seconds']:6.2f} s ({row[who]['run']:.2f}) {row[who]['elbo']:11.4f}"
            line += f" {told(row, who)}" if who in peers else ""
        print(line, row.get("numpyro_point", ""), flush=True)
    mean = {
        who: {part: math.exp(statistics.mean(math.log(row[who][part]) for row in table)) for part in ("seconds", "run")}
        for who in (*OURS, *peers)
    }
    print("less time by, in the geometric mean: " + ", ".join(f"{who} {told(mean, who)}" for who in peers))
    print(json.dumps({"benchmark": "reverse_posteriors", "rows": table, "geometric_mean": mean}))


def told(row, who):
    """By how much ours takes less time, with every diagnostic / without the search; in brackets second runs."""
    ratio = [[row[who][part] / row[our][part] for our in OURS] for part in ("seconds", "run")]
    return "{:.1f} / {:.1f} x ({:.1f} / {:.1f} x)".format(*ratio[0], *ratio[1])


if __name__ == "__main__":
    main()
