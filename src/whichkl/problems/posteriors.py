"""Posteriors of posteriordb with long-run reference draws, whose data are in a folder; both accesses exist."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from whichkl._checks import InputError, cannot
from whichkl.problems.real_data import EFFECTS, ERRORS, eight_schools_log_prob
from whichkl.process.torch_modes import plain_modes
from whichkl.targets import Target

LogProb = Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]


@plain_modes()
def posterior(name: str, folder: str | os.PathLike[str], *, draws: bool = False) -> Target:
    """Return a posterior of posteriordb in unconstrained coordinates, unnormalised, named as its parameters.

    Args:
        name: ``"arK-arK"``, ``"kidiq-kidscore_interaction"``, ``"eight_schools-noncentered"``, ``"eight_schools-centered"``,
            ``"garch-garch11"``, ``"low_dim_gauss_mix"`` or ``"nes1980-nes"``.
        folder: the folder of `data_*.json` and `<name>.npz`.
        draws: whether the target also has the reference draws as samples.

    Raises:
        InputError: there is no such posterior, or its files are missing.

    Source: Magnusson, Bürkner & Vehtari (2023), posteriordb.
    """
    do = f"make the posterior `{name}`"
    if name not in _POSTERIORS:
        raise InputError(cannot(do, "it isn't a known one", f"Choose among {', '.join(_POSTERIORS)}"))
    data, build = _POSTERIORS[name]
    try:
        log_prob, names = build(json.loads((Path(folder) / f"data_{data}.json").read_text()))
        with np.load(Path(folder) / f"{name}.npz") as file:
            samples = torch.from_numpy(file["draws"]) if draws else None
    except FileNotFoundError as error:
        raise InputError(cannot(do, f"`{error.filename}` is missing", "Name the folder that holds it")) from error
    except Exception as error:  # damaged files raise many errors
        because = f"its files in `{folder}` are broken ({type(error).__name__}: {str(error)[:200]})"
        raise InputError(cannot(do, because, "Copy them again")) from error
    return Target(log_prob=log_prob, samples=samples, dim=len(names), names=names)


def _regression(x: Tensor, y: Tensor, log_prior: LogProb) -> LogProb:
    """Log density of (β, log σ): y ~ N(xβ, σ) with a prior; the Jacobian of log σ is log σ."""

    def log_prob(u: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        log_sigma = u[:, -1]
        misfit = (y.to(u) - u[:, :-1] @ x.to(u).T).square().sum(-1)
        return log_prior(u) - (len(y) - 1) * log_sigma - misfit * torch.exp(-2 * log_sigma) / 2

    return log_prob


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _half_cauchy(log_sigma: Tensor, scale: float) -> Tensor:
    return -torch.log1p((log_sigma.exp() / scale).square())


def _autoregression(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    y, k = _float64(data["y"]), data["K"]
    lags = [y[k - 1 - i : len(y) - 1 - i] for i in range(k)]
    x = torch.stack([torch.ones(len(y) - k, dtype=y.dtype, device="cpu"), *lags], 1)

    def log_prior(u: Tensor) -> Tensor:
        return -(u[:, :-1] / 10).square().sum(-1) / 2 + _half_cauchy(u[:, -1], 2.5)

    return _regression(x, y[k:], log_prior), ["alpha", *(f"beta{i + 1}" for i in range(k)), "log sigma"]


def _kid_scores(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    score, school, iq = (_float64(data[key]) for key in ("kid_score", "mom_hs", "mom_iq"))
    x = torch.stack([torch.ones_like(iq), school, iq, school * iq], 1)
    names = ["intercept", "mom_hs", "mom_iq", "interaction", "log sigma"]
    return _regression(x, score, lambda u: _half_cauchy(u[:, -1], 2.5)), names


def _elections(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    columns = {key: _float64(value) for key, value in data.items() if isinstance(value, list)}
    ages = {f"age {k}": (columns["age_discrete"] == k).double() for k in (2, 3, 4)}
    known = {key: columns[key] for key in ("real_ideo", "race_adj")} | ages
    known |= {key: columns[key] for key in ("educ1", "gender", "income")}
    x = torch.stack([torch.ones_like(columns["income"]), *known.values()], 1)
    return _regression(x, columns["partyid7"], lambda u: torch.zeros_like(u[:, 0])), ["intercept", *known, "log sigma"]


def _volatility(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    y, first = _float64(data["y"]), float(data["sigma1"])

    def log_prob(u: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
        mean, log_a0, logit_a, logit_b = u.T
        a, room = torch.sigmoid(logit_a), torch.sigmoid(-logit_a)
        b = room * torch.sigmoid(logit_b)
        jacobian = log_a0 + logsigmoid(logit_a) + 2 * logsigmoid(-logit_a) + logsigmoid(logit_b) + logsigmoid(-logit_b)
        squared = (y.to(u)[:, None] - mean).square()
        s, power, step = torch.cat([torch.full_like(mean, first**2)[None], log_a0.exp() + a * squared[:-1]]), b, 1
        while step < len(s):  # sₜ = shockₜ + b sₜ₋₁, as sums over twice as many shocks each time
            s, power, step = torch.cat([s[:step], s[step:] + power * s[:-step]]), power.square(), 2 * step
        value: Tensor = jacobian - (s.log() + squared / s).sum(0) / 2
        return value

    return log_prob, ["mu", "log alpha0", "logit alpha1", "logit beta1"]


def _two_components(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    y = _float64(data["y"])

    def log_prob(u: Float[Tensor, "n 5"]) -> Float[Tensor, " n"]:
        low, log_gap, log_s1, log_s2, logit = u.T
        high = low + log_gap.exp()
        prior = -((low / 2).square() + (high / 2).square()) / 2 + log_gap
        prior = prior - ((log_s1.exp() / 2).square() + (log_s2.exp() / 2).square()) / 2 + log_s1 + log_s2
        prior = prior + 5 * logsigmoid(logit) + 5 * logsigmoid(-logit)
        first = logsigmoid(logit)[:, None] - log_s1[:, None] - ((y.to(u) - low[:, None]) / log_s1.exp()[:, None]).square() / 2
        second = logsigmoid(-logit)[:, None] - log_s2[:, None] - ((y.to(u) - high[:, None]) / log_s2.exp()[:, None]).square() / 2
        value: Tensor = prior + (first + softplus(second - first)).sum(-1)
        return value

    return log_prob, ["mu1", "log gap", "log sigma1", "log sigma2", "logit theta"]


def _schools(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    return eight_schools_log_prob, [*(f"theta{i + 1}, standardised" for i in range(8)), "mu", "log tau"]


def _schools_centered(data: dict[str, Any]) -> tuple[LogProb, list[str]]:
    effects, errors = _float64(EFFECTS), _float64(ERRORS)

    def log_prob(u: Float[Tensor, "n 10"]) -> Float[Tensor, " n"]:
        effect, mean, log_tau = u[:, :8], u[:, 8], u[:, 9]
        spread = (effect - mean[:, None]) * torch.exp(-log_tau)[:, None]
        prior = -spread.square().sum(-1) / 2 - 7 * log_tau + _half_cauchy(log_tau, 5) - (mean / 5).square() / 2
        return prior - ((effects.to(u) - effect) / errors.to(u)).square().sum(-1) / 2

    return log_prob, [*(f"theta{i + 1}" for i in range(8)), "mu", "log tau"]


_POSTERIORS: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[LogProb, list[str]]]]] = {
    "arK-arK": ("arK", _autoregression),
    "kidiq-kidscore_interaction": ("kidiq", _kid_scores),
    "eight_schools-noncentered": ("eight_schools", _schools),
    "eight_schools-centered": ("eight_schools", _schools_centered),
    "garch-garch11": ("garch", _volatility),
    "low_dim_gauss_mix": ("low_dim_gauss_mix", _two_components),
    "nes1980-nes": ("nes1980", _elections),
}
POSTERIORS = tuple(_POSTERIORS)
"""Names of those that `posterior` makes."""
