"""Parameter checks: whether parameters from a file can be those of a model, before a model is built from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

_MAX_COUNT = 10_000
"""Largest number in a family's configuration that isn't the size of a stored tensor, such as layers and bins."""
_MAX_UNIT_ERROR = 1e-5
"""Largest error of the sum of probabilities, per category; float32 rounds by this much over some hundred categories."""


def _is_simplex(value: Tensor) -> bool:
    if not value.numel():
        return False
    if value.ndim == 0:
        return bool(0 <= value <= 1)
    return bool((value >= 0).all() and ((value.sum(-1) - 1).abs() <= _MAX_UNIT_ERROR * value.shape[-1]).all())


def _is_positive(value: Tensor) -> bool:
    return bool((value > 0).all())


_RANGES: dict[str, tuple[str, Callable[[Tensor], bool]]] = {
    "probs": ("holds no probabilities", _is_simplex),
    "scale_tril": ("is no Cholesky factor", lambda value: bool(constraints.lower_cholesky.check(value).all())),
    "rate": ("is negative", lambda value: bool((value >= 0).all())),
    **{
        name: ("isn't positive", _is_positive)
        for name in ("scale", "cov_diag", "df", "concentration", "concentration0", "concentration1")
    },
}


def check_parameters(parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse parameters that no model has: NaN, a scale below 0, probabilities that sum to 2, shapes that contradict each other.

    Args:
        parameters: by name, as `Family.parameters` returns them.
        config: the family's configuration, as `Family.config` returns it.

    Raises:
        ValueError: a parameter is wrong; the message names it.
    """
    if not parameters:
        raise ValueError("an optimum has no parameters")
    for name, value in parameters.items():
        if value.is_complex() or (value.is_floating_point() and not bool(value.isfinite().all())):
            raise ValueError(f"the parameter `{name[:80]}` isn't finite")
        why, holds = _RANGES.get(name.rpartition(".")[2], ("", lambda _: True))
        if not name.startswith("module.") and not holds(value):
            raise ValueError(f"the parameter `{name[:80]}` {why}")
    for name, shape in _shapes(parameters).items():
        if name in parameters and tuple(parameters[name].shape) != shape:
            raise ValueError(f"the parameter `{name}` has shape {tuple(parameters[name].shape)}, not {shape}")
    _check_counts(parameters, config)


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that follow from a location (…, d), or from a matrix of weights (k, c)."""
    if (loc := parameters.get("loc")) is not None:
        *batch, dim = tuple(loc.shape) or (0,)
        one: dict[str, tuple[int, ...]] = {"scale": (*batch, dim), "scale_tril": (*batch, dim, dim), "cov_diag": (dim,)}
        factor = parameters.get("cov_factor")
        rank = 0 if factor is None or factor.ndim < 2 else factor.shape[-1]
        return {**one, "df": tuple(batch), "probs": tuple(batch), "cov_factor": (dim, max(1, rank))}
    if (weight := parameters.get("weight")) is not None:
        rows = weight.shape[0] if weight.ndim == 2 else -1
        return {"bias": (rows,), "scale_tril": (rows, rows)}
    return {}


def _check_counts(parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse sizes that no stored tensor has: building such a network would fill the memory before its weights are compared."""
    largest = max([_MAX_COUNT, *(size for value in parameters.values() for size in value.shape)])
    numbers = [one for value in config.values() for one in (value if isinstance(value, (list, tuple)) else [value])]
    shape = parameters.get("shape", torch.zeros(0, dtype=torch.int64, device="cpu"))
    for one in [*numbers, *shape.flatten().tolist()]:
        if isinstance(one, (int, float)) and not -largest <= one <= largest:
            raise ValueError(f"the family's configuration holds {one:.6g}, a size that none of its weights has")
