"""KL of 10,000 rows over 50,000 atoms in float32: ours, with all checks, one `torch.sum` over both arrays, and the peers.

SciPy takes chunks of 100 rows, as one would; `kl_div` takes all at once.
`python benchmarks/discrete_rows.py 1000` takes fewer rows.
"""

import json
import resource
import statistics
import sys
import time

import numpy as np
import torch
from scipy.special import rel_entr
from torch.nn.functional import kl_div

from whichkl.divergences.exact.discrete import rows
from whichkl.divergences.kinds import ForwardKLDivergence

ATOMS = 50_000


def simplex(n, seed):
    generator, out = torch.Generator().manual_seed(seed), torch.empty(n, ATOMS)
    for start in range(0, n, 100):
        out[start : start + 100].normal_(generator=generator)
        torch.softmax(out[start : start + 100], -1, out=out[start : start + 100])
    return out


def by_scipy(p, q):
    chunks = ((p[i : i + 100].numpy(), q[i : i + 100].numpy()) for i in range(0, len(p), 100))
    return torch.from_numpy(np.concatenate([rel_entr(a, b).sum(-1) for a, b in chunks]))


WAYS = {
    "torch.sum, the floor": lambda p, q: (p.sum(), q.sum()),
    "whichkl": lambda p, q: rows(p, q, ForwardKLDivergence()),
    "scipy rel_entr": by_scipy,
    "torch kl_div": lambda p, q: kl_div(q.log(), p, reduction="none").sum(-1),
}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(n=10_000, rounds=5):
    p, q = simplex(n, 0), simplex(n, 1)
    seconds, memory, values = {way: [] for way in WAYS}, {}, {}
    for way, go in WAYS.items():  # from the least memory up, so that the growth of the peak is what each way takes
        before, value = peak(), go(p, q)
        memory[way] = peak() - before
        if isinstance(value, torch.Tensor):
            values[way] = value
        del value
    sample = torch.arange(0, n, max(1, n // 50))
    exact = (p[sample].double() * (p[sample].double().log() - q[sample].double().log())).sum(-1)
    total_p, total_q = (one[sample].double().sum(-1) for one in (p, q))
    exact = exact / total_p + (total_q / total_p).log()
    error = {way: float((value[sample] / exact - 1).abs().max()) for way, value in values.items()}
    for _ in range(rounds):
        for way, go in WAYS.items():
            begin = time.perf_counter()
            go(p, q)
            seconds[way].append(time.perf_counter() - begin)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    floor = medians["torch.sum, the floor"]
    print(f"{n:,} rows of {ATOMS:,} atoms, {torch.get_num_threads()} threads, {2 * p.nbytes / 2**20:,.0f} MB of input")
    table = []
    for way, median in medians.items():
        row = {"way": way, "seconds": median, "ratio": median / floor, "extra_mb": memory[way], "error": error.get(way)}
        table.append(row)
        said = f"relative error {row['error']:.1e}" if way in error else ""
        print(f"{way:<22} {median:7.2f} s  {row['ratio']:6.1f} × the floor  {memory[way]:8,.0f} MB more at the peak  {said}")
    print(
        json.dumps({"benchmark": "discrete_rows", "rows": n, "atoms": ATOMS, "threads": torch.get_num_threads(), "ways": table})
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
