"""A study of targets with many modes, forty Gaussians in the plane and 65,536 wells: what either direction reaches of them.

python study_many_modes.py [--full] [--out FOLDER] [--only NAME]

--full: GMM-40 and ManyWell-32 from ten seeds, at 200,000 evaluations a cell; figures in docs/studies.md.
"""

import argparse

import torch

import whichkl as wk
from whichkl.problems.synthetic import gmm40_means


def bumps(model, draws):
    """How many of the forty Gaussians hold at least a tenth of their share of the model's draws, within three of their sd."""
    y = torch.as_tensor(model.sample((20_000,)), dtype=torch.float64)
    distance, nearest = torch.cdist(y, gmm40_means()).min(1)
    held = torch.bincount(nearest[distance < 3 * 1.3133], minlength=40) / len(y)
    return int((held > 0.1 / 40).sum())


def wells(model, draws):
    """In how many pairs both wells hold at least a tenth of their share: 2 to the power of that many modes are reached."""
    left = (torch.as_tensor(model.sample((20_000,)))[:, ::2] < 0).double().mean(0)
    return int(((left > 0.1 * 0.1557) & (1 - left > 0.1 * 0.8443)).sum())


parser = argparse.ArgumentParser()
parser.add_argument("--full", action="store_true")
parser.add_argument("--only", default="")
parser.add_argument("--out", default="out/many_modes")
options = parser.parse_args()

studies = {
    "gmm40": (wk.problems.gmm40(), bumps, ["gaussian", "mixture:10", "mixture:40"] if options.full else ["mixture:10"]),
    "many_well": (
        wk.problems.many_well(32 if options.full else 4),
        wells,
        ["gaussian", "mixture:4:diagonal"] if options.full else ["mixture:2"],
    ),
}
for name, (target, reached, families) in studies.items():
    if options.only not in name:
        continue
    study = wk.compare(
        target,
        families=families,
        objectives=["forward_kl", "reverse_kl"],
        seeds=10 if options.full else 2,
        budget=200_000 if options.full else 20_000,
        metrics=["forward_kl", "reverse_kl", "jeffreys", "ess", "coverage", "calibration", reached],
        draws=4_000 if options.full else 1_000,
        out=f"{options.out}/{name}",
    )
    print(f"\n{name}\n{study}\n{study.verdict}\n{wk.report(study, f'{options.out}/{name}/report.html')}")
    assert not study.failed
