"""Reverse KL by mean field from 10 to 10,000 dimensions, and as log p costs more: time, memory and evaluations, and the floor.

First the solver alone, compared with the time of its evaluations of log p and its gradient alone, at 64 points per call; then
the whole fit, which judges it on fresh draws, and up to 200 dimensions looks for missing modes and asks linear response.

A chain is Gaussian, xᵢ₊₁ ~ N(0.9 xᵢ, 1), and its optimum known, 1/√Λᵢᵢ; the posterior of a logistic regression has 500 rows, and
in 10 dimensions 50 to 50,000, by which one log density costs more.
Every fit runs in a process of its own, whose peak of memory is read.
"""

import json
import math
import resource
import subprocess
import sys
import time

DIMENSIONS, ROWS, RHO = (10, 100, 1_000, 10_000), (50, 500, 5_000, 50_000), 0.9


def chain(dim, _):
    import torch

    def log_prob(x):
        return -((1 - RHO**2) * x[:, 0] ** 2 + (x[:, 1:] - RHO * x[:, :-1]).square().sum(-1)) / 2

    scale = torch.full((dim,), 1 + RHO**2, dtype=torch.float64)
    scale[0] = scale[-1] = 1.0
    return log_prob, scale.rsqrt()


def logistic(dim, rows):
    import torch

    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(rows, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    chance = torch.sigmoid(x @ torch.randn(dim, generator=generator, dtype=torch.float64))
    y = (torch.rand(rows, generator=generator, dtype=torch.float64) < chance).to(torch.float64)

    def log_prob(b):
        score = b @ x.T
        return (y * score - torch.nn.functional.softplus(score)).sum(-1) - b.square().sum(-1) / 2

    return log_prob, None


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds_of(call):
    call()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[2]


def one(name, dim, rows):
    import torch

    import whichkl as wk

    log_prob, scale = globals()[name](dim, rows)
    wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2), wk.families.Gaussian("diagonal"))  # imports
    target, before, begin = wk.Target(log_prob=log_prob, dim=dim), peak(), time.perf_counter()
    fit = wk.fit(target, wk.families.Gaussian("diagonal"))
    row = {"target": name, "dim": dim, "rows": rows, "whole": time.perf_counter() - begin, "megabytes": peak() - before}
    row |= {"nodes": fit.diagnostics.nodes, "node_error": fit.diagnostics.node_error, "status": fit.status}
    target, begin = wk.Target(log_prob=log_prob, dim=dim), time.perf_counter()
    wk.solvers.MeanField().solve(target, wk.families.Gaussian("diagonal"), seed=0)
    row |= {"seconds": time.perf_counter() - begin, "gradients": target.evaluations["score"]}
    x = torch.randn(64, dim, dtype=torch.float64)
    row["floor"] = row["gradients"] * seconds_of(lambda: target.trial(x)) / 64
    if scale is not None:
        row["sd_error"] = float((fit.model.stddev / scale - 1).abs().max())
    print(json.dumps(row))


def main():
    table, heads = (
        [],
        ("dim", "rows", "µs a point", "seconds", "× floor", "gradients", "nodes", "node error", "whole fit", "MB", "sd error"),
    )
    print(f"{'target':<10}" + "".join(f"{head:>11}" for head in heads))
    asked = [(name, dim, 500) for name in ("chain", "logistic") for dim in DIMENSIONS]
    for name, dim, rows in [*asked, *(("logistic", 10, rows) for rows in ROWS)]:
        command = [sys.executable, __file__, name, str(dim), str(rows)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        table.append(row)
        cells = [f"{dim}", f"{rows:,}", f"{1e6 * row['floor'] / row['gradients']:.1f}", f"{row['seconds']:.2f}"]
        cells += [f"{row['seconds'] / row['floor']:.2f}", f"{row['gradients']}"]
        cells += [f"{row['nodes']}", f"{row['node_error']:.1e}", f"{row['whole']:.2f}", f"{row['megabytes']:.0f}"]
        cells += [f"{row['sd_error']:.1e}"] if "sd_error" in row else []
        print(f"{name:<10}" + "".join(f"{cell:>11}" for cell in cells), flush=True)
    print(json.dumps({"benchmark": "dimension", "rows": table}))


if __name__ == "__main__":
    one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) == 4 else main()
