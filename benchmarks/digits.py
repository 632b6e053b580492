"""Handwritten digits: our neural classifier and scikit-learn's MLPClassifier, same layers, same held-out fifth.

Five random splits of the 1,797 images; log-loss and accuracy on the fifth that neither has seen. scikit-learn's twice, on
standardised columns: with default settings, and with its early stopping.
"""

import json
import statistics
import time
import warnings

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import whichkl as wk

HIDDEN, SPLITS = (64, 64), 5


def ours(x, y, unseen, seed):
    fit = wk.fit(wk.Target(samples=(x, y)), wk.families.Neural("categorical", HIDDEN), seed=seed, judge=False)
    return fit.model(torch.as_tensor(unseen)).probs.numpy()


def theirs(**fields):
    def classify(x, y, unseen, seed):
        network = MLPClassifier(HIDDEN, max_iter=500, random_state=seed, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return make_pipeline(StandardScaler(), network).fit(x, y).predict_proba(unseen)

    return classify


METHODS = {"whichkl": ours, "MLPClassifier": theirs(), "MLPClassifier, early stopping": theirs(early_stopping=True)}


def main():
    x, y = load_digits(return_X_y=True)
    found = {name: [] for name in METHODS}
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(x))
        unseen, seen = order[: len(x) // 5], order[len(x) // 5 :]
        for name, method in METHODS.items():
            begin = time.perf_counter()
            chance = method(x[seen], y[seen], x[unseen], split)
            seconds = time.perf_counter() - begin
            found[name].append((log_loss(y[unseen], chance), float((chance.argmax(1) == y[unseen]).mean()), seconds))
    print(f"digits, hidden layers {HIDDEN}, {len(unseen)} of {len(x)} rows held out, means of {SPLITS} splits")
    print(f"{'':32}{'log-loss':>10}{'± s.e.':>9}{'accuracy':>10}{'seconds':>9}")
    means = {}
    for name, rows in found.items():
        loss, accuracy, seconds = (statistics.mean(column) for column in zip(*rows, strict=True))
        error = statistics.stdev(row[0] for row in rows) / len(rows) ** 0.5
        means[name] = {
            "log_loss": round(loss, 4),
            "stderr": round(error, 4),
            "accuracy": round(accuracy, 4),
            "seconds": round(seconds, 2),
        }
        print(f"{name:32}{loss:10.4f}{error:9.4f}{accuracy:10.4f}{seconds:9.2f}")
    print(json.dumps({"benchmark": "digits", **means}))


if __name__ == "__main__":
    main()
