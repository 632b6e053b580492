"""Handwritten digits: a convolutional teacher, students of three sizes, every objective from ten seeds; which direction won.

The teacher learns from two thirds of the 1,797 images; so do the students, less a tenth to stop by, from its probabilities
alone. The last third scores them, and none has seen it. Split and teacher are the same throughout, a seed fixes a student's
starting weights and the order of the images, so that objectives are compared in pairs; the verdict is that of a study.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import whichkl as wk
from whichkl.distillation import DistillationTarget
from whichkl.study import DISTILLATION_NEEDS, decide

SIZES = {"tiny": 1, "small": 3, "medium": 12}  # channels


def large():
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def small(channels):
    layers = [nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 10))


def taught(x, y, epochs=20):
    torch.manual_seed(0)
    teacher = large()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(x[rows]), y[rows]).backward()
            optimizer.step()
    return teacher


def digits():
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.as_tensor(x[order] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return images, torch.as_tensor(y[order])


def summary(rows, columns=("accuracy", "agreement", "nll", "ece", "forward_kl", "reverse_kl")):
    """Means over the seeds with their standard errors."""
    found = {}
    for name in columns:
        values = np.array([row[name] for row in rows], dtype=float)
        error = float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
        found[name] = [round(float(values.mean()), 4), round(error, 4)]
    return found


def compared(seeds, epochs, temperature, out=None):
    """Run the study."""
    x, y = digits()
    seen = 2 * len(x) // 3
    teacher = taught(x[:seen], y[:seen])
    settings = {
        "held_out": (x[seen:], y[seen:]),
        "epochs": epochs,
        "batch": 128,
        "learning_rate": 0.02,
        "temperature": temperature,
    }
    target = DistillationTarget(teacher, (x[:seen], y[:seen]), settings)
    students = {name: (lambda channels=channels: small(channels)) for name, channels in SIZES.items()}

    def tell(progress):
        if progress.done % 30 == 0:
            print(progress.done, "of", progress.of, file=sys.stderr, flush=True)

    return wk.compare(target, students, list(wk.losses.DIVERGENCES), seeds=seeds, out=out, tell=tell)


def weights(module):
    return sum(one.numel() for one in module.parameters())


def told(rows, scores):
    """Print a table and the verdicts of each size; return them as JSON holds them."""
    accuracy, ece, nll = (scores[name]["teacher"]["value"] for name in ("accuracy", "ece", "nll"))
    print(
        f"teacher: {weights(large()):,} weights, accuracy {accuracy:.4f}, ECE {ece:.4f}, NLL {nll:.4f} on {scores['rows']} images"
    )
    teacher = {"weights": weights(large()), "accuracy": round(accuracy, 4), "ece": round(ece, 4), "nll": round(nll, 4)}
    line = {"teacher": teacher, "failed": sum(row["status"] == "failed" for row in rows), "students": {}}
    for name, channels in SIZES.items():
        mine = [row for row in rows if row["family"] == name and row["status"] != "failed"]
        print(f"\n{name}: {weights(small(channels)):,} weights; means of the seeds ± standard errors")
        print(f"{'':19}{'accuracy':>16}{'agreement':>16}{'NLL':>16}{'ECE':>16}{'forward KL':>16}{'reverse KL':>16}")
        table = {}
        for objective in dict.fromkeys(row["objective"] for row in mine):
            table[objective] = summary([row for row in mine if row["objective"] == objective])
            print(f"{objective:19}" + "".join(f"{f'{mean:.4f} ± {error:.4f}':>16}" for mean, error in table[objective].values()))
        every = decide(mine, DISTILLATION_NEEDS)
        two = decide([row for row in mine if row["objective"] in ("forward_kl", "reverse_kl")], DISTILLATION_NEEDS)
        winners = {}
        for label, verdict in (("all objectives", every), ("forward or reverse KL", two)):
            print(f"{label}: {verdict.sentence}")
            winners[label] = {}
            for choice in verdict.choices:
                best = [one.split(" · ")[1] for one in choice.best]
                winners[label][choice.column] = best
                ties = ", ".join(best[1:])
                result = f"none won; no detectable difference from {best[0]}: {ties}" if ties else f"{best[0]} won"
                print(f"  by {choice.column}: {result}")
        line["students"][name] = {"weights": weights(small(channels)), "objectives": table, "best": winners}
    print()
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", help="folder where cells are kept, if interrupted, run the same command again to resume")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    study = compared(options.seeds, options.epochs, options.temperature, options.out)
    line = told(study.rows, study.cells[0].details["scores"])
    settings = {"seeds": options.seeds, "epochs": options.epochs, "temperature": options.temperature}
    seconds = round(time.perf_counter() - begin, 1)
    print(json.dumps({"benchmark": "digits_distillation", **settings, **line, "seconds": seconds}))


if __name__ == "__main__":
    main()
