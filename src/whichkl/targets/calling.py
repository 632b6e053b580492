"""Calling: how a user's log density or score is called (tensors or arrays, rows or one point), found by one or two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, WhichklError, cannot
from whichkl.adapters import FUNCTION_ADAPTERS, FunctionAdapter, library_folders
from whichkl.arrays import tensor_of
from whichkl.distributions import names_a_range
from whichkl.process.lock import without_warnings
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.threads import Counted, threads_for
from whichkl.process.torch_modes import is_of_inference, plain_modes, without_inference_tensors
from whichkl.user_code import call_user, place_of, release_frames, said_of

Function = Callable[..., Any]
Who = Literal["log_prob", "score"]
Style = Literal["autograd", "tensor", "numpy"]


@dataclass(frozen=True)
class Convention:
    """How a function is called."""

    style: Style
    """`autograd`: it takes tensors, and gradients flow. `tensor`: it takes tensors, no gradient comes back. `numpy`: arrays."""
    batched: bool
    """Whether it takes rows, (n, d), rather than one point, (d,)."""
    adapter: FunctionAdapter | None = None
    """What makes a function of another library one of tensors."""
    work: int = 0
    """How many numbers torch computes for one point."""
    copies: bool = False
    """Whether it gets copies of tensors that were made under `torch.inference_mode()`."""

    @property
    def takes_arrays(self) -> bool:
        """Whether points are passed as NumPy arrays."""
        return self.style == "numpy"

    def applied_to(self, function: Function, who: Who) -> Function:
        """Return the function in a form that this convention calls; an adapted function takes rows of tensors."""
        if self.adapter is not None:
            adapt = self.adapter.log_density if who == "log_prob" else self.adapter.score
            return adapt(function, None if self.batched else False)
        return without_inference_tensors(function) if self.copies else function


def find_convention(function: Function, who: Who, batched: bool, probe: Float[Tensor, "1 d"]) -> Convention:
    """Call a function with a tensor, then with an array, until one call succeeds."""
    returned: list[Any] = []

    def watched(x: Any) -> Any:
        returned.append(inner(x))
        return returned[-1]

    errors: list[TargetError] = []
    inner, attempts = function, [False, True]
    while attempts:
        as_array, value, cause = attempts.pop(0), None, None
        returned.clear()
        try:
            with plain_modes(), without_warnings():  # a function of arrays may warn about a tensor
                point = probe.clone().requires_grad_(True) if who == "log_prob" else probe
                with Counted() as counted:
                    value = call(watched, point, who, batched, as_array)
        except TargetError as error:
            cause = error.__cause__
            release_frames(cause)
            if is_of_inference(cause) and inner is function:  # start again, with copies of such tensors
                inner, attempts, errors = without_inference_tensors(function), [False, True], []
                continue
            errors.append(error)
        for adapter in FUNCTION_ADAPTERS:
            if adapter.claims_error(cause) or (returned and adapter.claims_value(returned[-1])):
                return Convention("autograd", batched, adapter)
        if value is not None:
            if who == "score":
                check_shape(value, probe)
            style: Style = "numpy" if as_array else "autograd" if value.requires_grad else "tensor"
            return Convention(style, batched, None, counted.numbers, inner is not function)
    for adapter in FUNCTION_ADAPTERS:
        if adapter.claims_function(function, probe, who == "score"):
            return Convention("autograd", batched, adapter)
    raise errors[0] from errors[0].__cause__


def call(
    function: Function, x: Float[Tensor, "n d"], who: Who, batched: bool, as_array: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Call a user's function at rows of x, converted to `dtype`; the result has the dtype and the device of `x`."""
    read = x if dtype is None else x.to(dtype)
    own = read if read.requires_grad else read.clone()  # since the function may change it
    points: Any = own.detach().cpu().numpy() if as_array else own
    version = None if read.is_inference() else read._version
    try:
        with np.errstate(all="ignore"):  # the user's `np.seterr` would raise where a density underflows
            values = _tensor(function(points), x) if batched else [_tensor(function(point), x) for point in points]
    except (KeyboardInterrupt, WhichklError):
        raise
    except BaseException as error:  # SystemExit too: a script's `sys.exit` must not end the fit
        refuse_if_ran_out(error, f"evaluate `{who}` at {len(x):,} point{'s' * (len(x) != 1)}")
        said = said_of(error)
        because = f"{said}{place_of(error, library_folders())}"
        gets = f"{'an (n, d) tensor' if batched else 'one (d,) point'} of {str(read.dtype).removeprefix('torch.')}"
        instead = f"Correct the function; it gets {gets}" + (", which `dtype=` changes" if "dtype" in said else "")
        instead = f"Pass `support=`, or correct the function; it gets {gets}" if names_a_range(error) else instead
        raise TargetError(cannot(f"evaluate `{who}`", because, instead)) from error
    if version is not None and read._version != version:
        because, instead = f"`{who}` changes its argument in place", "Compute on a copy, such as `x = x.clone()`"
        raise TargetError(cannot("use this target", because, instead))
    if isinstance(values, Tensor):
        return values
    due = () if who == "log_prob" else tuple(x.shape[1:])
    wrong = next((one for one in values if not _is_of_shape(one, due)), None)
    if wrong is not None:
        because = f"`{who}` returned shape {tuple(wrong.shape)} for one point of dimension {x.shape[-1]}, not {due}"
        instead = "Return one number" if who == "log_prob" else "Return the gradient at that point"
        raise TargetError(cannot("use this target", because, f"{instead}, or leave `batched=False` out if it takes rows"))
    return torch.stack([one.reshape(due) for one in values]) if values else x.new_empty(0, *due)


def check_shape(gradient: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient if it has the shape of `x`, up to axes of length 1."""
    if not _is_of_shape(gradient, tuple(x.shape)):
        because = f"`score` returned shape {tuple(gradient.shape)} for points of shape {tuple(x.shape)}"
        raise TargetError(cannot("use this target", because, "Return one gradient per row"))
    return gradient.reshape(x.shape)


def _is_of_shape(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a value has this shape up to axes of length 1, which NumPy and SciPy squeeze."""
    return [k for k in value.shape if k != 1] == [k for k in shape if k != 1]


class Score:
    """A user's score without a log density, as a function of tensors."""

    def __init__(self, function: Function, batched: bool, probe: Float[Tensor, "1 d"]) -> None:
        self.function, self.batched, self.probe = function, batched, probe
        self._convention: Convention | None = None

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ∇log p at each row."""
        if self._convention is None:
            found = find_convention(self.function, "score", self.batched, self.probe)
            self.function = found.applied_to(self.function, "score")
            self.batched = self.batched or found.adapter is not None
            self._convention = found
        as_array = self._convention.takes_arrays
        with threads_for(len(x) * self._convention.work):
            return check_shape(call(self.function, x.detach(), "score", self.batched, as_array, self.probe.dtype).detach(), x)


def _tensor(value: Any, like: Tensor) -> Tensor:
    if value is None:
        raise TargetError(cannot("evaluate this function", "it returned None", "Return a tensor or an array, one row per point"))
    if torch.is_complex(value) if isinstance(value, Tensor) else np.iscomplexobj(value):
        raise TargetError(
            cannot("evaluate this function", "it returned complex numbers", "Return real ones, such as `value.real`")
        )
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.as_tensor(np.asarray(value, dtype=np.float64), dtype=torch.float64, device="cpu").to(like)


def values_of(f: Callable[[Tensor], Any], points: Float[Tensor, "n d"], do: str) -> Tensor:
    """Return what a user's function of points returns, (n,) or (n, k), in float64 on the CPU.

    Raises:
        InputError: it returned anything else; `do` says what can't be done.
    """
    returned = call_user(lambda: f(points), do)
    if returned is None:
        raise InputError(cannot(do, "it returned None", "Return (n,) or (n, k)"))
    try:
        value = tensor_of(returned).detach()
    except (TypeError, ValueError) as error:
        because = f"it returned a `{type(returned).__name__}`"
        raise InputError(cannot(do, because, "Return (n,) or (n, k) numbers")) from error
    if value.is_complex():
        raise InputError(cannot(do, "it returned complex numbers", "Return (n,) or (n, k) real numbers"))
    value = value.to("cpu", torch.float64)
    if value.ndim not in (1, 2) or len(value) != len(points):
        because = f"it returned shape {tuple(value.shape)} for {len(points)} points"
        raise InputError(cannot(do, because, "Return (n,) or (n, k), one row per point"))
    if not bool(value.isfinite().all()):
        because = f"it isn't finite at {int((~value.isfinite()).sum())} of {value.numel()} places"
        raise InputError(cannot(do, because, "Return finite numbers"))
    return value
