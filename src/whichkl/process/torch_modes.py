"""Modes: what a user may have switched on for a thread or the process, and what no result of this library depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map

_BUILT_IN = torch.float32
"""What networks are built in, as everywhere in torch; they are carried to their own dtype afterwards."""


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """Have autograd on, inference mode off and NumPy's floating-point errors silent inside the block, in the calling thread.

    Every public function that computes is decorated with it, so that `torch.no_grad()`, `torch.inference_mode()` and
    `numpy.seterr(all="raise")` around a call change no result.
    """
    with torch.inference_mode(False), torch.enable_grad(), np.errstate(all="ignore"):
        yield


def autograd_on() -> AbstractContextManager[Any]:
    """Return a block in which autograd works, at less cost than `plain_modes` where it may be: for inner loops."""
    return plain_modes() if torch.is_inference_mode_enabled() else torch.enable_grad()


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Build modules on the CPU, in float32, whatever torch's default device and dtype are; for this library's modules alone.

    The code of this library names dtype and device at every tensor that it makes. That of torch's modules and optimizers, and of
    zuko's, leaves them to the defaults, which are the process's: they are overridden in the calling thread.
    """
    if torch.get_default_dtype() == _BUILT_IN and torch.get_default_device().type == "cpu":
        yield
        return
    with _OwnDefaults():
        yield


class _OwnDefaults(TorchFunctionMode):
    """Names device and dtype where a call that makes a tensor doesn't."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func not in _device_constructors():
            return func(*args, **given)
        if given.get("device") is None:
            given["device"] = args[0].device if args and isinstance(args[0], Tensor) else "cpu"
        if given.get("dtype") is None and (func in _FLOATING or (func in _BY_VALUE and _is_floating(func, args, given))):
            given["dtype"] = _BUILT_IN
        return func(*args, **given)


_FLOATING = {torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn, torch.linspace, torch.logspace}
_BY_VALUE = {torch.tensor, torch.as_tensor, torch.full, torch.arange, torch.scalar_tensor}
"""Makers of tensors whose dtype depends on what they are given; only Python's numbers take the default."""


def _is_floating(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> bool:
    if any(isinstance(one, (Tensor, np.ndarray, np.generic)) for one in [*args, *given.values()]):
        return False
    made: Tensor = func(*args, **given)
    return made.is_floating_point()


def without_inference_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads copies of the tensors that it was given under `torch.inference_mode()`.

    Autograd can't keep such a tensor. What a user's function holds in its closure, or a distribution in its parameters, is seen
    by torch's own calls alone, so that each of them is intercepted: for functions that have failed without.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        with _Copies():
            return function(*args, **kwargs)

    return called


def is_of_inference(error: BaseException | None) -> bool:
    """Whether torch raised because autograd met a tensor that was made under `torch.inference_mode()`."""
    return isinstance(error, RuntimeError) and "nference tensor" in str(error)


def normal(x: Tensor) -> Tensor:
    """Return a tensor that autograd can keep: a copy of one that was made under `torch.inference_mode()`, else itself."""
    return x.clone() if x.is_inference() else x


class _Copies(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = tree_map(lambda one: normal(one) if isinstance(one, Tensor) else one, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)
