"""Clusters: draws of one prompt are one independent unit of an error, however often the prompt was given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.special
import torch
from jaxtyping import Float, Int
from torch import Tensor

from whichkl.divergences.estimate import NORMAL

_MIN_CLUSTERS = 10
"""Number of distinct prompts below which an error is itself poorly known."""


def clusters_of(prompts: Sequence[Sequence[int]]) -> Int[Tensor, " m"]:
    """Return the number of the distinct prompt of each draw; where there is only one prompt, each draw is a unit of its own.

    >>> clusters_of([[1], [2, 3], [1]]).tolist(), clusters_of([[1], [1]]).tolist()
    ([0, 1, 0], [0, 1])
    """
    known = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    numbers = range(len(prompts)) if len(known) == 1 else [known[tuple(one)] for one in prompts]
    return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")


def ratio_of_sums(sums: Float[Tensor, " k"], units: Float[Tensor, " k"]) -> tuple[float, float]:
    """Return the ratio of sums per cluster to their units, such as tokens, and its standard error by linearisation.

    The error is widened so that 1.96 of them are the quantile of Student's t for this number of clusters.
    """
    k, ratio = len(sums), float(sums.sum() / units.sum())
    if k < 2:
        return ratio, math.nan
    widened = -float(scipy.special.stdtrit(k - 1, 0.025)) / NORMAL
    return ratio, widened * float((sums - ratio * units).std() / units.mean()) / math.sqrt(k)


def notes_on(clusters: int) -> tuple[str, ...]:
    """Return what a reader has to know of an error of few clusters."""
    return (f"the error rests on {clusters} distinct prompts, which are few",) if clusters < _MIN_CLUSTERS else ()
