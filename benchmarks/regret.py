"""Regret: what `advise` says for each of four needs, against the direction that an experiment finds best, on 59 problems.

Every problem has both accesses, and is fitted by forward and by reverse KL from six seeds. A need is judged by a measure that
neither direction minimises, save the last: coverage by the share of p's draws that q's come near to, precision by the share of
q's draws above the 1 % level of p's density, calibration by the worst gap of central intervals, and all in all by Jeffreys.
Run it as ``python benchmarks/regret.py [RESULTS.jsonl]`` (by default ``out/regret.jsonl``): problems that the file has are not
run again. Prints Markdown, and one JSON line last.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from scipy.stats import chi2
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import whichkl as wk
from whichkl.study.measures import Need
from whichkl.study.verdict import decide

D = torch.float64
SEEDS, DRAWS = 6, 2_000
NEEDS = (
    Need("coverage", ("coverage",), "nothing of p to be missed", less_is_better=False, relative=0.0),
    Need("precision", ("plausible",), "no draws where p has none", less_is_better=False, relative=0.0),
    Need("calibration", ("interval_gap",), "intervals that hold what they say", relative=0.0),
    Need("overall", ("jeffreys",), "q close to p in both directions"),
)
ADVISED = {"coverage": "forward_kl", "precision": "reverse_kl", "calibration": "forward_kl", "overall": "forward_kl"}
"""What `advise` says where both are possible: forward KL; if precision is what you need, reverse KL too."""


def student(dim, df):
    """A multivariate Student-t law: N(0, I) over the root of χ²/df."""
    constant = math.lgamma((df + dim) / 2) - math.lgamma(df / 2) - dim / 2 * math.log(df * math.pi)

    def draw(n, generator):
        z = torch.randn(n, dim, dtype=D, generator=generator)
        u = torch.rand(n, dtype=D, generator=generator)
        chi = torch.from_numpy(chi2.ppf(u.numpy(), df))
        return z / (chi / df).sqrt()[:, None]

    def log_prob(x):
        return constant - (df + dim) / 2 * torch.log1p(x.square().sum(-1) / df)

    return wk.Target(sampler=draw, log_prob=log_prob, dim=dim, normalized=True)


def correlated(dim, rho):
    """Equal correlations of all pairs."""
    cov = torch.full((dim, dim), rho, dtype=D) + (1 - rho) * torch.eye(dim, dtype=D)
    return MultivariateNormal(torch.zeros(dim, dtype=D), cov)


def clusters(dim, count, apart, weights=None):
    """Unit Gaussians on a circle of the first two coordinates, neighbours so far apart."""
    angle = 2 * math.pi * torch.arange(count, dtype=D) / count
    radius = apart / (2 * math.sin(math.pi / count))
    means = torch.zeros(count, dim, dtype=D)
    means[:, 0], means[:, 1] = radius * angle.cos(), radius * angle.sin()
    share = torch.ones(count, dtype=D) / count if weights is None else torch.tensor(weights, dtype=D)
    return MixtureSameFamily(Categorical(share), MultivariateNormal(means, torch.eye(dim, dtype=D).expand(count, dim, dim)))


def drawn(target, draw):
    """A planar problem with the draws that it lacks."""
    return wk.Target(sampler=draw, log_prob=target.log_prob, dim=target.dim, normalized=True)


def banana():
    def draw(n, generator):
        z = torch.randn(n, 2, dtype=D, generator=generator)
        return torch.stack([z[:, 0], z[:, 0].square() - 1 + 0.5 * z[:, 1]], 1)

    return drawn(wk.problems.banana(), draw)


def funnel(dim):
    def draw(n, generator):
        z = torch.randn(n, dim, dtype=D, generator=generator)
        return torch.cat([3 * z[:, :1], torch.exp(1.5 * z[:, :1] / 2) * z[:, 1:]], 1)

    return drawn(wk.problems.funnel(dim), draw)


def named(text):
    return lambda: plain(wk.problems.named(text))


def plain(law):
    """A distribution on the line without its normaliser: Jeffreys doesn't need it, and Monte Carlo is quicker than quadrature."""
    p = wk.Target.of(law)
    return wk.Target(sampler=p.sampler, log_prob=p.log_prob, dim=1, support=p.bijection.constraints)


PROBLEMS = [
    # name, target, family, dimension, tails, modes
    *(
        (f"two bumps, M = {m:g}", lambda m=m: plain(wk.problems.bimodal(m)), "gaussian", 1, "light", 2)
        for m in (1, 1.5, 2, 2.5, 3, 4)
    ),
    *(
        (f"two bumps, M = 3, {w:g} left", lambda w=w: plain(wk.problems.bimodal(3, w)), "gaussian", 1, "light", 2)
        for w in (0.7, 0.9)
    ),
    ("two bumps, M = 3", lambda: plain(wk.problems.bimodal(3)), "mixture:2", 1, "light", 2),
    ("three bumps", named("0.4*Normal(-4,1) + 0.3*Normal(0,1) + 0.3*Normal(4,1)"), "gaussian", 1, "light", 3),
    ("three bumps", named("0.4*Normal(-4,1) + 0.3*Normal(0,1) + 0.3*Normal(4,1)"), "mixture:2", 1, "light", 3),
    ("wide and narrow", named("0.5*Normal(0,1) + 0.5*Normal(0,5)"), "gaussian", 1, "heavy", 1),
    ("spike and slab", named("0.8*Normal(0,0.1) + 0.2*Normal(0,3)"), "gaussian", 1, "heavy", 1),
    ("spike and slab", named("0.8*Normal(0,0.1) + 0.2*Normal(0,3)"), "mixture:2", 1, "heavy", 1),
    *((f"Student-t, {df:g} df", named(f"StudentT({df:g},0,1)"), "gaussian", 1, "heavy", 1) for df in (2.5, 4, 8)),
    ("Student-t, 4 df", named("StudentT(4,0,1)"), "mixture:2", 1, "heavy", 1),
    ("Laplace", named("Laplace(0,1)"), "gaussian", 1, "heavy", 1),
    ("Laplace", named("Laplace(0,1)"), "mixture:2", 1, "heavy", 1),
    ("Gumbel", named("Gumbel(0,1)"), "gaussian", 1, "skew", 1),
    ("Gumbel", named("Gumbel(0,1)"), "mixture:2", 1, "skew", 1),
    ("gamma, shape 1.5", named("Gamma(1.5,1)"), "gaussian", 1, "skew", 1),
    ("gamma, shape 5", named("Gamma(5,1)"), "gaussian", 1, "skew", 1),
    ("beta(2, 5)", named("Beta(2,5)"), "gaussian", 1, "light", 1),
    ("beta(0.6, 0.6)", named("Beta(0.6,0.6)"), "gaussian", 1, "light", 2),
    *(
        (f"correlation {rho:g}", lambda d=d, rho=rho: correlated(d, rho), "gaussian:diagonal", d, "light", 1)
        for d, rho in ((2, 0.5), (2, 0.9), (2, 0.99), (10, 0.5), (10, 0.9), (40, 0.5))
    ),
    ("correlation 0.9", lambda: correlated(10, 0.9), "gaussian", 10, "light", 1),
    *(
        (f"Student-t, {df:g} df", lambda d=d, df=df: student(d, df), "gaussian", d, "heavy", 1)
        for d, df in ((2, 3.0), (2, 6.0), (10, 4.0), (20, 8.0))
    ),
    ("Student-t, 6 df", lambda: student(2, 6.0), "gaussian:diagonal", 2, "heavy", 1),
    ("banana", banana, "gaussian", 2, "skew", 1),
    ("banana", banana, "mixture:3", 2, "skew", 1),
    ("banana", banana, "gaussian:diagonal", 2, "skew", 1),
    ("funnel", lambda: funnel(2), "gaussian", 2, "heavy", 1),
    ("funnel", lambda: funnel(5), "gaussian", 5, "heavy", 1),
    *(
        (f"{k} clusters {gap:g} sd apart", lambda d=d, k=k, gap=gap: clusters(d, k, gap), family, d, "light", k)
        for d, k, gap, family in (
            (2, 2, 3.0, "gaussian"),
            (2, 2, 6.0, "gaussian"),
            (2, 4, 3.0, "gaussian"),
            (2, 4, 6.0, "gaussian"),
            (2, 4, 6.0, "mixture:2"),
            (2, 8, 3.0, "gaussian"),
            (2, 8, 3.0, "mixture:3"),
            (2, 6, 5.0, "gaussian:diagonal"),
            (5, 2, 5.0, "gaussian"),
            (5, 4, 5.0, "mixture:2"),
            (10, 3, 4.0, "gaussian"),
            (20, 2, 4.0, "gaussian"),
        )
    ),
    ("clusters of 90 % and 10 %", lambda: clusters(2, 2, 6.0, [0.9, 0.1]), "gaussian", 2, "light", 2),
    ("GMM-40", wk.problems.gmm40, "gaussian", 2, "light", 40),
    ("ManyWell", lambda: wk.problems.many_well(4), "gaussian", 4, "light", 4),
    ("ManyWell", lambda: wk.problems.many_well(8), "gaussian", 8, "light", 16),
]


def level(target):
    """The 1 % level of p's log density, and a metric: the share of q's draws that lie above it."""
    p = wk.Target.of(target)
    floor = p.log_prob(p.draws(20_000, seed=9_999)).detach().quantile(0.01)

    def plausible(model, draws):
        y = model.sample((4_000,)).reshape(4_000, -1)
        return float((p.log_prob(y) >= floor).double().mean())

    return plausible


def run(name, make, family, dim, tails, modes):
    target, begun = make(), time.perf_counter()
    metrics = ["jeffreys", "coverage", "calibration", level(target)]
    study = wk.compare(
        target, families=[family], objectives=["forward_kl", "reverse_kl"], seeds=SEEDS, draws=DRAWS, metrics=metrics
    )
    verdict, found = decide(study.rows, NEEDS), {}
    for need in NEEDS:
        column = need.columns[0]
        values = {
            one: [row[column] for row in study.rows if row["objective"] == one and row[column] is not None]
            for one in ("forward_kl", "reverse_kl")
        }
        means = {one: sum(mine) / len(mine) if mine else None for one, mine in values.items()}
        winner = next((one.winner for one in verdict.choices if one.need == need.name), None)
        found[need.name] = {"best": None if winner is None else winner.split(" · ")[1], **means}
    return {
        "problem": name,
        "family": family,
        "dim": dim,
        "tails": tails,
        "modes": modes,
        "advised": wk.advise(target, family).best.objective.name,
        "failed": len(study.failed),
        "seconds": round(time.perf_counter() - begun, 1),
        "needs": found,
    }


def regret(row, need):
    """What following the advice costs in the measure's own unit, above 0 where it was detectably the worse."""
    one, advised = row["needs"][need.name], ADVISED[need.name]
    if one["best"] in (None, advised):
        return 0.0
    gap = one[advised] - one[one["best"]]
    return gap if need.less_is_better else -gap


def table(rows):
    """Markdown: a line for each problem; what won, and in brackets what the advice cost where it missed."""
    lines = [f"| problem | d | family | {' | '.join(need.name for need in NEEDS)} |", "|---|---|---|---|---|---|---|"]
    short = {"forward_kl": "forward", "reverse_kl": "reverse", None: "–"}
    for row in rows:
        cells = []
        for need in NEEDS:
            lost = regret(row, need)
            shown = short[row["needs"][need.name]["best"]]
            cells.append(f"**{shown}** ({lost:.2g})" if lost else shown)
        failed = f", {row['failed']} cells failed" if row["failed"] else ""
        lines.append(f"| {row['problem']}{failed} | {row['dim']} | `{row['family']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows):
    """For each need: how often the advice won, tied and missed."""
    lines = [
        "| need | advised | won | no detectable difference | missed | median and worst regret of the misses |",
        "|---|---|---|---|---|---|",
    ]
    for need in NEEDS:
        best = [row["needs"][need.name]["best"] for row in rows]
        lost = sorted(one for one in (regret(row, need) for row in rows) if one)
        text = f"{lost[len(lost) // 2]:.2g} and {lost[-1]:.2g}" if lost else "–"
        won, ties = best.count(ADVISED[need.name]), best.count(None)
        lines.append(f"| {need.name} | {ADVISED[need.name]} | {won} | {ties} | {len(lost)} | {text} |")
    return "\n".join(lines)


def main():
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "out/regret.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(row["problem"], row["family"], row["dim"]) for row in rows}
    for problem in PROBLEMS:
        if (problem[0], problem[2], problem[3]) not in known:
            rows.append(run(*problem))
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(f"{len(rows)}/{len(PROBLEMS)} {problem[0]} {problem[2]} {rows[-1]['seconds']} s", file=sys.stderr, flush=True)
    print(summary(rows))
    print()
    print(table(rows))
    counts = {need.name: sum(regret(row, need) > 0 for row in rows) for need in NEEDS}
    print(json.dumps({"problems": len(rows), "misses": counts}))


if __name__ == "__main__":
    main()
