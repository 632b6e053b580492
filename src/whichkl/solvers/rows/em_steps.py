"""EM steps: the E step of several mixtures over the rows, the M step from its sums, and standard coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Family, Mixture, StudentT
from whichkl.families.mixture import mixture
from whichkl.families.student_t import MultivariateStudentT
from whichkl.samples import Block
from whichkl.samples.stream import PART, Slice, slices
from whichkl.solvers.rows.em_features import ROWS, Features, pairs_of
from whichkl.solvers.rows.em_scales import scales_of
from whichkl.solvers.rows.rows import Rows, Sums

_PRODUCTS_PER_PART = 20_000_000
"""Products of numbers per part of rows in memory in an E step, about a millisecond of work."""
_MAX_PARTS = 4
"""Largest number of such parts."""
_MAX_PRECISION_IN_SINGLE = 1e5
"""Largest trace of a precision times the dimension at which float32 gives log densities to a hundredth."""
_LEAST_LOG_SHARE = -60.0
"""Logarithm of a component's least share of a row, relative to the largest: far below rounding, and far above the subnormal
numbers of float32, whose exponentials take eight times as long."""
FREEDOM = (0.2, 1e3)
"""Range of the degrees of freedom; above it a Student-t can't be distinguished from a normal."""
_FREEDOM_TOLERANCE = 1e-12
"""Tolerance of the logarithm of the degrees of freedom; below it rounding dominates."""


@dataclass(frozen=True)
class State:
    """S mixtures of K components in standardised coordinates; `df` is None for Gaussians."""

    probs: Float[Tensor, "s k"]
    loc: Float[Tensor, "s k d"]
    cov: Float[Tensor, "s k d d"]
    df: Float[Tensor, "s k"] | None = None

    def each(self, function: Callable[..., Tensor], *others: State) -> State:
        """Apply a function to every field, and to the same field of the others."""
        parts = [function(*(getattr(one, name) for one in (self, *others))) for name in self.named()]
        return State(*parts)

    def named(self) -> dict[str, Tensor]:
        """Return the fields by name, without `df` if it is None."""
        fields = {"probs": self.probs, "loc": self.loc, "cov": self.cov}
        return fields if self.df is None else {**fields, "df": self.df}

    def take(self, starts: Tensor) -> State:
        """Return some of the starts."""
        return self.each(lambda part: part[starts])

    def joined(self, *others: State) -> State:
        """Return all of them as one batch of starts."""
        return self.each(lambda *parts: torch.cat(parts), *others)

    @property
    def fits_single(self) -> bool:
        """Whether float32 is precise enough for an E step that isn't the last one."""
        dim = self.loc.shape[-1]
        tril, failed = torch.linalg.cholesky_ex(self.cov)
        trace = torch.cholesky_inverse(tril).diagonal(dim1=-2, dim2=-1).sum(-1)
        return not bool(failed.any()) and float(trace.max()) * dim < _MAX_PRECISION_IN_SINGLE


@dataclass(frozen=True)
class Frame:
    """Coordinates in which every column has mean 0 and variance 1, and the options of the family."""

    shift: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    mixing: Float[Tensor, "d d"] | None
    """The Cholesky factor of the correlations, where columns nearly agree: rows are multiplied by its inverse. Else None."""
    floor: Float[Tensor, "d d"]
    """F of the condition Σ ⪰ F on the covariance of every component, in these coordinates."""
    covariance: str
    count: int
    is_student: bool
    is_single: bool
    """Whether the model is a single law rather than a mixture."""

    @classmethod
    def of(cls, sample: Block, family: Family, names: Sequence[str]) -> Frame:
        """Take the scales from a sample of the rows.

        Raises:
            InputError: columns determine each other, and the covariance isn't diagonal.
        """
        if not isinstance(family, (Mixture, StudentT)):
            raise TypeError(family)
        scales = scales_of(sample, family, names)
        if isinstance(family, StudentT):
            return cls(*scales, family.covariance, count=1, is_student=True, is_single=True)
        return cls(*scales, family.covariance, family.count, family.law == "student_t", is_single=False)

    @property
    def parameters(self) -> int:
        """The number of free parameters."""
        dim = len(self.shift)
        each = dim if self.covariance == "diagonal" else dim * (dim + 1) // 2
        covariances = 1 if self.covariance == "tied" else self.count
        return self.count * (1 + dim + self.is_student) - 1 + covariances * each

    def parts(self, block: Block, states: int) -> tuple[Slice, ...]:
        """Cut rows in memory into parts for threads, if the E step of this many states takes long enough."""
        dim = len(self.shift)
        features = 2 * dim if self.covariance == "diagonal" else dim * (dim + 3) // 2
        count = min(_MAX_PARTS, 1 + len(block) * states * self.count * features // _PRODUCTS_PER_PART)
        return slices(block, min(PART, max(1, -(-len(block) // count))))

    def is_at_floor(self, state: State) -> bool:
        """Return whether some component is as narrow in some direction as the floor allows."""
        if self.covariance == "diagonal":
            narrowest = (state.cov[0].diagonal(dim1=-2, dim2=-1) / self.floor.diagonal()).min()
        else:
            narrowest = torch.linalg.eigvalsh(_relative(state.cov[0], torch.linalg.cholesky(self.floor))).min()
        return bool(narrowest < 1 + 1e-6)

    def standard(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Carry rows into these coordinates."""
        y = (x - self.shift) / self.scale
        return y if self.mixing is None else torch.linalg.solve_triangular(self.mixing, y.T, upper=False).T

    def model(self, state: State, i: int) -> Distribution:
        """Carry one of the states back, as a torch distribution."""
        back = torch.diag(self.scale) if self.mixing is None else self.scale[:, None] * self.mixing
        tril = back @ torch.linalg.cholesky(state.cov[i])
        loc, df = self.shift + state.loc[i] @ back.T, None if state.df is None else state.df[i]
        if self.is_single and df is not None:
            return MultivariateStudentT(df[0], loc[0], tril[0], validate_args=False)
        return mixture(state.probs[i], loc, tril, self.covariance, df)

    def loss(self, likelihood: Tensor) -> float:
        """Return −mean log q in the coordinates of the rows."""
        volume = self.scale.log().sum()
        return float((volume if self.mixing is None else volume + self.mixing.diagonal().log().sum()) - likelihood)

    def update(self, rows: Rows, dtype: torch.dtype, state: State) -> tuple[Float[Tensor, " s"], State]:
        """Take an E and an M step over all rows; return the mean log likelihood at each state, and the states after the step."""
        densities = Densities.of(state, dtype, diagonal=self.covariance == "diagonal")
        sums = rows.total(partial(expectation, densities, self))
        return sums["likelihood"] / sums["weight"], m_step(sums, state, self.floor, self.covariance)


@dataclass(frozen=True)
class Densities:
    """The log densities of the components of S mixtures, as coefficients of the features of a row, in the dtype of the E step."""

    forms: Float[Tensor, "sk p"]
    """Those of log π q(x) for Gaussians, of δ = (x − m)ᵀ Σ⁻¹ (x − m) for Student-t."""
    constant: Float[Tensor, "s k 1"]
    df: Float[Tensor, "s k 1"] | None

    @classmethod
    def of(cls, state: State, dtype: torch.dtype, *, diagonal: bool) -> Densities:
        """Compute them once for all parts of the rows."""
        forms, constant = quadratic_forms(state, diagonal=diagonal), _log_constant(state, diagonal=diagonal)
        if state.df is None:
            forms = -forms / 2
            forms[:, 0] += constant.reshape(-1)
        df = None if state.df is None else state.df.to(dtype)[..., None]
        return cls(forms.to(dtype), constant.to(dtype)[..., None], df)

    def at(self, features: Float[Tensor, "p m"], dim: int) -> tuple[Float[Tensor, "s k m"], Float[Tensor, "s k m"]]:
        """Return log π q of rows, and what the coefficients give, from which Student-t's is computed."""
        form = (self.forms @ features).reshape(*self.constant.shape[:2], -1)
        if self.df is None:
            return form, form
        return self.constant - (self.df + dim) / 2 * torch.log1p(form.clamp(min=0) / self.df), form


@dataclass(frozen=True)
class Background:
    """Components of one mixture that others have besides their own."""

    densities: Densities
    kept: Float[Tensor, "s k"]
    """1 where a mixture has the component, else 0."""

    def at(self, features: Float[Tensor, "p m"], dim: int) -> Float[Tensor, "s 1 m"]:
        """Return the log of Σ π q over the components that each mixture has."""
        joint = self.densities.at(features, dim)[0][0]
        top = joint.amax(0)
        return ((self.kept @ (joint - top).clamp_(min=_LEAST_LOG_SHARE).exp_()).log() + top)[:, None]


def expectation(densities: Densities, frame: Frame, blocks: Iterator[Block], background: Background | None = None) -> Sums:
    """Take the E step over the blocks of a part: Σ w r φ(x) per component and Σ w log q per start, in float64.

    φ are 1, the products of columns and the columns. The log densities and the sums are each one matrix product with these
    features, which is half the work of whitened residuals. For Student-t components r is multiplied by u = (ν + d)/(ν + δ), the
    expected precision of a row, and `spread` is Σ w r (log u − u), for the degrees of freedom.

    Every state can have weights of its own: `w` of a block is then (m, s). A background adds to each mixture's density.

    Source: Dempster, Laird & Rubin (1977); for Student-t, Liu & Rubin (1995).
    """
    df, dtype, dim = densities.df, densities.forms.dtype, len(frame.shift)
    starts, count = densities.constant.shape[:2]
    zero = torch.zeros(starts, count, dtype=torch.float64, device="cpu")
    sums = {"likelihood": zero[:, 0].clone(), "weight": zero.new_zeros(()), "mass": zero.clone(), "spread": zero.clone()}
    sums["moments"] = zero.new_zeros(starts * count, densities.forms.shape[1])
    space = Features(dim, dtype, diagonal=frame.covariance == "diagonal")
    for block in blocks:
        for x, w in zip(block.x.split(ROWS), block.w.split(ROWS), strict=True):
            features = space.of(frame.standard(x))
            joint, form = densities.at(features, dim)
            # Log-sum-exp by hand: the shares are the very exponentials that the sum needs.
            top = joint.amax(1, keepdim=True)
            behind = None if background is None else background.at(features, dim)
            top = top if behind is None else torch.maximum(top, behind)
            share = (joint - top).clamp_(min=_LEAST_LOG_SHARE).exp_()
            total = share.sum(1, keepdim=True)
            total = total if behind is None else total + (behind - top).clamp_(min=_LEAST_LOG_SHARE).exp_()
            evidence = (top + total.log())[:, 0].to(torch.float64)
            share *= (w.to(dtype) if w.ndim == 1 else w.T.to(dtype)[:, None]) / total
            sums["likelihood"] += evidence @ w if w.ndim == 1 else (evidence * w.T).sum(-1)
            sums["weight"] = sums["weight"] + w.sum(0)
            if df is not None:
                up = (df + dim) / (df + form.clamp(min=0))
                sums["mass"] += share.sum(-1).to(torch.float64)
                sums["spread"] += (share * (up.log() - up)).sum(-1).to(torch.float64)
                share *= up
            sums["moments"] += (share.reshape(starts * count, -1) @ features.T).to(torch.float64)
    return sums


def m_step(sums: Sums, state: State, floor: Float[Tensor, "d d"], covariance: str) -> State:
    """Take the M step: weighted moments, with covariances above `floor`, and one covariance for all components if tied."""
    starts, count, dim = state.loc.shape
    diagonal = covariance == "diagonal"
    moments = sums["moments"]
    around = moments[:, 0].clamp(min=1e-12)
    mean = moments[:, -dim:] / around[:, None]
    mass = (moments[:, 0].reshape(starts, count) if state.df is None else sums["mass"]).clamp(min=1e-12)
    second = moments[:, 1:-dim] / around[:, None]
    if diagonal:
        moment = torch.diag_embed(second - mean.square())
    else:
        row, column = pairs_of(dim, diagonal=False)
        moment = torch.zeros(starts * count, dim, dim, dtype=torch.float64, device="cpu")
        moment[:, row, column] = second
        moment[:, column, row] = second
        moment = moment - mean[:, :, None] * mean[:, None, :]
    if state.df is not None:
        moment = moment * (around / mass.reshape(-1))[:, None, None]
    moment = moment.reshape(starts, count, dim, dim)
    if covariance == "tied":
        together = (mass[..., None, None] * moment).sum(1, keepdim=True) / mass.sum(1)[:, None, None, None]
        moment = together.expand(starts, count, dim, dim)
    df = None if state.df is None else _freedom(state.df, dim, sums["spread"] / mass)
    probs = mass / mass.sum(-1, keepdim=True)
    return State(probs, mean.reshape(starts, count, dim), _above(moment, floor, diagonal=diagonal), df)


def quadratic_forms(state: State, *, diagonal: bool) -> Float[Tensor, "sk p"]:
    """Return the coefficients of δ = (x − m)ᵀ Σ⁻¹ (x − m) in the features of x."""
    starts, count, dim = state.loc.shape
    loc = state.loc.reshape(-1, dim)
    cov = state.cov.reshape(-1, dim, dim)
    inverse = (
        torch.diag_embed(1 / cov.diagonal(dim1=-2, dim2=-1)) if diagonal else torch.cholesky_inverse(torch.linalg.cholesky(cov))
    )
    middle = (inverse @ loc[..., None])[..., 0]
    row, column = pairs_of(dim, diagonal=diagonal)
    products = inverse[:, row, column] * (1 + (row != column).to(inverse.dtype))
    return torch.cat([(middle * loc).sum(-1, keepdim=True), products, -2 * middle], -1)


def _log_constant(state: State, *, diagonal: bool) -> Float[Tensor, "s k"]:
    """Return log π plus the logarithm of the component's normaliser."""
    dim = state.loc.shape[-1]
    root = (
        state.cov.diagonal(dim1=-2, dim2=-1).sqrt() if diagonal else torch.linalg.cholesky(state.cov).diagonal(dim1=-2, dim2=-1)
    )
    constant: Tensor = state.probs.log() - root.log().sum(-1)
    if state.df is None:
        return constant - 0.5 * dim * math.log(2 * math.pi)
    return constant + torch.lgamma((state.df + dim) / 2) - torch.lgamma(state.df / 2) - 0.5 * dim * (state.df * math.pi).log()


def _freedom(df: Float[Tensor, "s k"], dim: int, spread: Float[Tensor, "s k"]) -> Float[Tensor, "s k"]:
    """Solve log(ν/2) − ψ(ν/2) + 1 + mean(log u − u) + ψ((ν′ + d)/2) − log((ν′ + d)/2) = 0 for ν by Newton's method in log ν.

    ν′ is the old ν; the left side falls with ν (Liu & Rubin, 1995). A step that leaves the bracket is replaced by the bracket's
    middle. If the root lies beyond an end of `FREEDOM`, that end is returned.
    """
    old = (df + dim) / 2
    constant = 1 + spread + torch.digamma(old) - old.log()
    low, high = (torch.full_like(df, math.log(end)) for end in FREEDOM)
    ends = torch.tensor(FREEDOM, dtype=torch.float64, device="cpu") / 2
    at_low, at_high = (ends.log() - torch.digamma(ends)).tolist()
    to_low, to_high = at_low + constant <= 0, at_high + constant > 0
    outside = to_low | to_high
    t = torch.where(to_low, low, torch.where(to_high, high, df.log().clamp(math.log(FREEDOM[0]), math.log(FREEDOM[1]))))
    for _ in range(60):
        half = t.exp() / 2
        value = half.log() - torch.digamma(half) + constant
        low, high = torch.where(value > 0, t, low), torch.where(value > 0, high, t)
        step = t - value / (1 - half * torch.polygamma(1, half))
        step = torch.where((step > low - _FREEDOM_TOLERANCE) & (step < high + _FREEDOM_TOLERANCE), step, (low + high) / 2)
        # A root beyond an end stays at that end, where Newton's steps would run away.
        step = torch.where(outside, t, step)
        moved, t = float((step - t).abs().amax()), step
        if not moved > _FREEDOM_TOLERANCE:
            break
    return t.exp()


def _above(covariance: Float[Tensor, "s k d d"], floor: Float[Tensor, "d d"], *, diagonal: bool) -> Float[Tensor, "s k d d"]:
    """Raise covariances to Σ ⪰ floor, the exact M step under that constraint: eigenvalues are clipped in its metric."""
    if diagonal:
        return torch.diag_embed(torch.maximum(covariance.diagonal(dim1=-2, dim2=-1), floor.diagonal()))
    if not bool(torch.linalg.cholesky_ex(covariance - floor)[1].any()):
        return covariance
    root = torch.linalg.cholesky(floor)
    eigenvalue, vector = torch.linalg.eigh(_relative(covariance, root))
    vector = root @ vector
    above: Tensor = (vector * eigenvalue.clamp(min=1.0)[..., None, :]) @ vector.mT
    return above


def _relative(covariance: Float[Tensor, "... d d"], root: Float[Tensor, "d d"]) -> Float[Tensor, "... d d"]:
    """Return L⁻¹ Σ L⁻ᵀ."""
    half = torch.linalg.solve_triangular(root, covariance, upper=False)
    relative: Tensor = torch.linalg.solve_triangular(root, half.mT, upper=False)
    return relative
