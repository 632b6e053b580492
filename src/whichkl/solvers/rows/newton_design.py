"""Newton's design: the standardised columns x of a generalised linear model, and the passes over the rows (x, y)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.families.design import check_context, context_names, refuse_degenerate
from whichkl.families.generalized_linear import GeneralizedLinear, Response
from whichkl.samples import Block
from whichkl.solvers.rows.closed_form import shift_to_mean
from whichkl.solvers.rows.rows import Rows, Sums, add_sums

_COMBINE: dict[str, Any] = {"reach": max, "least": min, "most": max}
"""How the results of two parts are combined; all others are added."""


@dataclass(frozen=True)
class Evaluation:
    """Loss, gradient and curvature at θ, summed over n rows, and the changes of the rows' η in the step that led to θ."""

    loss: float
    gradient: Float[Tensor, "k c1"]
    curvature: Tensor
    """The Hessian over the flattened θ, or its diagonal in the shape of `gradient`."""
    reach: float
    """The largest change of an η."""
    least: float
    most: float
    """The least and largest `Response.gain` of a row."""

    def separates(self, certain: float) -> bool:
        """Return whether the step lowers no row's likelihood, at any length, and raises some row's."""
        return self.most > 1e-3 * self.reach > 0 and self.least >= -certain * self.reach


@dataclass(frozen=True)
class Design:
    """The family, and the standardisation of the columns x; θ is (k, c + 1) with the bias last."""

    family: GeneralizedLinear
    names: list[str]
    center: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]
    columns: int
    """k: one row of weights, or one per class."""
    count: float
    """n, the number of rows; their weights are scaled to this sum."""
    per_row: float
    frequencies: Float[Tensor, " k"]
    """The mean of y, or the share of each class."""

    def start(self) -> Float[Tensor, "k c1"]:
        """Return weights of 0, and the biases that fit the frequencies of y."""
        theta = self.center.new_zeros(self.columns, len(self.center) + 1)
        f = self.frequencies
        log = f.log()
        theta[:, -1] = torch.logit(f) if self.family.response == "bernoulli" else log - log.mean() if len(f) > 1 else log
        return theta

    def model(self, theta: Float[Tensor, "k c1"]) -> Any:
        """Return the model in the original units of x; weights of several classes sum to 0 over the classes."""
        theta = theta - theta.mean(0) if self.columns > 1 else theta
        weight = theta[:, :-1] / self.scale
        bias = theta[:, -1] - weight @ self.center
        return self.family.model({"weight": weight, "bias": bias})

    def theta(self, model: Any) -> Float[Tensor, "k c1"]:
        """Return the θ of a model that came from another design with the same number of columns."""
        return torch.cat([model.weight * self.scale, (model.bias + model.weight @ self.center)[:, None]], 1)

    @property
    def prior(self) -> Float[Tensor, " c1"]:
        """The penalty on each column of θ: on W in the original units of x, and none on the bias."""
        return torch.cat([self.family.penalty / self.scale.square(), self.scale.new_zeros(1)])

    def evaluate(self, rows: Rows, theta: Tensor, step: Tensor | None, *, hessian: bool) -> Evaluation:
        """Return loss, gradient and Hessian (or its diagonal) at θ, and the effect of `step` on the rows; one pass."""
        total: dict[str, Any] = {}
        for one in rows.map(partial(_derivatives, self, theta, step, "hessian" if hessian else "diagonal")):
            for name, value in one.items():
                total[name] = _COMBINE.get(name, operator.add)(total[name], value) if name in total else value
        prior, k = self.prior, self.columns
        loss = self.per_row * float(total["loss"]) + 0.5 * float((prior * theta.square()).sum())
        curvature = self.per_row * total["curvature"]
        if hessian:
            curvature = curvature + torch.diag(prior.repeat(k))
            if k > 1:  # adding a constant to all η changes nothing: a curvature there keeps steps from going that way
                same = prior.new_full((k, k), self.count / k)
                curvature = curvature + torch.kron(same, torch.eye(len(prior), dtype=prior.dtype, device=prior.device))
        else:
            curvature = curvature + prior
        gradient = self.per_row * total["gradient"] + prior * theta
        return Evaluation(loss, gradient, curvature, total["reach"], total["least"], total["most"])

    def product(self, rows: Rows, theta: Tensor, by: Tensor) -> Float[Tensor, "k c1"]:
        """Return Hessian · by; one pass."""
        parts = (one["curvature"] for one in rows.map(partial(_derivatives, self, theta, by, "product")))
        turned: Tensor = sum(parts, torch.zeros_like(theta))
        return self.per_row * turned + self.prior * by

    def separating(self, rows: Rows) -> list[int]:
        """Return the columns x that alone separate a group of y from the rest."""
        low, high = (torch.stack(ends) for ends in zip(*rows.map(partial(_ends, self)), strict=True))
        low, high = low.amin(0), high.amax(0)
        alone: set[int] = set()
        for group in range(len(low)):
            rest = torch.arange(len(low), device="cpu") != group
            below, above = low[rest].amin(0), high[rest].amax(0)
            apart = ((high[group] <= below) | (low[group] >= above)) & ((low[group] < above) | (high[group] > below))
            if self.family.response == "poisson":  # where something was counted the column must not vary
                apart &= low[1] == high[1]
            alone |= set(apart.nonzero().flatten().tolist())
        return sorted(alone)


def _derivatives(
    design: Design, theta: Tensor, step: Tensor | None, what: Literal["hessian", "diagonal", "product"], blocks: Iterator[Block]
) -> dict[str, Any]:
    """Add up loss, gradient and curvature over the blocks of a part."""
    law, k, size = design.family.law, len(theta), theta.numel()
    loss, gradient, reach, least, most = 0.0, torch.zeros_like(theta), 0.0, torch.inf, -torch.inf
    curvature = theta.new_zeros(size, size) if what == "hessian" else torch.zeros_like(theta)
    for block in blocks:
        x = (check_context(design.family, block.context) - design.center) / design.scale
        x, y, w = torch.cat([x, torch.ones_like(x[:, :1])], 1), block.x[:, 0], block.w
        eta = x @ theta.T
        mean = law.mean(eta)
        if step is not None and what == "product":
            curvature += law.turn(mean, x @ step.T * w[:, None]).T @ x
            continue
        loss -= float(w @ law.law(eta).log_prob(y))
        gradient += ((mean - law.code(y, k)) * w[:, None]).T @ x
        if what == "hessian":
            curvature += _hessian(law, mean, x, w)
        else:
            curvature += (torch.stack([law.curve(mean, a, a) for a in range(k)]) * w) @ x.square()
        if step is not None:
            counted = w > 0
            change = x[counted] @ step.T
            gain = law.gain(change, y[counted])
            if len(gain):
                reach = max(reach, float(change.abs().max()))
                least, most = min(least, float(gain.min())), max(most, float(gain.max()))
    return {"loss": loss, "gradient": gradient, "curvature": curvature, "reach": reach, "least": least, "most": most}


def _ends(design: Design, blocks: Iterator[Block]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest x of each group of y, (groups, c)."""
    law, groups = design.family.law, max(2, design.columns)
    low, high = (
        torch.full((groups, len(design.center)), end, dtype=torch.float64, device="cpu") for end in (torch.inf, -torch.inf)
    )
    for block in blocks:
        x, side = check_context(design.family, block.context), law.side(block.x[:, 0])
        for group in range(groups):
            mine = x[(side == group) & (block.w > 0)].cpu()
            if len(mine):
                low[group], high[group] = low[group].minimum(mine.amin(0)), high[group].maximum(mine.amax(0))
    return low, high


def _hessian(law: Response, mean: Tensor, x: Tensor, w: Tensor) -> Tensor:
    k, c = mean.shape[1], x.shape[1]
    blocks = x.new_zeros(k, c, k, c)
    for a in range(k):
        for b in range(a, k):
            blocks[a, :, b] = ((w * law.curve(mean, a, b))[:, None] * x).T @ x
            blocks[b, :, a] = blocks[a, :, b]
    return blocks.reshape(k * c, k * c)


def survey(rows: Rows, family: GeneralizedLinear, names: Sequence[str]) -> Design:
    """Read the rows once to standardise x, and refuse rows to which the family can't be fitted.

    Raises:
        InputError: y holds a value that the response doesn't take, or a class never occurs; a column x is constant, or depends
            on others and there is no penalty.
    """
    first = rows.first_block()
    family.check_columns(first.x.shape[1])
    # Moments about a row and not about 0: x² − mean² would cancel for columns far from 0.
    origin = check_context(family, first.context)[0]
    sums = rows.total(partial(_survey, family, origin))
    if (shift := shift_to_mean(sums["weight"], sums["x"], sums["xx"].diagonal())) is not None:
        origin = origin + shift
        sums = rows.total(partial(_survey, family, origin))
    shift = sums["x"] / sums["weight"]
    if int(sums["outside"]):
        because = (
            f"y holds {int(sums['outside']):,} values that `{family.response}` doesn't take: it takes {family.law.values.words}"
        )
        raise InputError(cannot(f"fit `{family}`", because, family.advice))
    family.check_count(int(sums["rows"]), 1)
    frequencies = sums["codes"] / sums["weight"]
    _check_frequencies(family, frequencies)
    covariance = sums["xx"] / sums["weight"] - torch.outer(shift, shift)
    known = context_names(names, len(origin))
    refuse_degenerate(family, covariance, known, dependent=family.penalty == 0)
    columns = len(frequencies) if family.response == "categorical" else 1
    count = float(sums["rows"])
    # Standardised columns make the Hessian well conditioned, whatever units x has.
    center, scale = origin + shift, covariance.diagonal().sqrt()
    return Design(family, known, center, scale, columns, count, count / float(sums["weight"]), frequencies)


def _check_frequencies(family: GeneralizedLinear, frequencies: Tensor) -> None:
    if family.response == "poisson":
        if float(frequencies[0]) == 0:
            because = "all counts y are 0, so the likelihood has no maximum"
            raise InputError(cannot(f"fit `{family}`", because, "Give rows with counts above 0"))
        return
    if family.response == "bernoulli":
        frequencies = torch.stack([1 - frequencies[0], frequencies[0]])
    missing = (frequencies <= 0).nonzero().flatten().tolist()
    if missing or len(frequencies) < 2:
        which = missing[0] if missing else 1
        because = f"class {which} never occurs in y, so its likelihood has no maximum"
        raise InputError(cannot(f"fit `{family}`", because, "Give rows of it, or code the classes that occur as 0 … K−1"))


def _survey(family: GeneralizedLinear, origin: Float[Tensor, " c"], blocks: Iterator[Block]) -> Sums:
    """Add up moments of x about an origin, and y or the weight of each class."""
    zero, c = origin.new_zeros(()), len(origin)
    sums: Sums = {}
    add_sums(sums, dict.fromkeys(("rows", "weight", "outside"), zero))
    add_sums(sums, {"x": zero.expand(c), "xx": zero.expand(c, c), "codes": zero[None]})
    for block in blocks:
        x, y = check_context(family, block.context) - origin, block.x[:, 0]
        inside = family.law.values.contains(y)
        y = torch.where(inside, y, 0)
        is_class = family.response == "categorical"
        more = {
            "rows": (block.w > 0).sum(),
            "weight": block.w.sum(),
            "outside": (~inside).sum(),
            "x": block.w @ x,
            "xx": (block.w[:, None] * x).T @ x,
            "codes": torch.bincount(y.long(), weights=block.w) if is_class else (block.w @ y)[None],
        }
        add_sums(sums, more)
    return sums
