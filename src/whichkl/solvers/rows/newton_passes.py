"""Regression: passes over the rows (x, y) of a generalised linear model, in standardised columns x."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl.families.design import check_context
from whichkl.families.generalized_linear import GeneralizedLinear
from whichkl.families.responses import Response
from whichkl.samples import Block
from whichkl.solvers.rows.rows import Rows

_JOIN: dict[str, Any] = {"reach": max, "least": min, "most": max}


@dataclass(frozen=True)
class Evaluation:
    """Loss, gradient and curvature at θ, summed over n rows; and what the step that led there did to the rows' η."""

    loss: float
    gradient: Float[Tensor, "k c1"]
    curvature: Tensor
    """The Hessian over θ in one line, or, as `gradient`, its diagonal."""
    reach: float
    """The largest change of an η."""
    least: float
    most: float
    """The least and largest `Response.gain` of a row."""

    def separates(self, certain: float) -> bool:
        """Whether the step lowers no row's likelihood, however far one goes along it, and raises some."""
        return self.most > 1e-3 * self.reach > 0 and self.least >= -certain * self.reach


@dataclass(frozen=True)
class Design:
    """What a pass needs: the family, and how the columns x are standardised; θ is (k, c + 1) with the bias last."""

    family: GeneralizedLinear
    names: list[str]
    center: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]
    columns: int
    """k: one row of weights, or one for each class."""
    count: float
    """n, the number of rows; their weights are scaled to this sum."""
    per_row: float
    frequencies: Float[Tensor, " k"]
    """The mean of y, or the share of each class."""

    def start(self) -> Float[Tensor, "k c1"]:
        """No weights, and the biases that the frequencies of y call for."""
        theta = self.center.new_zeros(self.columns, len(self.center) + 1)
        f = self.frequencies
        log = f.log()
        theta[:, -1] = torch.logit(f) if self.family.response == "bernoulli" else log - log.mean() if len(f) > 1 else log
        return theta

    def model(self, theta: Float[Tensor, "k c1"]) -> Any:
        """Return the model in the units of x as given, a multinomial one's with sums 0 over the classes."""
        theta = theta - theta.mean(0) if self.columns > 1 else theta
        weight = theta[:, :-1] / self.scale
        bias = theta[:, -1] - weight @ self.center
        return self.family.model({"weight": weight, "bias": bias})

    def theta(self, model: Any) -> Float[Tensor, "k c1"]:
        """Return the θ of a model, where `model` came from another design of as many columns."""
        return torch.cat([model.weight * self.scale, (model.bias + model.weight @ self.center)[:, None]], 1)

    @property
    def prior(self) -> Float[Tensor, " c1"]:
        """The penalty on each column of θ: on W in the units of x, none on the bias."""
        return torch.cat([self.family.penalty / self.scale.square(), self.scale.new_zeros(1)])

    def evaluate(self, rows: Rows, theta: Tensor, step: Tensor | None, *, hessian: bool) -> Evaluation:
        """Return loss, gradient and Hessian (or its diagonal) at θ, and what `step` does to the rows; one pass."""
        total: dict[str, Any] = {}
        for one in rows.map(_Derivatives(self, theta, step, "hessian" if hessian else "diagonal")):
            for name, value in one.items():
                total[name] = _JOIN.get(name, operator.add)(total[name], value) if name in total else value
        prior, k = self.prior, self.columns
        loss = self.per_row * float(total["loss"]) + 0.5 * float((prior * theta.square()).sum())
        curvature = self.per_row * total["curvature"]
        if hessian:
            curvature = curvature + torch.diag(prior.repeat(k))
            if k > 1:  # adding the same to all η changes nothing: let the Hessian be 1 there, and no step goes that way
                same = prior.new_full((k, k), self.count / k)
                curvature = curvature + torch.kron(same, torch.eye(len(prior), dtype=prior.dtype, device=prior.device))
        else:
            curvature = curvature + prior
        gradient = self.per_row * total["gradient"] + prior * theta
        return Evaluation(loss, gradient, curvature, total["reach"], total["least"], total["most"])

    def product(self, rows: Rows, theta: Tensor, by: Tensor) -> Float[Tensor, "k c1"]:
        """Return Hessian · by; one pass."""
        total = torch.zeros_like(theta)
        for one in rows.map(_Derivatives(self, theta, by, "product")):
            total = total + one["curvature"]
        return self.per_row * total + self.prior * by

    def separating(self, rows: Rows) -> list[int]:
        """Return the columns x that by themselves set a group of y apart from the rest."""
        found = list(rows.map(_Ends(self)))
        groups = max(len(low) for low, _ in found)
        low, high = (
            torch.stack([torch.nn.functional.pad(one[i], (0, 0, 0, groups - len(one[i])), value=v) for one in found])
            for i, v in ((0, torch.inf), (1, -torch.inf))
        )
        low, high = low.amin(0), high.amax(0)
        alone: set[int] = set()
        for group in range(groups):
            rest = torch.arange(groups, device="cpu") != group
            below, above = low[rest].amin(0), high[rest].amax(0)
            apart = ((high[group] <= below) | (low[group] >= above)) & ((low[group] < above) | (high[group] > below))
            if self.family.response == "poisson":  # where something was counted the column must not vary
                apart &= low[1] == high[1]
            alone |= set(apart.nonzero().flatten().tolist())
        return sorted(alone)


@dataclass(frozen=True)
class _Derivatives:
    """Adds up loss, gradient and curvature over the blocks of a part."""

    design: Design
    theta: Float[Tensor, "k c1"]
    step: Float[Tensor, "k c1"] | None
    what: Literal["hessian", "diagonal", "product"]

    def __call__(self, blocks: Iterator[Block]) -> dict[str, Any]:
        theta, law, k = self.theta, self.design.family.law, len(self.theta)
        loss, gradient, reach, least, most = 0.0, torch.zeros_like(theta), 0.0, torch.inf, -torch.inf
        size = theta.numel()
        curvature = theta.new_zeros(size, size) if self.what == "hessian" else torch.zeros_like(theta)
        for block in blocks:
            x, y, w = (
                (check_context(self.design.family, block.context) - self.design.center) / self.design.scale,
                block.x[:, 0],
                block.w,
            )
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            eta = x @ theta.T
            mean = law.mean(eta)
            if self.step is not None and self.what == "product":
                curvature += law.turn(mean, x @ self.step.T * w[:, None]).T @ x
                continue
            loss -= float(w @ law.law(eta).log_prob(y))
            gradient += ((mean - law.code(y, k)) * w[:, None]).T @ x
            curvature += _hessian(law, mean, x, w) if self.what == "hessian" else _diagonal(law, mean, x, w)
            if self.step is not None:
                counted = w > 0
                change = x[counted] @ self.step.T
                gain = law.gain(change, y[counted])
                if len(gain):
                    reach = max(reach, float(change.abs().max()))
                    least, most = min(least, float(gain.min())), max(most, float(gain.max()))
        return {"loss": loss, "gradient": gradient, "curvature": curvature, "reach": reach, "least": least, "most": most}


@dataclass(frozen=True)
class _Ends:
    """Finds the least and the largest x of each group of y, (groups, c)."""

    design: Design

    def __call__(self, blocks: Iterator[Block]) -> tuple[Tensor, Tensor]:
        c = len(self.design.center)
        law, groups = self.design.family.law, max(2, self.design.columns)
        low, high = (torch.full((groups, c), end, dtype=torch.float64, device="cpu") for end in (torch.inf, -torch.inf))
        for block in blocks:
            x, side = check_context(self.design.family, block.context), law.side(block.x[:, 0])
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


def _diagonal(law: Response, mean: Tensor, x: Tensor, w: Tensor) -> Tensor:
    each = torch.stack([law.curve(mean, a, a) for a in range(mean.shape[1])])
    return (each * w) @ x.square()
