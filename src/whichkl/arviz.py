"""to_arviz: a fit in the container that ArviZ summarises, plots and saves."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from whichkl._arguments import typed
from whichkl._checks import require
from whichkl.fitting import Fit
from whichkl.goodness.draws import Unable, log_density
from whichkl.process.lock import without_warnings
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target
from whichkl.targets.origin import Origin


@typed
@plain_modes()
def to_arviz(fit: Fit, n: int = 1000, corrected: bool = False, seed: int = 0, target: Any = None) -> Any:
    """Return draws of a fit for ArviZ: an `arviz.InferenceData`, or, from ArviZ 1 on, an `xarray.DataTree`.

    The group `posterior` has one chain of n draws. A model of an adapted library, such as NumPyro, gives the sites under their
    own names and shapes, deterministic ones included; any other target gives one variable per column. The attributes are
    objective, family, status, findings, value and version. `sample_stats` has `log_q`; if p has a log density, also `lp`, log p
    at the draws in the coordinates of the fit (up to log Z), and `log_weight`, lp − log_q, for importance sampling.

    Args:
        fit: what `whichkl.fit` returned.
        n: number of draws.
        corrected: whether to draw from p as in `Fit.draws`; the draws use the weights, so there is no `log_weight`.
        seed: the same seed gives the same draws.
        target: what was fitted, for a loaded fit; without it there is no `lp`, and a model's own names are missing.

    Raises:
        InputError: ArviZ isn't installed, the fit is conditional, or n isn't at least 1.
        TargetError: `corrected`, and there is no log density to correct by, or the corrected draws can't be trusted.

    >>> from whichkl import Target, fit
    >>> data = to_arviz(fit(Target(log_prob=lambda x: -x.square().sum(-1), dim=2, names=["a", "b"])), n=100)
    >>> data["posterior"]["a"].shape, data["posterior"].attrs["objective"]
    ((1, 100), 'reverse_kl')
    """
    with without_warnings():  # some versions announce the next one at import
        arviz = require("arviz", "bayes")
    target = fit.target if target is None else Target.of(target)
    x = fit.draws(n, corrected=corrected, seed=seed, target=target).to("cpu", torch.float64)
    try:
        stats = {"log_q": log_density(fit.model, x)}
    except Unable:  # q has no density
        stats = {}
    if target is not None and target.density is not None:
        stats["lp"] = target.log_prob(x.to(target.device, target.dtype)).detach().to("cpu", torch.float64)
        if "log_q" in stats and not corrected:
            stats["log_weight"] = stats["lp"] - stats["log_q"]
    if target is not None and target.origin is not None and not isinstance(target.origin, Origin):
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
    """Return the attributes of the draws in types that NetCDF can hold."""
    return {
        "inference_library": "whichkl",
        "inference_library_version": version("whichkl"),
        "objective": fit.objective.spec,
        "family": str(fit.family),
        "solver": fit.solver,
        "status": fit.status,
        "findings": ", ".join(sorted(fit.findings)),
        "value": str(fit.value),
        "corrected": int(corrected),
        "seed": seed,
    }
