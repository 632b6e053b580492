"""to_arviz: a fit as the container that ArviZ summarises, plots and saves."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl import __version__
from whichkl._checks import InputError, cannot, require
from whichkl.fitting import Fit
from whichkl.goodness.draws import Unable, drawn, log_density


def to_arviz(fit: Fit, n: int = 1000, corrected: bool = False, seed: int = 0) -> Any:
    """Return draws of a fit for ArviZ: an `arviz.InferenceData`, or, from ArviZ 1 on, an `xarray.DataTree`.

    The group `posterior` has one chain of n draws: the sites of a NumPyro model under its own names and shapes, deterministic
    ones included; of other targets a variable a column. Its attributes say objective, family, status, findings, value and
    version. `sample_stats` has `log_q`, and where p has a log density `lp`, log p at the draws in the coordinates of the
    fit (up to log Z), and `log_weight`, lp − log_q, for Pareto-smoothed importance sampling.

    Args:
        fit: what `whichkl.fit` returned; after `Fit.load` it has no target, and so neither `lp` nor a model's own names.
        n: how many draws.
        corrected: whether the draws are corrected by importance weights, so that they are nearer to p than those of q; the
            weights are used up then, and `log_weight` is left out.
        seed: the same seed gives the same draws.

    Raises:
        InputError: ArviZ isn't installed, the fit is conditional or can't be drawn from, or n isn't at least 1.

    >>> from whichkl import Target, fit
    >>> data = to_arviz(fit(Target(log_prob=lambda x: -x.square().sum(-1), dim=2, names=["a", "b"])), n=100)
    >>> data["posterior"]["a"].shape, data["posterior"].attrs["objective"]
    ((1, 100), 'reverse_kl')
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(cannot(f"draw `n={n!r}`", "it isn't a whole number of at least 1", "Give, say, n=1000"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions announce the next one when they're imported
        arviz = require("arviz", "bayes")
    target = fit.target
    x, log_q = _draws(fit, n, corrected, seed)
    stats = {} if log_q is None else {"log_q": log_q}
    if target is not None and target.density is not None:
        stats["lp"] = target.log_prob(x.to(target.device, target.dtype)).detach().to("cpu", torch.float64)
        if log_q is not None and not corrected:
            stats["log_weight"] = stats["lp"] - log_q
    if target is not None and target.origin is not None:
        sites = target.origin.constrain(x)
    else:
        sites = {name: x[:, i].numpy() for i, name in enumerate(fit.names)}
    groups = {"posterior": sites, "sample_stats": {name: value.numpy() for name, value in stats.items()}}
    groups = {group: {name: np.asarray(value)[None] for name, value in held.items()} for group, held in groups.items() if held}
    # ArviZ 1 has no InferenceData, and takes the groups as one dict
    data = arviz.from_dict(**groups) if hasattr(arviz, "InferenceData") else arviz.from_dict(groups)
    data["posterior"].attrs.update(_attributes(fit, corrected, seed))
    return data


def _attributes(fit: Fit, corrected: bool, seed: int) -> dict[str, Any]:
    """What is said about the draws, as NetCDF can hold it."""
    return {
        "inference_library": "whichkl",
        "inference_library_version": __version__,
        "objective": fit.objective.name,
        "family": str(fit.family),
        "solver": fit.solver,
        "status": fit.status,
        "findings": ", ".join(sorted(fit.findings)),
        "value": str(fit.value),
        "corrected": int(corrected),
        "seed": seed,
    }


def _draws(fit: Fit, n: int, corrected: bool, seed: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"] | None]:
    """Draws of the fit and log q there, None where q has no density."""
    try:
        x = drawn(fit.model, (n,), len(fit.names), seed)
    except Unable as reason:
        instead = "Draw from `fit.model(x)`" if fit.family.conditional else "Use another family"
        raise InputError(cannot("hand this fit to ArviZ", str(reason), instead)) from reason
    if corrected:
        correct = getattr(fit, "draws", None)
        if correct is None:
            because = "this version of `Fit` doesn't correct draws"
            raise InputError(cannot("use `corrected=True`", because, "Leave it out; `log_weight` has the importance weights"))
        x = correct(n, corrected=True, seed=seed)
    try:
        return x, log_density(fit.model, x)
    except Unable:
        return x, None
