"""What a study costs beside its fits and scores: milliseconds a cell for the ledger, and seconds to resume and to read."""

import json
import tempfile
import time

import torch
from torch.distributions import Normal

import whichkl as wk
from whichkl.study import Study


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


def main(cells=200):
    torch.set_num_threads(1)
    overhead(3)
    beside, again, read = overhead(cells)
    line = {
        "cells": cells,
        "overhead_ms_per_cell": round(1e3 * beside / cells, 3),
        "resume_s": round(again, 3),
        "read_s": round(read, 3),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
