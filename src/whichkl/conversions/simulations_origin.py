"""Origin of a target that was made of simulations: it can tell whether an observation is unlike all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_finite
from whichkl.arrays import default_names, read_matrix
from whichkl.printable import count_of
from whichkl.process.torch_modes import plain_modes
from whichkl.targets.origin import Origin

_MAX_ROWS = 20_000
"""Largest number of simulations that an observation is compared with; their neighbours take some seconds to find."""
_MIN_ROWS_TO_SPLIT = 2_000
"""Least number of simulations of which a tenth is spared for the whitening; with fewer, p would be coarse."""
_ROWS_PER_COLUMN = 100
"""Least number of simulations per column from which correlations between columns are used."""
_MIN_EIGENVALUE = 1e-12
"""Least variance of a direction, as a share of the columns'; columns that depend on each other have rounding errors only."""


@dataclass(frozen=True)
class SimulationOrigin(Origin):
    """The origin of simulations, which keeps their data."""

    data: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64, device="cpu"), repr=False, compare=False)
    """(n, c), the data of the simulations that were used."""

    @typed
    @plain_modes()
    def unlikeness(self, x: Any) -> Any:
        """Return the p-value of an observation that is like the simulations: a small one means that it is unlike all of them.

        The data are whitened. An observation is unlike the simulations if its nearest simulation is far away, compared with the
        nearest one of each simulation, or if it is far out, compared with them; the smaller rank of both is ranked among those
        of the simulations. If the observation is one more draw of the simulated data, p is uniform on 1/(m + 1), …, 1, since it
        and the m simulations that are compared are exchangeable. From 2,000 simulations on, a tenth of them, at most 2,000, serve
        the whitening and aren't compared; of fewer all serve both, which is exact up to the order of c/m.

        Args:
            x: one observation, (c,) or (1, c); or (k, c), of which each is compared alone.

        Returns:
            A number, or k numbers in a tensor.

        Raises:
            InputError: it isn't of the data's c columns, or not finite.

        Source: Vovk, Gammerman & Shafer (2005), Algorithmic learning in a random world, chapter 2 (conformal p-values).

        >>> import whichkl as wk
        >>> prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
        >>> simulated = wk.convert(wk.Simulator(prior=prior, simulate=lambda theta: theta + torch.randn_like(theta)), n=2_000)
        >>> simulated.origin.unlikeness([0.5, -0.5]) > 0.05, simulated.origin.unlikeness([15.0, 0.0]) < 0.002
        (True, True)
        """
        columns = self.data.shape[1]
        rows = read_matrix(x, torch.float64, "cpu", "observation")
        rows = rows.T if rows.shape[1] == 1 and len(rows) == columns else rows
        if rows.shape[1] != columns or not len(rows):
            because = f"it has shape {tuple(rows.shape)}, and the simulated data have {count_of(columns, 'column')}"
            raise InputError(cannot("compare this observation", because, f"Give ({columns},) numbers, or (k, {columns})"))
        check_finite(rows, default_names(columns), "observations")
        p = torch.tensor([self._compared.p_value(row) for row in rows.numpy()], dtype=torch.float64, device="cpu")
        return float(p[0]) if len(p) == 1 else p

    @cached_property
    def _compared(self) -> _Compared:
        return _Compared(self.data.detach().to("cpu", torch.float64).numpy())


class _Compared:
    """Simulated data, whitened by a tenth of them; the others are ranked. Few serve both."""

    def __init__(self, data: Float[np.ndarray, "n c"]) -> None:
        from whichkl.divergences.samples.neighbors import Neighbors

        x = data[np.random.default_rng(0).permutation(len(data))[:_MAX_ROWS]]
        spared = len(x) // 10 if len(x) >= _MIN_ROWS_TO_SPLIT else 0
        known = x[: spared or None]
        self.center, scale = known.mean(0), known.std(0)
        self.scale = np.where(scale > 0, scale, 1e-6 * np.maximum(1.0, np.abs(self.center)))
        self.turn = np.eye(x.shape[1])
        if len(x) >= _ROWS_PER_COLUMN * x.shape[1]:
            z = (known - self.center) / self.scale
            variance, vectors = np.linalg.eigh(z.T @ z / len(z))
            self.turn = vectors / np.sqrt(np.maximum(variance, _MIN_EIGENVALUE * variance[-1]))
        self.rows = self._whitened(x)
        self.ranked = slice(spared, None)
        self.far = np.linalg.norm(self.rows[self.ranked], axis=1)
        self.apart = Neighbors(self.rows).distance(self.rows[self.ranked], 2) if len(x) > 1 else np.zeros(0)

    def _whitened(self, x: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        white: Float[np.ndarray, "n c"] = ((x - self.center) / self.scale) @ self.turn
        return white

    def p_value(self, x: Float[np.ndarray, " c"]) -> float:
        """Return the share of the ranked simulations and the observation whose rank is at most the observation's."""
        z = self._whitened(x[None])[0]
        reach = np.linalg.norm(self.rows - z, axis=1)
        apart = np.append(np.minimum(self.apart, reach[self.ranked]), reach.min())  # it is a neighbour of the others, too
        ranks = np.minimum(_rank_from_top(apart), _rank_from_top(np.append(self.far, np.linalg.norm(z))))
        return float((ranks <= ranks[-1]).mean())


def _rank_from_top(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return how many values are at least as large as each.

    >>> _rank_from_top(np.array([3.0, 1.0, 2.0])).tolist()
    [1, 3, 2]
    """
    rank: Float[np.ndarray, " n"] = len(values) - np.searchsorted(np.sort(values), values, side="left")
    return rank
