"""Gradient check: the first values and gradients of a log density are compared with repeated calls and with differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.targets.line_integral import LineIntegral

if TYPE_CHECKING:
    from whichkl.targets.log_density import LogDensity

_MAX_POINTS_ALONE = 3
_MAX_POINTS_DIFFERENCED = 8


def check_repeatable(log_prob: Callable[[Tensor], Tensor], x: Float[Tensor, "n d"], value: Float[Tensor, " n"]) -> None:
    """Call a log density at single points, and compare with its values in the batch."""
    alone = torch.cat([log_prob(x[i : i + 1]).detach() for i in range(min(_MAX_POINTS_ALONE, len(x)))])
    together = value[: len(alone)]
    apart = (alone - together).abs() > 1e-3 * (1 + together.abs())
    if not bool((apart & together.isfinite()).any()):
        return
    again = log_prob(x).detach()
    noise = (again - value).abs() > 1e-6 * (1 + value.abs())
    if bool(noise.any()):
        two = f"{float(value[noise][0]):.4g} and {float(again[noise][0]):.4g}"
        because = f"`log_prob` isn't a function: two calls at one point returned {two}"
        instead = "Remove the noise (dropout: call `.eval()`; random draws inside: fix their seed)"
    else:
        found = f"{float(together[apart][0]):.4g} in it, {float(alone[apart][0]):.4g} alone"
        because = f"`log_prob` of a point depends on the batch: {found}"
        instead = "Compute each row independently; a mean or sum over dim 0 mixes rows"
    raise TargetError(cannot("use this target", because, instead))


def check_gradient(
    density: LogDensity, x: Float[Tensor, "n d"], value: Float[Tensor, " n"], gradient: Float[Tensor, "n d"]
) -> None:
    """Compare gradients with differences of values along random directions: a part that is cut off from autograd shows here."""
    pick = value.isfinite().nonzero()[:_MAX_POINTS_DIFFERENCED, 0]
    x, value, gradient = x[pick], value[pick], gradient[pick]
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    along = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True)
    eps = torch.finfo(density.probe.dtype).eps
    step = eps ** (1 / 3) * torch.linalg.vector_norm(x, dim=-1).clamp(min=1.0)
    ahead, behind = (density.unchecked(x + sign * step[:, None] * along).detach() for sign in (1, -1))
    difference, slope = (ahead - behind) / (2 * step), (gradient * along).sum(-1)
    slack = 0.05 * (difference.abs() + slope.abs()) + 1e-3 * torch.linalg.vector_norm(gradient, dim=-1)
    wrong = (difference - slope).abs() > slack + 1e-6 + 100 * eps * value.abs() / step
    known = ahead.isfinite() & behind.isfinite()
    if 2 * int((wrong & known).sum()) <= int(known.sum()):
        return
    found = f"{float(slope[wrong][0]):.4g} where differences give {float(difference[wrong][0]):.4g}"
    if isinstance(density.function, LineIntegral):
        because = f"`score` is the gradient of no log density: it's {found} of its own integrals along lines"
        instead = "Check its signs and coordinates, or pass `log_prob=`, whose gradient it is"
    else:
        who = "`score` is" if density.score is not None else "autograd's gradient of `log_prob` is"
        because = f"{who} not the gradient of its values: {found}"
        cuts = "a detach, a .item() or NumPy inside cuts the gradient"
        instead = f"Correct it ({cuts}), or return an array, so that differences are used"
    raise TargetError(cannot("use this target", because, instead))


def check_score(gradient: Tensor, value: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient if it is finite wherever the value is."""
    wrong = ~gradient.isfinite().all(-1) & value.isfinite()
    if bool(wrong.any()):
        shown = ", ".join(f"{v:.4g}" for v in x[wrong][0][:8].tolist())
        because = f"the gradient of `log_prob` is not finite at {int(wrong.sum())} of {len(x)} points, first at ({shown})"
        instead = "Write the log density so that it can be differentiated there (no where() around a NaN branch)"
        raise TargetError(cannot("use this target", because, instead))
    return gradient
