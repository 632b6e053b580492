"""A study of the textbook's two bumps: both directions and what lies between them, over one Gaussian and over two.

python study_bimodal.py [--full] [--out FOLDER]

--full: ten objectives from ten seeds, some minutes; figures in docs/studies.md.
"""

import argparse

import whichkl as wk

OBJECTIVES = ["forward_kl", "reverse_kl", "jeffreys:0.25", "jeffreys:0.5", "jeffreys:0.75"]
OBJECTIVES += ["jensen_shannon", "skew_forward_kl:0.1", "skew_reverse_kl:0.1", "renyi:0.5", "renyi:2"]

parser = argparse.ArgumentParser()
parser.add_argument("--full", action="store_true")
parser.add_argument("--out", default="out/bimodal")
options = parser.parse_args()

study = wk.compare(
    wk.problems.bimodal(half_distance=3.0),
    families=["gaussian", "mixture:2"],
    objectives=OBJECTIVES if options.full else ["forward_kl", "reverse_kl", "jeffreys:0.5"],
    seeds=10 if options.full else 2,
    metrics=["forward_kl", "reverse_kl", "jeffreys", "ess", "coverage", "calibration"],
    draws=10_000 if options.full else 1_000,
    out=options.out,
)
print(study)
print(study.verdict)
print(wk.report(study, f"{options.out}/report.html"))

rows = {(row["family"], row["objective"]): row for row in study.rows}
assert not study.failed
assert rows["gaussian", "forward_kl"]["missed"] == 0
assert rows["gaussian", "reverse_kl"]["missed"] == 1  # the other bump
assert all(row["jeffreys"] < 0.1 for (family, _), row in rows.items() if family == "mixture:2")  # which can be p itself
