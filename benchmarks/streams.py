"""Closed-form Gaussian over a folder of Parquet: memory and time compared with reading the same files by the same iterator.

`python benchmarks/streams.py 1 2 1x8` takes 1, 2 and 1 gigabytes (10⁹ bytes of float64), one after another, in 16 columns by
default and in 8 for the last; pyarrow writes them to a temporary folder in its usual way. Each measurement is a process of its
own; the peak is what its resident memory grew beyond that after the imports. The first round is not counted, so that all find
the files in the page cache.
The closed form is compared with the reading in its own process, taken in turns.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD = 1_000_000
WAYS = ("parquet", "read", "closed_form")


def write(folder, gigabytes, columns):
    import pyarrow as pa
    import pyarrow.parquet

    rng, left = np.random.default_rng(0), int(gigabytes * 1e9 / 8 / columns)
    mixing = np.eye(columns) + 0.1 * rng.standard_normal((columns, columns))
    x = rng.standard_normal((SHARD, columns)) @ mixing
    for shard in range(-(-left // SHARD)):
        rows = x[: min(SHARD, left - shard * SHARD)] + 0.01 * shard
        table = pa.table({f"x{i + 1}": rows[:, i] for i in range(columns)})
        pyarrow.parquet.write_table(table, folder / f"{shard:05d}.parquet")


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def drain(blocks):
    return sum(len(block) for block in blocks)


def bare(path):
    """Decode a file by pyarrow alone, as the parts do, and make nothing of it."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=65_536, pre_buffer=False) as file:
        return sum(len(batch) for batch in file.iter_batches(batch_size=16_384, use_threads=False))


def measure(way, folder, rounds):
    import pyarrow.parquet  # noqa: F401

    import whichkl as wk
    from whichkl.cluster import Threads
    from whichkl.solvers import ClosedForm
    from whichkl.solvers.rows.rows import HELD

    before = peak()
    family, target = wk.families.Gaussian(), wk.Target.of(folder)
    rows, free = target.stream.rows, target.unconstrained()
    go = {
        "parquet": lambda: sum(Threads().map(bare, sorted(map(str, Path(folder).iterdir())))),
        "read": lambda: sum(Threads().map(_drain_part, target.stream.parts)),
        "closed_form": lambda: ClosedForm().solve(free, family, 0, stride=rows // HELD),
    }
    seconds, busy = {"read": [], way: []}, {"read": [], way: []}
    for _ in range(rounds):
        for one in dict.fromkeys(["read", way] if way == "closed_form" else [way]):  # turns taken, so that drifts cancel
            begin, used = time.perf_counter(), time.process_time()
            go[one]()
            seconds[one].append(time.perf_counter() - begin)
            busy[one].append(time.process_time() - used)
    found = {"seconds": min(seconds[way]), "cpu": min(busy[way]), "extra_mb": peak() - before, "rows": rows}
    if way == "closed_form":
        found |= {"ratio": min(seconds[way]) / min(seconds["read"]), "cpu_ratio": min(busy[way]) / min(busy["read"])}
    print(json.dumps(found))


def _drain_part(part):
    return drain(part.blocks())


def main(cases, rounds=5):
    table = []
    for gigabytes, columns in cases:
        with tempfile.TemporaryDirectory() as name:
            # in a process of its own: a child's peak begins at its parent's
            subprocess.run([sys.executable, __file__, "--write", name, str(gigabytes), str(columns)], check=True)
            found = {way: [] for way in WAYS}
            for number in range(rounds + 1):
                for way in WAYS:
                    command = [sys.executable, __file__, "--measure", way, name]
                    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                    found[way] += [done] if number else []
        middle = {key: {way: statistics.median(one[key] for one in found[way]) for way in WAYS} for key in ("seconds", "cpu")}
        for way in WAYS:
            row = {"gigabytes": gigabytes, "columns": columns, "rows": found[way][0]["rows"], "way": way}
            row |= {"seconds": middle["seconds"][way], "ratio": middle["seconds"][way] / middle["seconds"]["read"]}
            row |= {"cpu": middle["cpu"][way], "cpu_ratio": middle["cpu"][way] / middle["cpu"]["read"]}
            row |= {
                key: statistics.median(one[key] for one in found[way]) for key in ("ratio", "cpu_ratio") if key in found[way][0]
            }
            row["extra_mb"] = max(one["extra_mb"] for one in found[way])
            table.append(row)
            print(
                f"{gigabytes:4g} GB in {columns} columns  {row['rows']:11,} rows  {way:<11} {row['seconds']:6.2f} s"
                f"  {row['ratio']:4.2f} × reading  {row['cpu']:6.2f} CPU s  {row['cpu_ratio']:4.2f} ×"
                f"  {row['extra_mb']:4.0f} MB more at the peak",
                flush=True,
            )
    print(json.dumps({"benchmark": "streams", "cores": os.cpu_count(), "ways": table}))


def _case(text):
    size, _, columns = text.partition("x")
    return float(size), int(columns or 16)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], 2)
    elif sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
    else:
        main([_case(text) for text in sys.argv[1:]] or [(0.25, 16)])
