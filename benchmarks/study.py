"""What a study costs in addition to its fits and scores: milliseconds per cell for the ledger, and seconds to resume and to read.

    python benchmarks/study.py [--cells 200] [--scaling] [--head]

--scaling: one study of cells that take more than a second, on one and on two workers. --head: what the one process that gives
out tasks and writes spends on a task and on a cell, with a thousand tasks under way; bytes of a cell on disk and in memory.
"""

import argparse
import hashlib
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch.distributions import Normal

import whichkl as wk
from whichkl.cluster import Ray
from whichkl.study import Study
from whichkl.study.cell import Outcome
from whichkl.study.ledger import Ledger


def overhead(cells):
    """Wall time of a study in a folder, less what its cells say that they took."""
    target = wk.Target.of(Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        study = wk.compare(target, "gaussian", "forward_kl", seeds=cells, metrics=["khat"], draws=100, out=folder)
        whole = time.perf_counter() - begun
        spent = sum(cell.seconds["total"] for cell in study.cells)
        begun = time.perf_counter()
        wk.compare(target, "gaussian", "forward_kl", seeds=cells, metrics=["khat"], draws=100, out=folder)
        again = time.perf_counter() - begun
        begun = time.perf_counter()
        Study.load(folder)
        return whole - spent, again, time.perf_counter() - begun


def scaling(workers, seeds):
    """Seconds until the first cell comes, from there to the last, and of all cells together."""
    came = []
    begun = time.perf_counter()

    def tell(progress):
        if progress.cell is not None:
            came.append(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder:
        study = wk.compare(
            wk.problems.breast_cancer(),
            "gaussian",
            "reverse_kl",
            seeds=seeds,
            metrics=["reverse_kl", "ess", "khat"],
            workers=workers,
            out=folder,
            tell=tell,
        )
    end, cells = time.perf_counter() - begun, [cell.seconds["total"] for cell in study.cells]
    cells_s, first = sum(cells), study.cells[0].seconds["total"]
    span = came[-1] - came[0] + first
    row = {"workers": workers, "cells": len(cells), "wall_s": end, "first_cell_s": came[0], "span_s": span}
    return row | {"cell_s": cells_s / len(cells), "longest_cell_s": max(cells), "busy": cells_s / (workers * span)}


class _Items:
    def __init__(self, count):
        self.left = count

    def take(self, workers):
        self.left -= 1
        return self.left if self.left >= 0 else None


def _nothing(item):
    return item


def head(tasks=5_000, cells=2_000):
    """Of the process that gives tasks out and writes cells: milliseconds a task and a cell, and bytes a cell."""
    ray = Ray("local", most=1_000)
    wall, cpu = None, 0.0
    for count in (1_000, tasks):  # the first have the workers started
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in _on_two(ray, count):
            pass
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row = {"task_ms": 1e3 * wall / tasks, "task_cpu_ms": 1e3 * cpu / tasks}
    with tempfile.TemporaryDirectory() as folder:
        study = wk.compare(wk.problems.gmm40(), "mixture:10", "forward_kl", seeds=1, out=Path(folder) / "one")
        place, found = study.cells[0].folder, study.cells[0]
        files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        files.pop("DONE")
        row |= {"cell_files": len(files) + 1, "cell_bytes": sum(map(len, files.values()))}
        wall, cpu = time.perf_counter(), time.process_time()
        with Ledger.opened(Path(folder) / "many", {}) as ledger:
            for k in range(cells):
                ledger.write(hashlib.sha256(str(k).encode()).hexdigest(), Outcome(found.row, files, found.seconds))
        row |= {"write_ms": 1e3 * (time.perf_counter() - wall) / cells, "write_cpu_ms": 1e3 * (time.process_time() - cpu) / cells}
        disk = sum(path.stat().st_blocks * 512 for path in (Path(folder) / "many").rglob("*"))
        again, before = Ledger(Path(folder) / "many"), _resident()
        begun = time.perf_counter()
        again.load()
        row |= {"disk_bytes": disk / cells, "read_ms": 1e3 * (time.perf_counter() - begun) / cells}
        row |= {"memory_bytes": (_resident() - before) / cells}
    return row


def _on_two(ray, count):
    """Trivial tasks on the two processes of a local Ray, a thousand of them under way."""
    import ray as package

    if not package.is_initialized():
        package.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return ray.as_completed(_nothing, _Items(count))


def _resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--head", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    line = {}
    if options.scaling:
        line["scaling"] = [scaling(workers, 16) for workers in (1, 2)]
    if options.head:
        line["head"] = head()
    if not line:
        overhead(3)
        seconds, again, read = overhead(options.cells)
        line = {"cells": options.cells, "overhead_ms_per_cell": 1e3 * seconds / options.cells, "resume_s": again, "read_s": read}
    print(json.dumps({"benchmark": "study", "cores": os.cpu_count(), **json.loads(json.dumps(line), parse_float=_short)}))


def _short(text):
    return float(f"{float(text):.4g}")


if __name__ == "__main__":
    main()
