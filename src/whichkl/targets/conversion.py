"""Conversion: which arguments of `Target` describe an object: a distribution, samples, an energy, a model of another library."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.utils.data import DataLoader, Dataset

from whichkl._checks import InputError, cannot
from whichkl.adapters import MODEL_ADAPTERS, Model
from whichkl.adapters.pairs import paired
from whichkl.distributions import distribution_log_prob, known_support, widened
from whichkl.process.seeds import seeded
from whichkl.samples import Stream
from whichkl.targets.calling import Function
from whichkl.targets.law_supports import support_of

if TYPE_CHECKING:
    from whichkl.targets.target import Target

_SAMPLES = (Stream, DataLoader, Dataset, str, os.PathLike, Tensor, np.ndarray, list, tuple)


_READABLE = ("to_numpy", "__array__", "__arrow_c_stream__", "__arrow_c_array__", "__dataframe__")
"""An object with one of these is read as samples: of pandas, polars, pyarrow, xarray, JAX and others."""


def _models() -> str:
    return " or ".join(adapter.KIND for adapter in MODEL_ADAPTERS)


def arguments_of(obj: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Model | None]:
    """Return the arguments of `Target` for an object, and the model of another library that it is the posterior of."""
    for adapter in MODEL_ADAPTERS:
        if adapter.claims(obj, args, kwargs):
            model = adapter.posterior(obj, args, kwargs)
            return {"log_prob": model.log_prob, "dim": model.dim, "names": model.names}, model
    if args or kwargs:
        because = f"a `{type(obj).__name__}` takes none; they are for {_models()}"
        raise InputError(cannot("use further arguments", because, "Leave them out"))
    if isinstance(obj, Distribution):
        return _of_distribution(obj), None
    if isinstance(obj, type):
        because = "it is a class"
        raise InputError(cannot(f"make a target of `{obj.__name__}`", because, f"Give an instance, `{obj.__name__}(…)`"))
    if isinstance(obj, _SAMPLES) or any(hasattr(obj, name) for name in _READABLE):
        return {"samples": obj}, None
    if callable(obj):
        because = "a bare function doesn't say its dimension"
        instead = f"Use `Target(log_prob=f, dim=d)`, or for {_models()} pass its arguments too, `Target.of(model, data, …)`"
        raise InputError(cannot("make a target of it", because, instead))
    if isinstance(obj, dict):
        because = "a dict has no order of rows and columns"
        raise InputError(cannot("make a target of a `dict`", because, "Give pandas.DataFrame(x), or an array"))
    known = f"a torch Distribution, an array, a DataFrame, a path, a DataLoader or {_models()}"
    raise InputError(cannot(f"make a target of a `{type(obj).__name__}`", f"it is none of {known}", "Convert it"))


def _of_distribution(p: Distribution) -> dict[str, Any]:
    do = "make a target of this distribution"
    if p.batch_shape not in ((), (1,)) or len(p.event_shape) > 1:
        shapes = f"batch shape {tuple(p.batch_shape)} and event shape {tuple(p.event_shape)}"
        instead = "Give one distribution over a scalar or a vector (torch.distributions.Independent makes one)"
        raise InputError(cannot(do, f"it has {shapes}", instead))
    if getattr(known_support(p), "is_discrete", False):
        because = "it is discrete, and the families that a distribution is fitted by have densities on ℝᵈ"
        raise InputError(cannot(do, because, f"Use {_discrete_target(p)}"))
    with seeded(0):
        example = p.sample()
    dim, wide = max(1, example.numel()), widened(p)
    return {
        "sampler": lambda n: p.sample((n,)).reshape(n, -1),
        "log_prob": lambda x: distribution_log_prob(wide, x.to(torch.float64) if wide is not p else x).to(x.dtype),
        "normalized": True,
        "dim": dim,
        "support": support_of(p, dim),
        "dtype": example.dtype if example.is_floating_point() else torch.float64,
        "device": example.device,
    }


def _discrete_target(p: Distribution) -> str:
    """Write the call that makes a target of a discrete law."""
    kind: Any = known_support(p)
    while isinstance(kind, constraints.independent):
        kind = kind.base_constraint
    ends: list[Any] = [getattr(kind, end, None) for end in ("lower_bound", "upper_bound")]
    dim, name = max(1, math.prod(p.event_shape)), "boolean" if kind is constraints.boolean else None
    if name is None and all(end is not None and np.size(end) == 1 for end in ends):
        name = f"integer_interval({int(ends[0])}, {int(ends[1])})"
    if name is None:
        return f"its draws, Target(samples=p.sample((1000,)).reshape(-1, {dim}))"
    f = "p.log_prob" if p.event_shape else "lambda x: p.log_prob(x[:, 0])"
    return f"Target(log_prob={f}, dim={dim}, support='{name}', normalized=True)"


def remaining(p: Target, rows: Int[Tensor, " m"]) -> dict[str, Any]:
    """Return the arguments of a target that has only the other rows of p's samples, in float64.

    Raises:
        TypeError: it has none in memory.
    """
    if p.samples is None:
        raise TypeError("no samples")
    keep = torch.ones(len(p.samples), dtype=torch.bool, device=p.samples.device)
    keep[rows] = False
    samples: Any = p.samples[keep].to(torch.float64)
    if p.context is not None:
        samples = (p.context[keep], samples[:, 0] if p.scalar else samples)
    weights = None if p.weights is None else p.weights[keep]
    return {"samples": samples, "weights": weights, "names": p.names, "support": p.bijection.constraints}


class NegativeEnergy:
    """x ↦ −E(x), so that p(x) = exp(−E(x)) / Z. A module is copied, frozen and called in its own dtype.

    Args:
        energy: E, (n, d) → (n,), a function or an `nn.Module`; a module may return (n, 1).

    Raises:
        InputError: it can't be called, or the module can't be copied.

    Source: LeCun, Chopra, Hadsell, Ranzato & Huang (2006), "A tutorial on energy-based learning".

    >>> import torch
    >>> NegativeEnergy(nn.Linear(2, 1, bias=False).requires_grad_(False))(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, energy: Any) -> None:
        if not callable(energy):
            because = f"it is a `{type(energy).__name__}`"
            raise InputError(cannot("use `energy=`", because, "Pass a function, or a module, of (n, d) points"))
        if isinstance(energy, nn.Module):
            try:
                energy = copy.deepcopy(energy)
            except (RuntimeError, TypeError) as error:
                because = f"the module can't be copied ({' '.join(str(error).split())[:200]})"
                raise InputError(
                    cannot("use `energy=`", because, "Compute what it derives from its weights in `forward`")
                ) from error
            energy.eval().requires_grad_(False)
        self.energy = energy

    def __call__(self, x: Tensor) -> Any:
        """Return −E of each row, in the dtype of x."""
        if not isinstance(self.energy, nn.Module):
            return -self.energy(x)
        every = (*self.energy.parameters(), *self.energy.buffers())
        weight = next((one for one in every if one.is_floating_point()), x)
        value = -self.energy(x.to(weight)).to(x)
        return value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value


def functions_of(
    log_prob: Function | None, energy: Function | None, score: Function | bool | None, normalized: bool, batched: bool
) -> tuple[Function | None, Function | None, bool]:
    """Return log_prob, score and batched after `energy=` and `score=True` were read."""
    if energy is not None:
        if log_prob is not None or score is not None or normalized:
            because = "an energy is the negative of log p, up to its own log Z"
            raise InputError(cannot("use `energy=` with `log_prob=`, `score=` or `normalized=`", because, "Pass one of them"))
        log_prob = NegativeEnergy(energy)
    if score is not True:
        return log_prob, None if score is False else score, batched
    if log_prob is None:
        because = "it means that `log_prob` returns value and gradient, and there is no `log_prob`"
        raise InputError(cannot("use `score=True`", because, "Pass `log_prob=`, or the gradient as `score=`"))
    return paired(log_prob, batched), None, True
