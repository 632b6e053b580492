"""A study of real posteriors, of which there are draws and densities: forward KL, reverse KL and Jeffreys over three families.

python study_posteriors.py [FOLDER] [--full] [--out FOLDER] [--only NAME]

The first FOLDER, or the environment variable WHICHKL_POSTERIORS, holds posteriordb's data (`data_*.json`) and reference draws
(`<name>.npz`). Without it there is one posterior: a logistic regression of scikit-learn's breast-cancer data, sampled by
particles. --full: three families from ten seeds, at 100,000 evaluations a cell; figures in docs/studies.md.
"""

import argparse
import os

import whichkl as wk
from whichkl.particles import Reference, temper
from whichkl.problems import POSTERIORS, posterior

MEASURES = ["forward_kl", "reverse_kl", "jeffreys", "ess", "khat", "coverage", "calibration"]


def breast_cancer(draws):
    """The posterior with draws: tempered particles, moved on until their moments stand still."""
    p = wk.problems.breast_cancer()
    bell = wk.fit(p, judge=False).model
    run = temper(p, Reference(bell.loc, 1.5 * bell.scale_tril), particles=draws, settle=True)
    assert run.finished and run.drift <= 1
    return wk.Target(samples=run.x, log_prob=p.log_prob, names=p.names)  # islands of equal weight, but for their Z


parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", default=os.environ.get("WHICHKL_POSTERIORS"))
parser.add_argument("--full", action="store_true")
parser.add_argument("--only", default="")
parser.add_argument("--out", default="out/posteriors")
options = parser.parse_args()

if options.folder is None:
    print("No folder of posteriors was named: the breast-cancer data's is built and drawn from here.")
    problems = {"breast cancer": lambda: breast_cancer(2_000 if options.full else 480)}
else:
    problems = {name: lambda name=name: posterior(name, options.folder, draws=True) for name in POSTERIORS}

for name, make in problems.items():
    if options.only not in name:
        continue
    out = f"{options.out}/{name.replace(' ', '_')}"
    study = wk.compare(
        make(),
        families=["gaussian", "gaussian:diagonal", "mixture:2"] if options.full else ["gaussian:diagonal"],
        objectives=["forward_kl", "reverse_kl", "jeffreys:0.5"] if options.full else ["forward_kl", "reverse_kl"],
        seeds=10 if options.full else 2,
        budget=100_000 if options.full else 50_000,
        metrics=MEASURES if options.full else MEASURES[:3],
        draws=4_000 if options.full else 1_000,
        out=out,
    )
    print(f"\n{name}\n{study}\n{study.verdict}\n{wk.report(study, f'{out}/report.html')}")
    assert not study.failed
    if not options.full:
        forward, reverse = study.rows[:2]
        assert reverse["reverse_kl"] < forward["reverse_kl"]  # each is good at what it minimises
        assert forward["forward_kl"] < reverse["forward_kl"]
