"""LogDensity: a user's log p(x), checked, with its gradient: by the user's score, by autograd, or by central differences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import DeadDensityError, NotANumberError, TargetError, cannot, check_log_prob, one_per_row
from whichkl.process.threads import threads_for
from whichkl.process.torch_modes import autograd_on
from whichkl.targets.calling import Convention, Function, Score, call, check_shape, find_convention
from whichkl.targets.line_integral import LineIntegral
from whichkl.targets.liveness import FAILURES, ROWS_BEFORE_CHECK, Liveness
from whichkl.targets.raising_rows import RaisingRows

_MAX_POINTS_ALONE = 3
_MAX_POINTS_DIFFERENCED = 8
_MAX_NATS_BELOW = 1e6
"""Nats below the largest log density so far from which on a gradient may overflow: no mass of p is there."""


class LogDensity:
    """A log density with its gradient.

    One or two calls at a point show whether the function takes tensors or NumPy arrays, and whether autograd reaches it. A
    function of another library's arrays is compiled and differentiated by that library (see `whichkl.adapters`).

    Args:
        function: f(x), (n, d) → (n,), natural log, up to a constant.
        score: g(x), (n, d) → (n, d), its gradient, or None.
        batched: False if both take one point, (d,).
        probes: (k, d), points inside the support; the function is tried once at the first one where it doesn't raise.
    """

    def __init__(self, function: Function, score: Function | None, batched: bool, probes: Float[Tensor, "k d"]) -> None:
        self.function, self.score, self.batched, self.probe, self.spare = function, score, batched, probes[:1], probes[1:]
        self.place: Callable[[Tensor], Tensor] | None = None
        """Maps x to the user's coordinates for error messages, if the function is read in other coordinates."""
        self.liveness = Liveness(self._answers)
        self.raising = RaisingRows(self.liveness)
        self._convention: Convention | None = None
        self._is_verified = False
        self._best = -math.inf

    @property
    def convention(self) -> Convention:
        """How the functions are called; a function of another library is replaced by one of tensors at first use."""
        if self._convention is None:
            found = self._found_convention()
            self.function = found.applied_to(self.function, "log_prob")
            self.score = None if self.score is None else found.applied_to(self.score, "score")
            self.batched = self.batched or found.adapter is not None
            self._convention = found
        return self._convention

    def _found_convention(self) -> Convention:
        """Try the function at one point after the other, until it doesn't raise."""
        try:
            return find_convention(self.function, "log_prob", self.batched, self.probe)
        except TargetError:
            for point in self.spare.split(1):
                with contextlib.suppress(TargetError):
                    return find_convention(self.function, "log_prob", self.batched, point)
            raise

    @property
    def differentiable(self) -> bool:
        """Whether autograd reaches the function."""
        return self.convention.style == "autograd"

    def value(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p at each row."""
        with self.liveness.watched():
            value = self.unchecked(x)
            self.liveness.count(x, value)
            return self._checked(value, x)

    def gradient(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the user's score at each row."""
        found = self.convention
        if self.score is None:
            raise TargetError(cannot("evaluate the score", "the target has none", "Pass `score=`"))
        score = self.score

        def called(rows: Tensor) -> Tensor:
            value = call(score, rows, "score", self.batched, found.takes_arrays, self.probe.dtype)
            return check_shape(value.detach(), rows)

        with threads_for(len(x) * found.work):
            return self.raising.call(called, x, tuple(x.shape[1:]), batched=self.batched)

    def value_and_score(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
        """Return log p and ∇log p at each row, both detached."""
        with self.liveness.watched():
            value, gradient = self._raw(x.detach())
            value, gradient = self._without_overflow(self._checked(value, x), gradient)
            gradient = _check_score(gradient, value, x)
        self.liveness.count(x, value, gradient)
        if len(x) and not self._is_verified:
            self._is_verified = True
            _check_repeatable(self.unchecked, x.detach(), value)
            if self.score is not None or self.differentiable:
                _check_gradient(self, x.detach(), value, gradient)
        return value, gradient

    def trial(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"], int]:
        """Return log p and ∇log p for a search: −∞ and 0 where either isn't a number, and the number of such points.

        Raises:
            DeadDensityError: the function gives no number any more, not even where it once did.
        """
        try:
            found = self._sorted(*self._raw(x.detach()))
        except DeadDensityError:
            raise
        except NotANumberError as error:  # every row raises
            self.liveness.check(error)
            found = self._sorted(torch.full_like(x[:, 0], math.nan), torch.zeros_like(x))
        except FAILURES as error:
            self.liveness.check(error)
            return self._split_trial(x)
        self.liveness.count(x, *found[:2])
        return found

    def tried(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], int]:
        """Return log p for a search: −∞ where it's NaN, and the number of such points."""
        with self.liveness.watched():
            try:
                value = self.unchecked(x).detach()
            except NotANumberError:  # every row raises
                value = torch.full_like(x[:, 0], math.nan)
            self.liveness.count(x, value)
            nan = value.isnan()
            return self._checked(value.masked_fill(nan, -math.inf), x), int(nan.sum())

    def unchecked(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return log p at each row, which may be NaN or +inf; NaN where the function raises, unless it raises for every row."""
        found = self.convention  # first, since it may replace the function

        def called(rows: Tensor) -> Tensor:
            return one_per_row(call(self.function, rows, "log_prob", self.batched, found.takes_arrays, self.probe.dtype), rows)

        with threads_for(len(x) * found.work):
            value = self.raising.call(called, x, (), batched=self.batched)
        if not self.liveness.has_answered:
            self.liveness.remember(x, value)
        return value

    def _answers(self, x: Float[Tensor, "1 d"], with_gradient: bool) -> bool:
        """Whether log p, with its gradient if asked for, is a number at a point."""
        value, rejected = self._sorted(*self._raw(x))[::2] if with_gradient else (self.unchecked(x).detach(), 0)
        return not rejected and bool(value.isfinite().all())

    def _sorted(self, value: Tensor, gradient: Tensor) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"], int]:
        """Put −∞ and 0 where the value or the gradient isn't a number, and count these points, unless p has no mass there."""
        if math.isfinite(float(value.sum() + gradient.sum())):  # then each is finite: the usual case
            self._best = max(self._best, float(value.max())) if len(value) else self._best
            return value, gradient, 0
        value, gradient = self._without_overflow(value, gradient)
        wrong = value.isnan() | (value == math.inf) | ~gradient.isfinite().all(-1) & value.isfinite()
        wrong_or_zero = wrong | ~value.isfinite()
        gradient = torch.where(wrong_or_zero[:, None], 0.0, gradient)
        return torch.where(wrong, -math.inf, value), gradient, int(wrong.sum())

    def _without_overflow(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Put −∞ and 0 where the gradient isn't finite and log p is millions of nats below its largest value so far."""
        known = value[value.isfinite()]
        self._best = max(self._best, float(known.max())) if len(known) else self._best
        hopeless = ~gradient.isfinite().all(-1) & (value < self._best - _MAX_NATS_BELOW)
        return value.masked_fill(hopeless, -math.inf), gradient.masked_fill(hopeless[:, None], 0.0)

    def _split_trial(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, int]:
        """Find the points at which the function raises, by halving the rows, and reject only these points.

        Raises:
            DeadDensityError: the function gives no number any more.
        """
        if len(x) == 1:
            return torch.full_like(x[:, 0], -math.inf), torch.zeros_like(x), 1
        parts = []
        for half in x.tensor_split(2):
            try:
                parts.append(self._sorted(*self._raw(half.detach())))
            except DeadDensityError:
                raise
            except FAILURES as error:
                parts.append(self._split_trial(half))
                if len(half) >= ROWS_BEFORE_CHECK and parts[-1][2] == len(half):
                    self.liveness.check(error)
        (left, right), (above, below), counts = zip(*parts, strict=True)
        return torch.cat([left, right]), torch.cat([above, below]), sum(counts)

    def _raw(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Call the function and its gradient; only their shapes are checked."""
        if self.score is not None:
            value = self.unchecked(x).detach()  # first, since it may replace both functions
            return value, self.gradient(x)
        if self.differentiable:
            with threads_for(len(x) * self.convention.work), autograd_on():
                point = x.clone().requires_grad_(True)
                value = self.unchecked(point)
                leads = value.requires_grad  # false if every row lies outside the support
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
        """Find the rows whose gradient is NaN, by halving: under `detect_anomaly` torch raises for the whole batch."""
        if len(x) == 1:
            return self.unchecked(x).detach(), torch.full_like(x, math.nan)
        value, gradient = zip(*(self._raw(half) for half in x.tensor_split(2)), strict=True)
        return torch.cat(value), torch.cat(gradient)

    def _checked(self, value: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return the values, or raise `TargetError` if one is neither a number nor −∞."""
        is_number = value.shape == (len(x),) and not bool((value.isnan() | (value == math.inf)).any())
        raised = self.raising.said if self.raising.has_raised else ""
        return value if is_number else check_log_prob(value, self.place(x) if self.place else x, raised=raised)

    def _central_differences(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        n, d = x.shape
        step = torch.finfo(self.probe.dtype).eps ** (1 / 3) * x.abs().clamp(min=1.0)
        moves = torch.diag_embed(step)
        ends = torch.cat([x[:, None] + moves, x[:, None] - moves]).reshape(-1, d)
        high, low = self.unchecked(ends).detach().reshape(2, n, d)
        slope: Tensor = (high - low) / (2 * step)
        return slope


def density_of(
    log_prob: Function | None,
    score: Function | None,
    batched: bool,
    probes: Float[Tensor, "k d"],
    count: Callable[[int], None],
) -> tuple[LogDensity | None, LineIntegral | None]:
    """Return the user's log density; without one, the integral of a score along lines, which counts its gradients."""
    if log_prob is not None or score is None:
        return (None if log_prob is None else LogDensity(log_prob, score, batched, probes)), None
    gradient = Score(score, batched, probes[:1])
    integral = LineIntegral(gradient, probes[:1], count)
    return LogDensity(integral, gradient, True, probes[:1].to(torch.float64)), integral


def _check_repeatable(log_prob: Callable[[Tensor], Tensor], x: Float[Tensor, "n d"], value: Float[Tensor, " n"]) -> None:
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


def _check_gradient(
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


def _check_score(gradient: Tensor, value: Tensor, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return the gradient if it is finite wherever the value is."""
    wrong = ~gradient.isfinite().all(-1) & value.isfinite()
    if bool(wrong.any()):
        shown = ", ".join(f"{v:.4g}" for v in x[wrong][0][:8].tolist())
        because = f"the gradient of `log_prob` is not finite at {int(wrong.sum())} of {len(x)} points, first at ({shown})"
        instead = "Write the log density so that it can be differentiated there (no where() around a NaN branch)"
        raise TargetError(cannot("use this target", because, instead))
    return gradient
