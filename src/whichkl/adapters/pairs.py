"""Pairs: a function that returns a log density with its gradient becomes a tensor function that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from whichkl._checks import TargetError, cannot
from whichkl.user_code import kept_running

Function = Callable[..., Any]


class Paired:
    """x ↦ log p(x), whose gradient is computed with the value; `backward` only multiplies by it.

    Args:
        evaluate: x ↦ (log p, ∇log p), (n, d) → (n,), (n, d), called once for both.

    >>> f = Paired(lambda x: (-x.square().sum(-1) / 2, -x))
    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> torch.autograd.grad(f(x).sum(), x)
    (tensor([[-1., -1.]]),)
    """

    def __init__(self, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.evaluate = evaluate

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p at each row, or at one point (d,)."""
        if x.ndim == 1:
            return self(x[None])[0]
        value: Tensor = _Paired.apply(x, self.evaluate)
        return value


class _Paired(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = evaluate(x.detach())
        if gradient.shape != x.shape:
            because = f"`log_prob` returned a gradient of shape {tuple(gradient.shape)} for points of shape {tuple(x.shape)}"
            raise TargetError(cannot("use this target", because, "Return one gradient per row"))
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable  # a second derivative would be 0, since the gradient is a constant
    def backward(ctx: Any, outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        # rows that aren't needed have outer = 0, and 0 · NaN would be NaN
        return torch.where(outer[:, None] == 0, 0.0, outer[:, None] * gradient), None


def paired(function: Function, batched: bool = True) -> Paired:
    """Return a function that returns the pair (log p, ∇log p), like SciPy's ``jac=True``, as a tensor function.

    Args:
        function: x ↦ (value, gradient), (n, d) → (n,), (n, d), of tensors or of NumPy arrays: if the first call with a
            tensor fails, it gets arrays.
        batched: False if it takes one point, (d,) → (), (d,); it is called once per point.

    >>> f = paired(lambda x: (-np.sum(np.square(x)), -2 * x), batched=False)
    >>> f(torch.tensor([[3.0, 4.0]]))
    tensor([-25.])
    """
    as_array: bool | None = None

    def called(points: Any) -> tuple[Any, Any]:
        pair = function(points)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            because = f"with `score=True` it has to return the pair (value, gradient), and it returned a {type(pair).__name__}"
            raise TargetError(cannot("use this `log_prob`", because, "Return both, or pass the gradient as `score=`"))
        return pair[0], pair[1]

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal as_array
        if as_array is None:
            as_array = not _takes_tensors(function, x[:1] if batched else x[0])
        points = x.cpu().numpy() if as_array else x
        if batched:
            value, gradient = called(points)
            return _tensor(value, x), _tensor(gradient, x)
        pairs = [called(point) for point in points]
        return torch.stack([_tensor(v, x) for v, _ in pairs]), torch.stack([_tensor(g, x) for _, g in pairs])

    return Paired(evaluate)


def _takes_tensors(function: Function, x: Tensor) -> bool:
    """Whether a call with a tensor returns a pair of tensors."""
    try:
        with kept_running():
            return all(isinstance(one, Tensor) for one in function(x))
    except Exception:  # whatever it is, the call with arrays decides
        return False


def _tensor(value: Any, like: Tensor) -> Tensor:
    """Return a value as a tensor like `like`; refuse single precision instead of double, which JAX returns by default."""
    if isinstance(value, Tensor):
        return value.to(like)
    array = np.asarray(value)
    if like.dtype == torch.float64 and array.dtype == np.float32:
        because = "it got float64 points and returned float32: differences of log densities lose their digits"
        instead = "Compute in float64; a JAX function is differentiated here, and needs no gradient (leave `score` out)"
        raise TargetError(cannot("use this `log_prob`", because, instead))
    return torch.as_tensor(array, dtype=torch.float64, device="cpu").to(like)
