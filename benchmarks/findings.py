"""What the judgement of a fit finds: 88 fits whose families are right, too small or too rich, with false alarms and misses.

`python benchmarks/findings.py [BEFORE.json]` prints a line for each fit and compares the findings with those of an earlier run.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch

import whichkl as wk

RIGHT, SMALL, RICH, MODES, NARROW = None, "family_too_small", "family_too_rich", "modes_missing", "variances_understated"


def normal(n, d, seed, scale=1.0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n, d, seed):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n, d, seed):
    mix = torch.eye(d, dtype=torch.float64) + 0.6 * normal(d, d, 99)
    return normal(n, d, seed) @ mix


def clusters(n, d, k, seed, distance=6.0):
    centres = normal(k, d, 7 + k, distance / math.sqrt(2))
    which = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed + 1))
    return centres[which] + normal(n, d, seed)


def student(n, d, df, seed):
    chi = torch.distributions.Gamma(df / 2, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 2)
        scale = (chi.sample((n, 1)).to(torch.float64) / df).sqrt()
    return normal(n, d, seed) / scale


def banana(n, seed):
    z = normal(n, 2, seed)
    return torch.stack([z[:, 0], z[:, 1] + z[:, 0].square()], 1)


def ring(n, seed):
    angle = 2 * math.pi * uniform(n, 1, seed)
    return 4 * torch.cat([angle.cos(), angle.sin()], 1) + normal(n, 2, seed + 1, 0.3)


def rows_cases():
    """Yield (name, target, family, what is wrong with the family)."""
    for n in (150, 1_000, 4_000):
        for d in (2, 5):
            yield f"normal {n}×{d}", normal(n, d, 1), "gaussian:diagonal", RIGHT
            yield f"correlated {n}×{d}", correlated(n, d, 2), "gaussian", RIGHT
            yield f"correlated {n}×{d}", correlated(n, d, 2), "gaussian:diagonal", SMALL
            yield f"2 clusters {n}×{d}", clusters(n, d, 2, 3), "gaussian", SMALL
            yield f"2 clusters {n}×{d}", clusters(n, d, 2, 3), "mixture:2", RIGHT
            yield f"3 clusters {n}×{d}", clusters(n, d, 3, 4), "mixture:2", SMALL
            yield f"3 clusters {n}×{d}", clusters(n, d, 3, 4), "mixture:3", RIGHT
            yield f"correlated {n}×{d}", correlated(n, d, 5), "mixture:5", RICH
    for n in (500, 2_000):
        yield f"student 3 df {n}×3", student(n, 3, 3.0, 6), "student_t", RIGHT
        yield f"student 3 df {n}×3", student(n, 3, 3.0, 6), "gaussian", SMALL
        yield f"normal {n}×3", normal(n, 3, 7), "student_t", RIGHT
        yield f"lognormal {n}×2", normal(n, 2, 8).exp(), "gaussian", SMALL
        yield f"uniform {n}×2", uniform(n, 2, 9), "gaussian", SMALL
        yield f"banana {n}", banana(n, 10), "gaussian", SMALL
        yield f"ring {n}", ring(n, 11), "mixture:3", SMALL
        yield f"normal {n}×2", normal(n, 2, 12), "product", RIGHT
    for family, wrong in (("gaussian", SMALL), ("mixture:2", RIGHT), ("mixture:4", RICH)):
        yield "2 clusters 20000×3", clusters(20_000, 3, 2, 21), family, wrong
    for family, wrong in (("gaussian", RIGHT), ("mixture:4", RICH)):
        yield "correlated 20000×3", correlated(20_000, 3, 22), family, wrong
    for family, wrong in (("gaussian", SMALL), ("student_t", RIGHT)):
        yield "student 3 df 20000×3", student(20_000, 3, 3.0, 23), family, wrong
    yield "16 clusters 40000×8", clusters(40_000, 8, 16, 24), "mixture:16", RIGHT
    x = clusters(900, 2, 2, 13)
    weights = 0.5 + uniform(900, 1, 14)[:, 0]
    yield "weighted clusters", wk.Target(samples=x, weights=weights), "gaussian", SMALL
    yield "weighted clusters", wk.Target(samples=x, weights=weights), "mixture:2", RIGHT
    yield "repeated rows", normal(400, 3, 15).repeat(3, 1), "gaussian", RIGHT
    chain = normal(2_000, 2, 16)
    for i in range(1, len(chain)):
        chain[i] += 0.9 * chain[i - 1]
    yield "chains", wk.Target(samples=chain, chains=4), "gaussian", RIGHT
    contexts = normal(1_000, 3, 17)
    line = contexts @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + normal(1_000, 1, 18)[:, 0]
    yield "a line", wk.Target(samples=(contexts, line)), wk.families.LinearGaussian(), RIGHT
    bent = contexts[:, 0].square() * 2 + 0.3 * normal(1_000, 1, 19)[:, 0]
    yield "a parabola", wk.Target(samples=(contexts, bent)), wk.families.LinearGaussian(), SMALL
    counts = torch.poisson(contexts[:, 0].clamp(-2, 2).exp(), generator=torch.Generator().manual_seed(20)).long()
    yield "counts", wk.Target(samples=(contexts, counts)), "generalized_linear:poisson", RIGHT


def density_cases():
    """Yield the same for log densities."""

    def of(law, dim):
        return wk.Target(log_prob=law.log_prob, dim=dim)

    def laws(centres, widths, probs):
        parts = torch.distributions.Independent(torch.distributions.Normal(centres, widths), 1)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(probs), parts)

    double = {"dtype": torch.float64}
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]], **double)
    oblong = torch.distributions.MultivariateNormal(torch.zeros(2, **double), cov)
    far = laws(torch.tensor([[-4.0, 0.0], [4.0, 0.0]], **double), torch.ones(2, 2, **double), torch.tensor([0.3, 0.7], **double))
    yield "oblong density", of(oblong, 2), "gaussian", RIGHT
    yield "oblong density", of(oblong, 2), "gaussian:diagonal", NARROW
    yield "two modes", of(far, 2), "gaussian", SMALL
    yield "two modes", of(far, 2), "mixture:2", RIGHT
    light = laws(torch.tensor([[0.0] * 3, [12.0] * 3], **double), torch.ones(2, 3, **double), torch.tensor([0.4, 0.6], **double))
    yield "a far mode", of(light, 3), "gaussian", SMALL

    def funnel(x):
        return -x[:, 0].square() / 18 - (x[:, 1:].square() * (-x[:, :1]).exp() + x[:, :1]).sum(1) / 2

    yield "funnel", wk.Target(log_prob=funnel, dim=3), "gaussian", SMALL
    tails = wk.Target(log_prob=lambda x: -1.5 * torch.log1p(x.square()).sum(-1), dim=2)
    yield "heavy tails", tails, "gaussian", SMALL
    quartic = wk.Target(log_prob=lambda x: -x.pow(4).sum(-1), dim=2)
    yield "light tails", quartic, "gaussian", RIGHT
    many = laws(6 * normal(5, 2, 21), torch.ones(5, 2, **double), torch.full((5,), 0.2, **double))
    yield "five modes", of(many, 2), "gaussian", SMALL


def main(before=None):
    earlier = json.loads(Path(before).read_text())["findings"] if before else {}
    found, seconds, alarms, misses, changed = {}, 0.0, [], [], []
    for name, target, family, wrong in [*rows_cases(), *density_cases()]:
        key, start = f"{name} · {family}", time.process_time()
        fit = wk.fit(target, family)
        spent = time.process_time() - start
        seconds += spent
        findings = found[key] = sorted(fit.findings)
        verdicts = {SMALL, RICH} & set(findings)
        if wrong is RIGHT and verdicts:
            alarms.append(key)
        if wrong is not RIGHT and wrong not in findings:
            misses.append(key)
        if before and earlier.get(key) != findings:
            changed.append(key)
        mark = "changed" if key in changed else "alarm" if key in alarms else "missed" if key in misses else ""
        print(f"{key:<50} {wrong or 'right':<22} {spent:6.2f} s  {', '.join(findings):<60} {mark}", flush=True)
    for key in changed:
        print(f"changed: {key}: {earlier.get(key)} → {found[key]}")
    figures = {"fits": len(found), "cpu_seconds": round(seconds, 2), "false_alarms": alarms, "misses": misses}
    print(json.dumps({"benchmark": "findings", **figures, "findings": found}, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:2])
