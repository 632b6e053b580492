"""Torch modes: global modes of torch and NumPy that the user may have set, and on which no result may depend."""

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

from whichkl.process.threads import few_threads

_DTYPE_OF_NEW_MODULES = torch.float32
"""Networks are built in torch's usual dtype, and converted to their own afterwards."""


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """Switch autograd on, inference mode, autocast and NumPy's floating-point errors off, and use few threads of torch.

    It decorates every public function that computes, so that `torch.no_grad()`, `torch.inference_mode()`, `torch.autocast()` and
    `numpy.seterr(all="raise")` around a call change no result.
    """
    with contextlib.ExitStack() as modes:
        for mode in (torch.inference_mode(False), torch.enable_grad(), np.errstate(all="ignore"), few_threads()):
            modes.enter_context(mode)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


def autograd_on() -> AbstractContextManager[Any]:
    """Return a context in which autograd works; it usually costs less than `plain_modes`, and is for inner loops."""
    return plain_modes() if torch.is_inference_mode_enabled() else torch.enable_grad()


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Build this library's modules on the CPU in float32, whatever torch's default device and dtype are.

    This library passes dtype and device with every tensor that it makes. The modules and optimizers of torch and zuko use the
    process's defaults, which are overridden in the calling thread.
    """
    if torch.get_default_dtype() == _DTYPE_OF_NEW_MODULES and torch.get_default_device().type == "cpu":
        yield
        return
    with _OwnDefaults():
        yield


class _OwnDefaults(TorchFunctionMode):
    """Passes device and dtype to calls that make a tensor without them."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func not in _device_constructors():
            return func(*args, **given)
        if given.get("device") is None:
            given["device"] = args[0].device if args and isinstance(args[0], Tensor) else "cpu"
        if given.get("dtype") is None and (func in _FLOATING or (func in _BY_VALUE and _is_floating(func, args, given))):
            given["dtype"] = _DTYPE_OF_NEW_MODULES
        return func(*args, **given)


_FLOATING = {torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn, torch.linspace, torch.logspace}
_BY_VALUE = {torch.tensor, torch.as_tensor, torch.full, torch.arange, torch.scalar_tensor}
"""Functions whose dtype depends on their arguments; only Python's numbers take the default dtype."""


def _is_floating(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> bool:
    if any(isinstance(one, (Tensor, np.ndarray, np.generic)) for one in [*args, *given.values()]):
        return False
    made: Tensor = func(*args, **given)
    return made.is_floating_point()


def without_inference_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in which every torch call gets copies of tensors that were made under `torch.inference_mode()`.

    Autograd can't save such tensors. They can be in the closure of a user's function or in a distribution, where
    only torch's own calls meet them. This costs time, so it is for functions that failed without it.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        with _Copies():
            return function(*args, **kwargs)

    return called


def is_of_inference(error: BaseException | None) -> bool:
    """Whether torch raised an error because a tensor was made under `torch.inference_mode()`."""
    return isinstance(error, RuntimeError) and "nference tensor" in str(error)


def normal(x: Tensor) -> Tensor:
    """Return a tensor that autograd can save: a copy if it was made under `torch.inference_mode()`, else itself."""
    return x.clone() if x.is_inference() else x


class _Copies(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = tree_map(lambda one: normal(one) if isinstance(one, Tensor) else one, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)
