"""Simulations: pairs of parameters and simulated data, made before, as samples of the joint law p(θ) p(x | θ)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot, check_finite, check_seed, quoted
from whichkl.arrays import default_names, read_matrix
from whichkl.conversions.simulations_origin import SimulationOrigin
from whichkl.conversions.simulations_prior import order_of, parameter_names, read_prior, read_proposal
from whichkl.conversions.simulations_weights import ProposalWeights, log_ratio
from whichkl.goodness import Calibration, transform_calibration
from whichkl.printable import count_of
from whichkl.process.torch_modes import plain_modes
from whichkl.samples.table import as_frame, column_names, is_frame
from whichkl.targets import Target
from whichkl.targets.origin import inherited

_REFERENCE_DRAWS = 10_000
"""Draws of the prior, or the proposal, with which the parameters are compared."""
_MAX_P_VALUE = 1e-4
"""Largest p-value of that comparison at which the parameters aren't taken for its draws."""
_MIN_SHOWN_P_VALUE = 1e-99
_MIN_SIMULATIONS = 20
_MAX_NAMES = 10
"""Largest number of columns that are named in the origin."""


class Simulations:
    """Parameters θ and the data x that a simulator made of them: `convert` makes pairs (x, θ) of them.

    Args:
        prior: a torch `Distribution` of the parameters, a `Target` with a sampler, or independent laws in a list, or in a dict by
            the parameters' names. Its support is that of the posterior.
        parameters: (n, d), one row per simulation.
        data: (n, c), or (n,). Rows with NaN or an infinity are failed simulations, which are left out and counted: pass them too.
        proposal: the distribution that the parameters were drawn from, if it wasn't the prior; or an array of its log densities
            at the parameters, (n,). Each simulation then has the weight prior/proposal. A dict may name some parameters of a
            prior that is a dict: the others were drawn from the prior.

    Raises:
        InputError: an argument can't be used, or a parameter lies outside the prior's support and no proposal was given.
        TargetError: the proposal has no density where the prior has mass, so no weights can correct for it.

    Source: Papamakarios & Murray (2016); weights, Lueckmann et al. (2017).

    >>> import torch, whichkl as wk
    >>> theta = torch.randn(1_000, 1, generator=torch.Generator().manual_seed(0))
    >>> x = theta + torch.randn(1_000, 1, generator=torch.Generator().manual_seed(1))
    >>> prior = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
    >>> wk.convert(wk.Simulations(prior=prior, parameters=theta, data=x))
    Target(dim=1, n=1000, given 1 column, access: samples)
    """

    @typed
    @plain_modes()
    def __init__(self, *, prior: Any, parameters: Any, data: Any, proposal: Any = None) -> None:
        self.prior = read_prior(prior)
        is_evaluated = isinstance(proposal, (Tensor, np.ndarray)) or hasattr(proposal, "to_numpy")
        theta = read_matrix(parameters, torch.float64, self.prior.device, "parameters")
        x = read_matrix(data, torch.float64, self.prior.device, "data")
        given, own = _names_of(parameters), self.prior.names if isinstance(prior, Mapping) else parameter_names(self.prior)
        is_named = isinstance(prior, Mapping) or self.prior.names != default_names(self.prior.dim)
        if given and is_named and len(given) == len(own):
            theta = theta[:, order_of(given, own, "use these `parameters`")]  # a table's columns come by name
        self.names = given if given and not is_named else own
        self.data_names = _names_of(data) or default_names(x.shape[1])
        if theta.shape[1] != self.prior.dim:
            because = f"the parameters have {count_of(theta.shape[1], 'column')}, and the prior has {self.prior.dim}"
            raise InputError(cannot("use these simulations", because, "Give one column per parameter of the prior"))
        if len(theta) != len(x):
            because = f"there are {count_of(len(theta), 'row')} of parameters and {count_of(len(x), 'row')} of data"
            raise InputError(cannot("use these simulations", because, "Give one row of data per row of parameters"))
        check_finite(theta, self.names, "parameters")
        is_law = proposal is not None and not is_evaluated
        self.proposal = read_proposal(proposal, prior, self.names) if is_law else None
        self.parameters, self.data = theta, x
        self.called = ""
        """How the simulator was called, if it was called here."""
        self.weights = None if self.proposal is None else ProposalWeights.of(self.prior, self.proposal, theta)
        if is_evaluated:
            log_densities = read_matrix(proposal, torch.float64, self.prior.device, "log densities of the proposal")
            self.weights = ProposalWeights.of_log_densities(self.prior, log_densities, theta)
        if self.weights is None:
            self._refuse_outside()

    @property
    def valid(self) -> Tensor:
        """Which simulations are used: their data are finite, and the prior isn't 0 there."""
        valid = self.data.isfinite().all(1)
        return valid if self.weights is None else valid & (self.weights.log_weights > -torch.inf)

    def as_target(self, *, n: int | None, seed: int) -> Target:
        """Return the pairs (x, θ), or the first n of them, with weights if there is a proposal.

        Raises:
            InputError: there are fewer than n, or fewer than 20 valid ones.
        """
        if n is not None and not _MIN_SIMULATIONS <= n <= len(self.data):
            because = f"there are {len(self.data):,}, and at least {_MIN_SIMULATIONS} are needed"
            raise InputError(cannot(f"use `n={n}` of these simulations", because, "Leave `n=` out, or run more"))
        n = len(self.data) if n is None else n
        kept = self.valid & (torch.arange(len(self.data), device=self.data.device) < n)
        if int(kept.sum()) < _MIN_SIMULATIONS:
            because = f"{int(kept.sum())} of {n:,} have finite data and a positive weight, and {_MIN_SIMULATIONS} are needed"
            raise InputError(cannot("use these simulations", because, "Run more of them, or correct the simulator"))
        log_weights = None if self.weights is None else self.weights.log_weights[kept]
        target = Target(
            samples=(self.data[kept], self.parameters[kept]),
            weights=None if log_weights is None else (log_weights - log_weights.max()).exp(),
            support=self.prior.bijection.constraints,
            names=self.names,
        )
        target.context_names = self.data_names
        if self.proposal is not None:
            target.log_ratio = partial(log_ratio, self.prior, self.proposal)
        proposal = None if self.proposal is None else self.proposal.origin
        target.origin = inherited(self._origin(kept, n, seed), prior=self.prior.origin, proposal=proposal)
        return target

    @typed
    @plain_modes()
    def calibration(self, posterior: Any, *, seed: int = 0) -> Calibration:
        """Return the simulation-based calibration of a posterior on these simulations, which no fit must have seen.

        The rank of each parameter among draws of the posterior at its own data is uniform if the posterior is right. A posterior
        that is too narrow has too many ranks at both ends. `joint density` ranks the posterior's density at the parameters.

        Args:
            posterior: x ↦ `Distribution`, (n, c) → n laws of (d,), such as `fit.model`.
            seed: fixes the draws.

        Source: Talts, Betancourt, Simpson, Vehtari & Gelman (2018); bands, Säilynoja, Bürkner & Vehtari (2022).

        >>> import torch, whichkl as wk
        >>> prior = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
        >>> simulator = wk.Simulator(prior=prior, simulate=lambda theta: theta + torch.randn_like(theta))
        >>> def narrow(x):
        ...     return torch.distributions.Independent(torch.distributions.Normal(x / 2, 0.3), 1)
        >>> print(simulator.run(1_000).calibration(narrow))
        Not calibrated on 1,000 unseen rows: theta1 (gap 0.1..., p = ...).
        """
        kept = self.valid
        w = None if self.weights is None else (self.weights.log_weights - self.weights.log_weights.max()).exp()[kept]
        return transform_calibration(self.parameters[kept], w, self.data[kept], posterior, self.names, seed)

    def __repr__(self) -> str:
        n, c = self.data.shape
        return f"Simulations(n={n}, {count_of(c, 'data column')}, {quoted(self.names)})"

    def _refuse_outside(self) -> None:
        """Refuse parameters without prior density, if they were drawn from the prior."""
        outside = ~self.prior.bijection.contains(self.parameters)
        if self.prior.density is not None:
            outside = outside | (self.prior.log_prob(self.parameters.to(self.prior.dtype)) == -torch.inf)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            shown = ", ".join(f"{value:.4g}" for value in self.parameters[row].tolist())
            count = f"{int(outside.sum()):,} of {len(outside):,} rows of parameters"
            because = f"{count} lie outside the prior's support, first row {row} ({shown})"
            instead = "Correct `prior=`, or name the distribution that the parameters were drawn from as `proposal=`"
            raise InputError(cannot("use these simulations", because, instead))

    def _origin(self, kept: Tensor, n: int, seed: int) -> SimulationOrigin:
        """Write what the pairs are made of, and how far to trust them."""
        x, w, law = self.data[kept], self.weights, self.prior if self.weights is None else self.proposal
        source = "prior" if w is None else "proposal"
        failed = ~self.data[:n].isfinite().all(1)
        left_out = [_on_failed(failed, self.parameters[:n], self.names)] if bool(failed.any()) else []
        p_value = None if law is None else _unlike_draws(self.parameters, law, self.names, check_seed(seed))
        doubts: list[str] = []
        few = ""
        if p_value is not None and p_value[0] < _MAX_P_VALUE:
            doubts.append(
                f"The parameters don't look like draws of the {source}: p = {p_value[0]:.1g} for {p_value[1]}, by Kolmogorov and "
                "Smirnov. If failed simulations were dropped before, pass them with NaN; otherwise name the right distribution."
            )
        trust = [f"{len(x):,} simulations are used."]
        if w is not None:
            said, doubt, few = w.described(kept)
            trust.append(said)
            left_out += w.left_out(n)
            doubts += [doubt] if doubt else []
        trust += ["The calibration on unseen simulations shows how far a fit can be trusted: `fit.diagnostics.calibration`."]
        counted = " (each with the weight prior/proposal)" if w is not None else ""
        return SimulationOrigin(
            f"{n:,} simulations: pairs of the data {_listed(self.data_names)} and the parameter{'s' * (len(self.names) != 1)} "
            f"{_listed(self.names)}.",
            tuple(filter(None, (f"The parameters are independent draws of the {source}{counted}.", self.called))),
            (
                "Whether the world makes data as the simulator does. `target.origin.unlikeness(x)` is a p-value that tells if an "
                "observation x is unlike all simulations.",
            ),
            tuple(left_out),
            " ".join(filter(None, [*doubts, few, *trust])),
            reliable=not (doubts or few),
            is_corrected=not doubts and self.proposal is not None,
            data=x,
        )


def _names_of(values: Any) -> tuple[str, ...]:
    """Return the names of a table's columns, or of a column with a name; none for arrays."""
    table = as_frame(values)
    names = column_names(table) if is_frame(table) else []
    return tuple(names) if is_frame(values) or isinstance(getattr(values, "name", None), str) else ()


def _listed(names: tuple[str, ...]) -> str:
    """Name the first columns, and count them if there are more.

    >>> _listed(("a", "b"))
    '`a`, `b`'
    """
    return quoted(names, _MAX_NAMES) + (f" ({len(names):,} columns)" if len(names) > _MAX_NAMES else "")


def _on_failed(failed: Tensor, theta: Float[Tensor, "n d"], names: tuple[str, ...]) -> str:
    """Say how many simulations failed, at which parameters, and what leaving them out means."""
    count, n = int(failed.sum()), len(failed)
    said = (
        f"{count:,} of {n:,} simulations ({count / n:.1%}) have NaN or infinite data. The posterior at valid data is the same "
        "without them if the real experiment fails as the simulator does. If the simulator alone fails, the posterior is too low "
        "at the parameters where it does."
    )
    p, at = _least_p_value(theta[failed], theta[~failed]) if 0 < count < n else (1.0, 0)
    if p >= _MAX_P_VALUE:
        return said
    there, elsewhere = (f"{float(theta[rows, at].median()):.4g}" for rows in (failed, ~failed))
    shown = f"p = {p:.1g}" if p > _MIN_SHOWN_P_VALUE else f"p < {_MIN_SHOWN_P_VALUE:g}"
    where = f"`{names[at]}`, whose median is {there} where they happen and {elsewhere} elsewhere ({shown})"
    return f"{said} Here failures depend on {where}."


def _unlike_draws(theta: Float[Tensor, "n d"], source: Target, names: tuple[str, ...], seed: int) -> tuple[float, str] | None:
    """Return the least p-value of a column's comparison with draws of the source, times their number, and that column."""
    if source.sampler is None:
        return None
    p, at = _least_p_value(theta, source.draws(_REFERENCE_DRAWS, seed + 1).to(torch.float64))
    return p, f"`{names[at]}`"


def _least_p_value(one: Float[Tensor, "n d"], other: Float[Tensor, "m d"]) -> tuple[float, int]:
    """Return the least p-value of a column by Kolmogorov and Smirnov, times the number of columns, and which column it is."""
    columns = zip(one.T.cpu().numpy(), other.T.cpu().numpy(), strict=True)
    p_values = [float(scipy.stats.ks_2samp(mine, theirs, method="asymp").pvalue) for mine, theirs in columns]
    worst = min(range(len(p_values)), key=p_values.__getitem__)
    return min(1.0, len(p_values) * p_values[worst]), worst
