"""Coverage on shapes that aren't Gaussian: how often the interval from samples holds the truth, pair by pair.

Tails, skew, ends of supports, bumps and mixtures in 1, 2 and 5 dimensions. Coverage is that of the 95 % interval among the
answers that call themselves reliable. Three ways are judged: the automatic answer from two samples and the classifier's, five
divergences each, and the forward KL from one sample and a density.

`python benchmarks/coverage_shapes.py 20 500 2000` makes 20 repeats at 500 and 2,000 rows. Words after these select the pairs
whose names contain one of them. A word that ends in `.jsonl` is the file of the cells, one repeat per line: cells that are
already in the file aren't computed again, so that an interrupted run resumes. With 0 repeats the table is printed from the file.
"""

import json
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy import stats
from shapes import DIVERGENCES, PAIRS, truths

import whichkl as wk
from whichkl.divergences.samples import nearest_neighbors, shape_twins

_BOUNDED = ("jensen_shannon", "total_variation")


def share_work():
    """Let the divergences of one pair of samples share neighbours and a classifier's fits, which no divergence changes."""
    known = {}
    fit, neighbors = shape_twins.cross_fit, nearest_neighbors.two_sample_kl

    def key_of(*tensors):
        return tuple(hash(one.numpy().tobytes()) for one in tensors)

    def fit_once(z, n, folds, full, generator, more=None):
        key = n, folds, *key_of(z, generator.get_state())
        if key not in known:
            known[key] = *fit(z, n, folds, full, generator, more=more), generator.get_state()
        ratio, parts, state = known[key]
        generator.set_state(state)
        return ratio.clone(), parts

    def neighbors_once(x, y, *, seed):
        key = seed, *key_of(x.samples, y.samples)
        if key not in known:
            known[key] = neighbors(x, y, seed=seed)
        return known[key]

    shape_twins.cross_fit, nearest_neighbors.two_sample_kl = fit_once, neighbors_once
    return known


_WORK = share_work()


def once(cell):
    """The answers of one repeat: "way, divergence" → [low, high, reliable, value, first note]."""
    name, rows, seed = cell
    _, p, q = PAIRS[name]
    rng = np.random.default_rng([sum(map(ord, name)), rows, seed])
    x, y = p.sample(rows, rng), q.sample(rows, rng)
    found = {}
    for divergence in DIVERGENCES:
        one = wk.estimate(p=x, q=y, divergence=divergence, seed=seed, method="classifier")
        found["classifier", divergence] = one
        found["automatic", divergence] = (
            one if divergence in _BOUNDED else wk.estimate(p=x, q=y, divergence=divergence, seed=seed)
        )
    density = wk.Target(log_prob=lambda z: q.log_prob(np.asarray(z)), dim=x.shape[1], normalized=True)
    found["one sample", "forward_kl"] = wk.estimate(p=x, q=density, seed=seed)
    _WORK.clear()
    answers = {
        ", ".join(key): [*one.interval, one.reliable, one.value, "" if one.reliable else next(iter(one.notes), "")]
        for key, one in found.items()
    }
    return cell, answers


@dataclass(frozen=True)
class Count:
    """How many of some answers are reliable, and how many of these cover the truth."""

    answers: int
    reliable: int
    covered: int

    @classmethod
    def of(cls, answers):
        """Count answers (name, divergence, [low, high, reliable, …])."""
        inside = [low <= truths(name)[kind] <= high for name, kind, (low, high, reliable, *_) in answers if reliable]
        return cls(len(answers), len(inside), sum(inside))

    @property
    def upper(self):
        """Upper end of the 95 % interval of the coverage (Clopper & Pearson, 1934), as if answers were independent."""
        return (
            1.0 if self.covered == self.reliable else float(stats.beta.ppf(0.975, self.covered + 1, self.reliable - self.covered))
        )

    def __str__(self):
        share = f"{self.reliable / self.answers:.0%} of {self.answers:,}"
        return f"{share} | {self.covered / max(self.reliable, 1):.0%} of {self.reliable:,}"


def table(answers):
    """Lines of a table by kind of pair and by divergence, and the pairs that cover less than 90 %, in short."""
    groups = {"all": answers}
    for kind in sorted({kind for kind, _, _ in PAIRS.values()}):
        groups[kind] = [one for one in answers if PAIRS[one[0]][0] == kind]
    groups |= {divergence: [one for one in answers if one[1] == divergence] for divergence in DIVERGENCES}
    lines = ["| answers | called reliable | cover |", "|---|---|---|"]
    lines += [f"| {label} | {Count.of(some)} |" for label, some in groups.items() if some]
    of_pair = {name: Count.of([one for one in answers if one[0] == name]) for name in PAIRS}
    low = {name: one for name, one in of_pair.items() if one.covered < 0.9 * one.reliable}
    listed = [
        f"{name.replace('|', '‖')} {one.covered} of {one.reliable}{'' if one.upper >= 0.9 else ' (surely below)'}"
        for name, one in low.items()
    ]
    rare = [name.replace("|", "‖") for name, one in of_pair.items() if one.reliable < 0.3 * one.answers]
    return [
        *lines,
        "",
        f"Pairs below 90 %: {', '.join(listed) or 'none'}.",
        f"Reliable less than 30 %: {', '.join(rare) or 'none'}.",
    ]


def computed(cells, file):
    """The answers of every cell: those in the file, and the others, which are added to it."""
    stored = {}
    if file is not None and file.exists():
        for line in file.read_text().splitlines():
            cell, answers = json.loads(line)
            stored[tuple(cell)] = answers
    left = [cell for cell in cells if cell not in stored]
    with multiprocessing.get_context("spawn").Pool(int(os.environ.get("PROCESSES", os.cpu_count() or 1))) as pool:
        for cell, answers in pool.imap_unordered(once, left):
            stored[cell] = answers
            if file is not None:
                with file.open("a") as out:
                    out.write(json.dumps([cell, answers]) + "\n")
    return stored


def main(repeats, sizes, words, file):
    names = [name for name in PAIRS if not words or any(word in name for word in words)]
    found = {}
    for (name, rows, _), answers in computed([(n, r, s) for r in sizes for s in range(repeats) for n in names], file).items():
        for key, answer in answers.items():
            way, divergence = key.split(", ")
            found.setdefault((rows, way), []).append((name, divergence, answer))
    out = []
    for (rows, way), answers in sorted(found.items()):
        repeats_of_pair = len(answers) / len({(name, kind) for name, kind, _ in answers})
        print(f"\n{rows:,} rows, {way}, {repeats_of_pair:.1f} repeats\n", *table(answers), sep="\n")
        out.append({"rows": rows, "way": way, "repeats": repeats_of_pair, **asdict(Count.of(answers))})
    print(json.dumps({"benchmark": "coverage_shapes", "cells": out}))


if __name__ == "__main__":
    numbers = [int(one) for one in sys.argv[1:] if one.isdigit()]
    files = [Path(one) for one in sys.argv[1:] if one.endswith(".jsonl")]
    words = [one for one in sys.argv[1:] if not (one.isdigit() or one.endswith(".jsonl"))]
    main(numbers[0] if numbers else 20, numbers[1:] or (500, 2_000), words, files[0] if files else None)
