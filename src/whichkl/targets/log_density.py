"""LogDensity: a user's function log p(x), how it wants to be called and how it is differentiated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import DeadDensityError, ResourceError, TargetError, WhichklError, cannot, check_log_prob
from whichkl.adapters import jax as adapters
from whichkl.process.lock import without_warnings
from whichkl.process.memory import refuse_if_ran_out
from whichkl.process.torch_modes import autograd_on, is_of_inference, plain_modes, without_inference_tensors
from whichkl.targets.line_integral import LineIntegral
from whichkl.user_code import said_of

Function = Callable[..., Any]
_FAILURES = (TargetError, ResourceError)
"""What a call of the user's function raises; memory may suffice for fewer points at once."""
_PATIENCE = 8
"""Rows in a row without a number after which a log density is tried where it once gave one."""
_TRIES = 3
"""Calls at that point before a log density counts as dead: a server may fail once."""


class LogDensity:
    """A log density, with its gradient by the user's score, by autograd, or by central differences.

    A function that can't take a tensor that requires a gradient is called with NumPy arrays; one of JAX arrays, which is
    seen by what it returns or complains of, is compiled and differentiated by JAX.

    Args:
        function: f(x), (n, d) → (n,), natural log, up to a constant.
        score: g(x), (n, d) → (n, d), its gradient, or None.
        batched: False if both take one point, (d,).
        probe: (1, d), a point inside the support where the function is tried once.
    """

    def __init__(self, function: Function, score: Function | None, batched: bool, probe: Float[Tensor, "1 d"]) -> None:
        """Take the functions; see the class for the arguments."""
        self.function, self.score, self.batched, self.probe = function, score, batched, probe
        self.place: Callable[[Tensor], Tensor] | None = None
        """Where errors say that a point lies: elsewhere than x, where the function is read in other coordinates."""
        self.source: LogDensity | None = None
        """The log density that the function calls, where it is that of other coordinates."""
        self._verified = self._copies = False
        self._answered: tuple[Float[Tensor, "1 d"], bool] | None = None
        """A point where the function gave a number, and whether there was a gradient too."""
        self._unanswered, self._patience = 0, _PATIENCE

    @property
    def differentiable(self) -> bool:
        """Whether autograd reaches the function."""
        return self._style == "autograd"

    def value(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p at each row.

        Raises:
            TargetError: the function raised, or returned the wrong shape, NaN or +inf.
        """
        with self._watched():
            value = self.unchecked(x)
            self._count(x, value)
            return self._checked(value, x)

    def gradient(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the user's score at each row.

        Raises:
            TargetError: there is none, it raised, or it returned the wrong shape.
        """
        as_array = self._style == "numpy"
        if self.score is None:
            raise TargetError(cannot("evaluate the score", "the target has none", "Pass `score=`"))
        return check_shape(call(self.score, x, "score", self.batched, as_array, self.probe.dtype).detach(), x)

    def trial(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"], int]:
        """Return log p and ∇log p for a search: −∞ and 0 where either isn't a number, and how many points that were.

        Raises:
            DeadDensityError: the function gives no number any more, not even where it once did.
        """
        try:
            found = self._sorted(*self._raw(x.detach()))
        except DeadDensityError:
            raise
        except _FAILURES as error:
            self._check_alive(error)
            return self._split_trial(x)
        self._count(x, *found[:2])
        return found

    def _sorted(self, value: Tensor, gradient: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"], int]:
        """Put −∞ and 0 where value or gradient isn't a number, and count these points."""
        if math.isfinite(float(value.sum() + gradient.sum())):  # so is each: the usual case
            return value, gradient, 0
        wrong = value.isnan() | (value == math.inf) | ~gradient.isfinite().all(-1) & value.isfinite()
        wrong_or_zero = wrong | ~value.isfinite()
        gradient = torch.where(wrong_or_zero[:, None], 0.0, gradient)
        return torch.where(wrong, -math.inf, value), gradient, int(wrong.sum())

    def tried(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], int]:
        """Return log p for a search: −∞ where it's NaN, and at how many points that was.

        Raises:
            TargetError: as `value`, but for NaN.
        """
        with self._watched():
            value = self.unchecked(x).detach()
            self._count(x, value)
            nan = value.isnan()
            return self._checked(value.masked_fill(nan, -math.inf), x), int(nan.sum())

    def _split_trial(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, int]:
        """Find the points at which the function raises, by halves, and reject those alone.

        Raises:
            DeadDensityError: it stops to give numbers meanwhile.
        """
        if len(x) == 1:
            return torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x), 1
        parts = []
        for half in x.tensor_split(2):
            try:
                parts.append(self._sorted(*self._raw(half.detach())))
            except DeadDensityError:
                raise
            except _FAILURES as error:
                parts.append(self._split_trial(half))
                if len(half) >= _PATIENCE and parts[-1][2] == len(half):
                    self._check_alive(error)
        (left, right), (above, below), counts = zip(*parts, strict=True)
        return torch.cat([left, right]), torch.cat([above, below]), sum(counts)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Let an error out of the block as it is, or as that of a dead function."""
        try:
            yield
        except DeadDensityError:
            raise
        except _FAILURES as error:
            self._check_alive(error)
            raise

    def _count(self, x: Float[Tensor, "n d"], value: Tensor, gradient: Tensor | None = None) -> None:
        """Remember a point that got a number, and try one again where for many rows there was none.

        Raises:
            DeadDensityError: there is none at that point either.
        """
        if self._remember(x, value, gradient):
            self._unanswered, self._patience = 0, _PATIENCE
            return
        self._unanswered += len(x)
        if self._unanswered >= self._patience:
            self._patience = 2 * self._unanswered
            self._check_alive()

    def _remember(self, x: Float[Tensor, "n d"], value: Tensor, gradient: Tensor | None = None) -> bool:
        """Whether any value is a number; the first such point is kept."""
        known = value.detach().isfinite()
        if not bool(known.any()):
            return False
        if self._answered is None or (gradient is not None and not self._answered[1]):
            first = int(known.int().argmax())
            self._answered = x[first : first + 1].detach().clone(), gradient is not None
        return True

    def _check_alive(self, error: WhichklError | None = None) -> None:
        """Call the function where it once gave a number.

        Raises:
            DeadDensityError: it gives none there any more, at several calls.
        """
        if self._is_alive():
            return
        self._unanswered, self._patience = 0, _PATIENCE  # whoever asks next is told at once
        cause = None if error is None else error.__cause__
        said = "" if cause is None else f" ({type(cause).__name__}: {(str(cause).splitlines() or [''])[0]})"
        because = f"`log_prob` gives no number any more, not even at a point where it gave one before{said}"
        instead = "Bring back what it depends on (a server, memory, a file), and fit again"
        raise DeadDensityError(cannot("go on with this target", because, instead)) from error

    def _is_alive(self) -> bool:
        """Whether the function still gives a number where it once did, or never did anywhere."""
        if self._answered is None:
            return self.source is None or self.source._is_alive()
        x, has_gradient = self._answered
        for _ in range(_TRIES):
            with contextlib.suppress(*_FAILURES):
                value, rejected = self._sorted(*self._raw(x))[::2] if has_gradient else (self.unchecked(x).detach(), 0)
                if not rejected and bool(value.isfinite().all()):
                    return True
        return False

    def value_and_score(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """Return log p and ∇log p at each row, both detached.

        Raises:
            TargetError: as `value`, or the gradient isn't finite where the value is.
        """
        with self._watched():
            value, gradient = self._raw(x.detach())
            value = self._checked(value, x)
            gradient = check_score(gradient, value, x)
        self._count(x, value, gradient)
        if len(x) and not self._verified:
            self._verify(x.detach(), value, gradient)
        return value, gradient

    def _raw(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Call the function and its gradient; only their shapes are checked."""
        if self.score is not None:
            value = self.unchecked(x).detach()  # before the gradient, since it settles what the functions are
            return value, self.gradient(x)
        if self.differentiable:
            with autograd_on():
                point = x.clone().requires_grad_(True)
                value = self.unchecked(point)
                leads = value.requires_grad  # not where every row lies outside the support
                try:
                    gradient = torch.autograd.grad(value.sum(), point)[0] if leads else torch.zeros_like(x)
                except RuntimeError as error:
                    if "returned nan values" not in str(error):
                        raise
                    return self._split_raw(x)
            value = value.detach()
        else:
            value, gradient = self.unchecked(x).detach(), self._central_differences(x)
        return value, check_shape(gradient, x)

    def _split_raw(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Find the rows whose gradient is NaN, by halves: with `torch.autograd.detect_anomaly` torch raises for the batch."""
        if len(x) == 1:
            return self.unchecked(x).detach(), torch.full_like(x, math.nan)
        value, gradient = zip(*(self._raw(half) for half in x.tensor_split(2)), strict=True)
        return torch.cat(value), torch.cat(gradient)

    def _checked(self, value: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return values if each is a number or −∞.

        Raises:
            TargetError: one isn't.
        """
        is_number = value.shape == (len(x),) and not bool((value.isnan() | (value == math.inf)).any())
        return value if is_number else check_log_prob(value, self.place(x) if self.place else x)

    def unchecked(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p at each row, which may be NaN or +inf.

        Raises:
            TargetError: the function raised, or returned the wrong shape.
        """
        as_array = self._style == "numpy"  # first, since it settles what the function is
        value = call(self.function, x, "log_prob", self.batched, as_array, self.probe.dtype)
        if tuple(value.shape) != (len(x),):
            return check_log_prob(value, x)  # raises
        if self._answered is None:
            self._remember(x, value)
        return value

    def _verify(self, x: Float[Tensor, "n d"], value: Float[Tensor, " n"], gradient: Float[Tensor, "n d"]) -> None:
        """Hold the first gradients against differences of the values: a part cut off from autograd shows here.

        Raises:
            TargetError: they disagree at most of up to eight points.
        """
        self._verified = True
        alone = torch.cat([self.unchecked(x[i : i + 1]).detach() for i in range(min(3, len(x)))])
        together = value[: len(alone)]
        apart = (alone - together).abs() > 1e-3 * (1 + together.abs())
        if bool((apart & together.isfinite()).any()):
            again = self.unchecked(x).detach()
            noise = (again - value).abs() > 1e-6 * (1 + value.abs())
            if bool(noise.any()):
                two = f"{float(value[noise][0]):.4g} and {float(again[noise][0]):.4g}"
                because = f"`log_prob` isn't a function: it was {two} at one point, at two calls"
                instead = "Take the noise out (dropout: `.eval()`; draws inside: fix their seed)"
                raise TargetError(cannot("use this target", because, instead))
            found = f"{float(together[apart][0]):.4g} in it, {float(alone[apart][0]):.4g} alone"
            because = f"`log_prob` of a point depends on the batch: {found}"
            raise TargetError(
                cannot("use this target", because, "Treat every row by itself; a mean or sum over dim 0 mixes them")
            )
        if self.score is None and not self.differentiable:
            return
        pick = value.isfinite().nonzero()[:8, 0]
        x, value, gradient = x[pick], value[pick], gradient[pick]
        generator = torch.Generator().manual_seed(0)
        along = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
        along = along / torch.linalg.vector_norm(along, dim=-1, keepdim=True)
        eps = torch.finfo(self.probe.dtype).eps
        step = eps ** (1 / 3) * torch.linalg.vector_norm(x, dim=-1).clamp(min=1.0)
        ahead, behind = (self.unchecked(x + sign * step[:, None] * along).detach() for sign in (1, -1))
        difference, slope = (ahead - behind) / (2 * step), (gradient * along).sum(-1)
        slack = 0.05 * (difference.abs() + slope.abs()) + 1e-3 * torch.linalg.vector_norm(gradient, dim=-1)
        wrong = (difference - slope).abs() > slack + 1e-6 + 100 * eps * value.abs() / step
        known = (ahead.isfinite() & behind.isfinite()).sum()
        if 2 * int((wrong & ahead.isfinite() & behind.isfinite()).sum()) > int(known):
            who = "`score` is" if self.score is not None else "autograd's gradient of `log_prob` is"
            found = f"{float(slope[wrong][0]):.4g} where differences give {float(difference[wrong][0]):.4g}"
            because = f"{who} not the gradient of its values: {found}"
            instead = (
                "Mend it (a detach, a .item() or NumPy inside cuts the gradient), or return an array to have differences used"
            )
            if isinstance(self.function, LineIntegral):
                because = f"`score` is the gradient of no log density: it's {found} of its own integrals along lines"
                instead = "Check its signs and coordinates, or pass `log_prob=`, whose gradient it is"
            raise TargetError(cannot("use this target", because, instead))

    def _central_differences(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        n, d = x.shape
        step = torch.finfo(self.probe.dtype).eps ** (1 / 3) * x.abs().clamp(min=1.0)
        moves = torch.diag_embed(step)
        ends = torch.cat([x[:, None] + moves, x[:, None] - moves]).reshape(-1, d)
        high, low = self.unchecked(ends).detach().reshape(2, n, d)
        slope: Tensor = (high - low) / (2 * step)
        return slope

    @cached_property
    def _style(self) -> str:
        """`autograd`, `tensor` (takes tensors, no gradient comes back) or `numpy`; found by one or two calls."""
        returned: list[Any] = []

        def watched(x: Any) -> Any:
            returned.append(self.function(x))
            return returned[-1]

        errors: list[TargetError] = []
        for as_array in (False, True):
            try:
                with plain_modes(), without_warnings():  # of what a function of arrays makes of a tensor
                    value = call(watched, self.probe.clone().requires_grad_(True), "log_prob", self.batched, as_array)
            except TargetError as error:
                if is_of_inference(error.__cause__) and not self._copies:
                    self.function, self._copies = without_inference_tensors(self.function), True
                    return self._style
                errors.append(error)
                if adapters.is_from_jax(error.__cause__):
                    return self._compile()
                continue
            if adapters.is_jax(returned[-1]):
                return self._compile()
            return "numpy" if as_array else "autograd" if value.requires_grad else "tensor"
        if adapters.is_function(self.function, self.probe):
            return self._compile()
        raise errors[0] from errors[0].__cause__

    def _compile(self) -> str:
        """Have JAX compile and differentiate its own functions; from here on they take tensors."""
        batched = None if self.batched else False
        self.function = adapters.log_density(self.function, batched)
        if self.score is not None:
            self.score = adapters.score(self.score, batched)
        self.batched = True
        return "autograd"


class Score:
    """A user's score that stands alone, as a function of tensors whatever it takes.

    Args:
        function: g(x), (n, d) → (n, d).
        batched: False if it takes one point, (d,).
        probe: (1, d), a point inside the support where it's tried once.
    """

    def __init__(self, function: Function, batched: bool, probe: Float[Tensor, "1 d"]) -> None:
        """Take the function; see the class for the arguments."""
        self.function, self.batched, self.probe = function, batched, probe

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return ∇log p at each row.

        Raises:
            TargetError: the function raised, or returned another shape.
        """
        as_array = self._as_array  # first, since it settles what the function is
        return check_shape(call(self.function, x.detach(), "score", self.batched, as_array, self.probe.dtype).detach(), x)

    @cached_property
    def _as_array(self) -> bool:
        """Whether it takes arrays and no tensors; a function of JAX arrays is compiled."""
        returned: list[Any] = []

        def watched(x: Any) -> Any:
            returned.append(self.function(x))
            return returned[-1]

        errors: list[TargetError] = []
        for as_array in (False, True):
            try:
                with without_warnings():  # of what a function of arrays makes of a tensor
                    found = call(watched, self.probe, "score", self.batched, as_array)
            except TargetError as error:
                errors.append(error)
                if adapters.is_from_jax(error.__cause__):
                    return self._compile()
                continue
            if adapters.is_jax(returned[-1]):
                return self._compile()
            check_shape(found, self.probe)
            return as_array
        if adapters.is_function(self.function, self.probe, gradient=True):
            return self._compile()
        raise errors[0] from errors[0].__cause__

    def _compile(self) -> bool:
        self.function, self.batched = adapters.score(self.function, None if self.batched else False), True
        return False


def call(
    function: Function, x: Float[Tensor, "n d"], who: str, batched: bool, as_array: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Call a user's function on a batch, read in `dtype`; what it returns comes back in the dtype and on the device of `x`.

    Raises:
        TargetError: the function raised (its message and line are named), or returned the wrong shape for one point.
    """
    read = x if dtype is None else x.to(dtype)
    points = read.detach().cpu().numpy() if as_array else read
    try:
        with np.errstate(all="ignore"):  # also the user's, which would raise where a density underflows
            if batched:
                return _tensor(function(points), x)
            values = [_tensor(function(point), x) for point in points]
    except (KeyboardInterrupt, WhichklError):
        raise
    except BaseException as error:  # SystemExit too: a script's `sys.exit` must not end the fit
        refuse_if_ran_out(error, f"evaluate `{who}` at {len(x):,} point{'s' * (len(x) != 1)}")
        said = said_of(error)
        because = f"{said}{adapters.place_of(error)}"
        gets = f"{'an (n, d) tensor' if batched else 'one (d,) point'} of {str(read.dtype).removeprefix('torch.')}"
        instead = f"Mend the function; it gets {gets}" + (", which `dtype=` changes" if "dtype" in said else "")
        raise TargetError(cannot(f"evaluate `{who}`", because, instead)) from error
    due = () if who == "log_prob" else tuple(x.shape[1:])
    wrong = next((one for one in values if tuple(one.shape) != due), None)
    if wrong is not None:
        because = f"`{who}` returned shape {tuple(wrong.shape)} for one point of dimension {x.shape[-1]}, not {due}"
        instead = "Return one number" if who == "log_prob" else "Return the gradient at that point"
        raise TargetError(cannot("use this target", because, f"{instead}, or leave `batched=False` out if it takes rows"))
    return torch.stack(values) if values else x.new_empty(0, *due)


def check_score(gradient: Tensor, value: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient if it is finite wherever the value is.

    Raises:
        TargetError: it isn't.
    """
    wrong = ~gradient.isfinite().all(-1) & value.isfinite()
    if bool(wrong.any()):
        shown = ", ".join(f"{v:.4g}" for v in x[wrong][0][:8].tolist())
        because = f"the gradient of `log_prob` is not finite at {int(wrong.sum())} of {len(x)} points, first at ({shown})"
        instead = "Write the log density so that it can be differentiated there (no where() around a NaN branch)"
        raise TargetError(cannot("use this target", because, instead))
    return gradient


def check_shape(gradient: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient if it has the shape of `x`.

    Raises:
        TargetError: it hasn't.
    """
    if gradient.shape != x.shape:
        because = f"`score` returned shape {tuple(gradient.shape)} for points of shape {tuple(x.shape)}"
        raise TargetError(cannot("use this target", because, "Return one gradient a row"))
    return gradient


def _tensor(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like)
    if value is None:
        raise TargetError(cannot("evaluate this function", "it returned None", "Return a tensor or an array, a row each point"))
    return torch.as_tensor(np.asarray(value, dtype=np.float64), dtype=torch.float64, device="cpu").to(like)
