"""Coverage: how much of p a model reaches, how much of the model lies where p is, and the parts of p that it misses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.process.torch_modes import plain_modes

_MAX_ROWS = 2_000
"""Largest number of draws of each side that are compared."""
_NEIGHBORS = 5
_TAIL = 1e-3
"""Quantile of log q under q; a draw of p with a lower log q lies where q never goes."""
_MIN_GROUP_SHARE, _MIN_GROUP_SIZE = 0.01, 5
_LINKS, _LINK_REACH = 15, 3.0
"""Neighbours that a missed draw can be linked with, and up to which multiple of the distances that are usual there."""
_PEAK, _MIN_DIP, _MAX_BORDER = 0.1, 1.5, 0.4
"""These distinguish missed modes from tails; in ten dimensions and more few are distinguished."""


@dataclass(frozen=True)
class Missed:
    """A part of p that the model never reaches."""

    share: float
    """Share of p's draws."""
    centre: tuple[float, ...]
    is_mode: bool
    """Whether p is denser inside it than at its border with what the model reaches: a mode, and not a tail."""


@dataclass(frozen=True)
class Coverage:
    """Both are near 1 where q = p: coverage 1 − 2⁻⁵ = 0.97 in expectation, density 1."""

    coverage: float
    """Share of p's draws with a draw of q nearer than their fifth neighbour among p's draws."""
    density: float
    """Mean number of such balls about p's draws in which a draw of q lies, divided by five; below 1 where q goes beyond p."""
    missed: tuple[Missed, ...]
    """Groups of at least 1 % of p's draws that lie where q never goes, modes and tails, the largest first."""
    missed_mass: float
    """The share of p's draws that lie where q never goes, in groups or alone."""

    @property
    def modes(self) -> int:
        """Number of missed modes."""
        return sum(one.is_mode for one in self.missed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


@plain_modes()
def coverage(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], log_q_x: Float[Tensor, " n"] | None, log_q_y: Float[Tensor, " m"] | None
) -> Coverage:
    """Compare draws of p and q by nearest neighbours, in coordinates in which p's columns have unit spread.

    A draw of p lies where q never goes if its log q is below the 10⁻³ quantile under q, and no draw of q is near. Such draws of p
    form a group where they are as near to each other as draws of p usually are there.

    Args:
        x: draws of p that q wasn't fitted on; the first 2,000 are used.
        y: draws of q, of which the same number is used.
        log_q_x: log q at x, or None.
        log_q_y: log q at y.

    Source: Naeem, Oh, Uh, Choi & Yoo (2020), "Reliable fidelity and diversity metrics for generative models".

    >>> x, y = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(0))
    >>> found = coverage(x, y, None, None)
    >>> round(found.coverage, 2), round(found.density, 1)
    (0.97, 1.0)
    """
    m = min(len(x), len(y), _MAX_ROWS)
    spread = x.std(0).clamp(min=1e-300)
    a, b = (((one[:m] - x.mean(0)) / spread).detach().cpu().numpy() for one in (x, y))
    k = min(_NEIGHBORS, m - 1)
    radius = scipy.spatial.cKDTree(a).query(a, k + 1)[0][:, k]
    reached = scipy.spatial.cKDTree(b).query(a)[0] <= radius
    inside = sum(len(one) for one in scipy.spatial.cKDTree(b).query_ball_point(a, radius))
    if log_q_x is None or log_q_y is None:
        never = ~reached
    else:
        least = float(log_q_y.detach().to(torch.float64).kthvalue(max(1, round(_TAIL * len(log_q_y)))).values)
        never = ~reached & (log_q_x[:m].detach().cpu().numpy() < least)
    return Coverage(float(reached.mean()), inside / (k * m), _groups(x[:m], a, never, radius), float(never.mean()))


def _groups(x: Tensor, a: np.ndarray, never: np.ndarray, radius: np.ndarray) -> tuple[Missed, ...]:
    """Join missed draws that are near to each other by the distances that are usual there; return the larger groups."""
    rows = never.nonzero()[0]
    if len(rows) < 2:
        return ()
    k = min(_LINKS, len(rows) - 1)
    distance, near = scipy.spatial.cKDTree(a[rows]).query(a[rows], k + 1)
    linked = distance <= _LINK_REACH * np.maximum(radius[rows][:, None], radius[rows][near])
    i, j = np.repeat(np.arange(len(rows)), k + 1).reshape(near.shape)[linked], near[linked]
    links = scipy.sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(len(rows), len(rows)))
    _, label = scipy.sparse.csgraph.connected_components(links, directed=False)
    found = []
    for one in range(label.max() + 1):
        mine = rows[label == one]
        if len(mine) >= max(_MIN_GROUP_SIZE, _MIN_GROUP_SHARE * len(never)):
            centre = tuple(x[mine].double().mean(0).tolist())
            found.append(Missed(len(mine) / len(never), centre, _dips(a, mine, never, radius)))
    return tuple(sorted(found, key=lambda group: -group.share))


def _dips(a: np.ndarray, mine: np.ndarray, never: np.ndarray, radius: np.ndarray) -> bool:
    """Whether a group is a mode: few of its draws have a reached draw near, and log p rises into the group by 1.5 nats or more.

    A tail is densest at its border; in many dimensions all of its draws have reached ones near. Log p is estimated from the
    distance to the fifth neighbour.
    """
    if never.all():
        return True
    border = scipy.spatial.cKDTree(a[~never]).query(a[mine])[0] <= radius[mine]
    if not border.any():
        return True
    here, inside = np.median(radius[mine][border]), np.quantile(radius[mine], _PEAK)
    return bool(border.mean() < _MAX_BORDER and a.shape[1] * np.log(here / inside) > _MIN_DIP)
