"""The textbook target: a mixture of two normals on the line."""

from __future__ import annotations

import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from whichkl._checks import InputError, cannot
from whichkl.process.torch_modes import plain_modes


@plain_modes()
def bimodal(half_distance: float = 3.0, left_weight: float = 0.5) -> MixtureSameFamily:
    """Return w N(−M, 1) + (1 − w) N(M, 1), the picture in Bishop (2006), section 10.1.

    Args:
        half_distance: M > 0, half the distance between the two means.
        left_weight: w in (0, 1).

    Raises:
        InputError: a number is out of its range.

    >>> bimodal(3.0).variance
    tensor(10., dtype=torch.float64)
    """
    if not (0 < half_distance < 1e6 and 0 < left_weight < 1):
        because = f"half_distance={half_distance} and left_weight={left_weight}"
        raise InputError(cannot("make this mixture", because, "Use half_distance > 0 and a weight in (0, 1)"))
    weights = torch.tensor([left_weight, 1 - left_weight], dtype=torch.float64, device="cpu")
    means = torch.tensor([-half_distance, half_distance], dtype=torch.float64, device="cpu")
    return MixtureSameFamily(Categorical(probs=weights), Normal(means, torch.ones(2, dtype=torch.float64, device="cpu")))
