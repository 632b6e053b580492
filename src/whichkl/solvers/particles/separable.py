"""Separable: where log p is a sum over blocks of columns, each block is a target of its own, and is solved alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.divergences import Estimate
from whichkl.families import BlockMixture, Mixture
from whichkl.families.block_mixture import IndependentBlocks
from whichkl.particles import temper
from whichkl.solvers.particles.value import summed
from whichkl.solvers.solver import Optimum, Solution, Solver
from whichkl.solvers.work import Work
from whichkl.targets import Target

_SCOUTS = 256
_POINTS = 8
"""Number of points at which links are sought."""
_SEEDS_APART = 100_003
"""Distance of the seeds of two blocks, so that they share no draws with each other or with fits of neighbouring seeds."""
_STEP = 0.5
"""Length of a step in one column, in standard deviations."""
_MIN_CHANGE = 1e-3
"""Least change of a column's score, relative to its largest, that links it to the column of the step."""


def linked_columns(target: Target, x: Float[Tensor, "n d"]) -> Bool[Tensor, "d d"]:
    """Return which columns of p aren't independent given the others, at some points, with d + 1 gradients at each.

    log p is a sum over blocks of columns if, and only if, no column's score changes with a column of another block.

    Args:
        target: p in unconstrained coordinates, with a log density.
        x: points near p; their spread is the unit of the steps.
    """
    dim, sd = x.shape[1], x.std(0).clamp(min=1e-300)
    at = x[torch.linspace(0, len(x) - 1, min(_POINTS, len(x)), dtype=torch.float64, device="cpu").long()]
    moved = at[:, None] + _STEP * torch.diag(sd)
    value, score = target.trial(torch.cat([at, moved.reshape(-1, dim)]).to(target.device))
    value, score = value.to("cpu", torch.float64), score.to("cpu", torch.float64) * sd
    here, there = score[: len(at)], score[len(at) :].reshape(len(at), dim, dim)
    is_known = value.isfinite()[len(at) :].reshape(len(at), dim, 1)
    change = torch.where(is_known, (there - here[:, None]).abs(), 0.0).amax(0)
    return change > _MIN_CHANGE * score.abs().amax(0)


def separated(target: Target, family: BlockMixture, seed: int) -> tuple[BlockMixture, Tensor | None]:
    """Return a family with its blocks, and a point of p if log p is a sum over them, else None."""
    found = temper(target, particles=_SCOUTS, keep=0.3, leapfrogs=3, seed=seed)
    is_linked = linked_columns(target, found.x)
    chosen = family.with_blocks(is_linked) if family.blocks == "auto" else family
    for block in chosen.columns(target.dim):
        others = torch.ones(target.dim, dtype=torch.bool, device="cpu")
        others[block] = False
        if bool(is_linked[block][:, others].any() or is_linked[others][:, block].any()):
            return chosen, None
    return chosen, found.x[int(found.log_p.argmax())]


def solve_blocks(solver: Solver, target: Target, family: BlockMixture, point: Tensor, seed: int, work: Work) -> Solution:
    """Solve each block alone, with the other columns at one point of p, and join the models."""
    columns = family.columns(target.dim)
    height = float(target.tried(point[None].to(target.device, target.dtype)))
    budget = (target.evaluations.most - target.evaluations.total) / len(columns)
    models, values, log_zs, parts = [], list[Estimate](), list[Estimate](), []
    for b, block in enumerate(columns):
        work.tell(f"block {b + 1} of {len(columns)}", b / len(columns))
        part = _conditional(target, point, block)
        part.evaluations.most = budget
        found = solver.solve(part, Mixture(family.components, family.covariance), seed + _SEEDS_APART * b, work.quiet())
        models.append(found.best.model)
        parts.append(found)
        if found.value is not None and found.log_z is not None:
            values.append(found.value)
            log_zs.append(found.log_z)
    best = Optimum(
        IndependentBlocks(models, columns),
        sum(one.best.loss for one in parts),
        all(one.best.converged for one in parts),
        is_global=True,
    )
    return Solution(
        (best,),
        iterations=sum(one.iterations for one in parts),
        residual=max(one.residual for one in parts),
        notes=(f"log p is a sum over {len(columns)} blocks of columns, and each was fitted alone",),
        doubts=tuple(dict.fromkeys(doubt for one in parts for doubt in one.doubts)),
        value=summed(values),
        log_z=replace(summed(log_zs, -(len(columns) - 1) * height), method="bridge sampling in each block"),
        family=family,
    )


def _conditional(target: Target, point: Float[Tensor, " d"], columns: Sequence[int]) -> Target:
    """Return p of some columns, where the others are those of a point."""
    where = list(columns)

    def log_prob(x: Tensor) -> tuple[Tensor, Tensor]:
        whole = point.to(x).repeat(len(x), 1)
        whole[:, where] = x
        value, score = target.trial(whole)
        return value, score[:, where]

    return Target(log_prob=log_prob, score=True, dim=len(where), device=target.device, dtype=target.dtype)
