"""Natural gradient on fixed nodes: reverse KL to a Gaussian, deterministic, without a step size to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import entropy, gaussian, loc_and_tril
from whichkl.objectives import Objective, ReverseKL
from whichkl.solvers.nodes import first_count, gaussian_rule
from whichkl.solvers.sample_average import minimize_on_nodes
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.starts import find_starts
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_CLOSE = 3.0
"""Optima within so many nats of the best must settle under doubled nodes too."""
_KEPT = 12
"""At most so many optima are followed to more nodes."""
_UNBOUNDED = 1e12
_STALLED = 0.03
"""Where a step can't improve any more: in a log density with kinks, nodes that cross one keep the gradient from vanishing."""


@dataclass(frozen=True)
class NaturalGradient(Solver):
    """argmin KL(q‖p) over Gaussians, from several starts at once, each step one batched call of the target.

    With x = m + L z and h = Lᵀ∇log p(x), let b = E[h] and A = −E[h zᵀ] (its lower triangle, mirrored) over fixed
    antithetic nodes: (b, I − A) is the exact gradient of the ELBO on these nodes. In the coordinates whitened by q,
    the natural-gradient step of length ρ sets the precision to (1 − ρ) I + ρ A and moves the mean by
    ρ · precision⁻¹ b. At ρ = 1 it's Newton's step, exact at once on a Gaussian target. A step that doesn't raise the
    ELBO on the same nodes is halved. What hasn't converged after `max_iterations` is finished by L-BFGS on the same
    nodes. It stops on the residual √(‖b‖² + ½‖A − I‖²), never on a plateau. Nodes are doubled until the means of the
    best optimum move by less than `node_tolerance` standard deviations.

    Source: Amari (1998); Opper & Archambeau (2009) for the two expectations; Giordano, Ingram & Broderick (2024) for
    fixed draws.
    """

    name: ClassVar[str] = "natural_gradient"
    objective: ClassVar[type[Objective]] = ReverseKL
    families: ClassVar[tuple[type[Family], ...]] = (Gaussian,)

    tolerance: float = 1e-7
    max_iterations: int = 50
    node_tolerance: float = 0.02
    max_nodes: int = 4096

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Reverse KL to a Gaussian of full or diagonal covariance, where log p can be evaluated."""
        is_able = isinstance(family, Gaussian) and family.covariance != "low_rank"
        return is_able and super().solves(objective, family, access) and Access.LOG_PROB in access

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run all starts on the first nodes, then the distinct optima again on twice as many until they stay."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        loc, tril = (part.to(target.device) for part in find_starts(target, seed))
        count, iterations, error, done_doubling = first_count(target.dim), 0, math.inf, False
        before = loc[:, 0]
        while True:
            z, w = (part.to(target.device) for part in gaussian_rule(target.dim, count, seed))
            state, done = self._climb(_State.at(loc, tril, z, w, family, target), target, family)
            iterations += done
            if not bool(state.elbo.isfinite().any()):
                because = (
                    "`log_prob` is -inf inside the support of every start, so that reverse KL is infinite there, or it doesn't "
                    "fall off and can't be normalised"
                )
                raise TargetError(
                    cannot("minimise `reverse_kl` here", because, "Pass `support=`, check its signs, or use `forward_kl`")
                )
            best = int(state.elbo.argmax())
            if math.isfinite(error):
                shift = ((state.loc - loc).abs() / torch.linalg.vector_norm(state.tril, dim=-1)).amax(-1)
                shift = torch.maximum(shift, (state.elbo - before).abs())
                error, settled = float(shift[best]), shift <= self.node_tolerance
                done_doubling = bool(settled[state.elbo >= state.elbo[best] - _CLOSE].all())
            if target.dim == 1 or done_doubling or 2 * count > self.max_nodes:
                break
            optima, count, error = self._optima(state, family)[:_KEPT], 2 * count, 1e300
            before = torch.tensor([-one.loss for one in optima], dtype=state.elbo.dtype, device=target.device)
            loc = torch.stack([family.parameters(one.model)["loc"] for one in optima])
            tril = torch.stack([family.parameters(one.model)["scale_tril"] for one in optima])
        spread = torch.linalg.vector_norm(state.tril[best], dim=-1)
        if float(spread.max()) > _UNBOUNDED or float(state.elbo[best]) > _UNBOUNDED:
            because = f"the model spreads without bound along x{int(spread.argmax()) + 1}: the density doesn't fall off there"
            raise TargetError(cannot("fit this target", because, "Check the signs of `log_prob`, or pass `support=`"))
        node_error = None if target.dim == 1 else error
        return Solution(self._optima(state, family), iterations, float(state.residual[best]), node_error, len(z))

    def _climb(self, state: _State, target: Target, family: Gaussian) -> tuple[_State, int]:
        """Iterate all starts together; finish those that are slow by L-BFGS."""
        rho = torch.ones_like(state.elbo)
        iterations = 0
        while iterations < self.max_iterations:
            active = (state.residual > self.tolerance) & (rho > 1e-6)
            if not bool(active.any()):
                break
            trial = state.take(active).step(rho[active], family, target)
            better = trial.improves_on(state.take(active))
            state = state.put(active, better, trial)
            rho[active] = torch.where(better, (2 * rho[active]).clamp(max=1.0), rho[active] / 2)
            iterations += 1
        for i in ((state.residual > self.tolerance) & state.elbo.isfinite()).nonzero().flatten().tolist():
            start = gaussian(state.loc[i], state.tril[i], family.covariance)
            end = minimize_on_nodes(target, family, start, state.z, state.w, self.tolerance / 10)
            loc, tril = (part[None] for part in loc_and_tril(end.model))
            finished = _State.at(loc, tril, state.z, state.w, family, target)
            state = state.put(torch.arange(len(state.elbo)) == i, finished.elbo >= state.elbo[i], finished)
            iterations += end.iterations
        return state, iterations

    def _optima(self, state: _State, family: Gaussian) -> tuple[Optimum, ...]:
        found = [
            Optimum(gaussian(loc, tril, family.covariance), -float(elbo), bool(r <= _STALLED), False)
            for loc, tril, elbo, r in zip(state.loc, state.tril, state.elbo, state.residual, strict=True)
            if math.isfinite(float(elbo))
        ]
        settled = [one for one in found if one.converged]
        return distinct(settled or found)


@dataclass(frozen=True)
class _State:
    """B Gaussians with their ELBO, whitened gradient b and curvature A on shared nodes."""

    loc: Float[Tensor, "b d"]
    tril: Float[Tensor, "b d d"]
    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]
    elbo: Float[Tensor, " b"]
    b: Float[Tensor, "b d"]
    a: Float[Tensor, "b d d"]
    residual: Float[Tensor, " b"]

    @classmethod
    def at(cls, loc: Tensor, tril: Tensor, z: Tensor, w: Tensor, family: Gaussian, target: Target) -> _State:
        """Evaluate the target at B × m points in one call."""
        if family.covariance == "diagonal":
            tril = torch.diag_embed(torch.linalg.vector_norm(tril, dim=-1) if _is_full(tril) else tril.diagonal(dim1=-2, dim2=-1))
        count, dim = loc.shape
        x = loc[:, None] + z @ tril.transpose(-1, -2)
        value, score = target.trial(x.reshape(-1, dim))
        value, score = value.reshape(count, -1), score.reshape(count, -1, dim)
        elbo = value @ w + entropy(tril)
        h = score @ tril
        b = torch.einsum("m,bmi->bi", w, h)
        a = -torch.einsum("m,bmi,mj->bij", w, h, z)
        a = a.tril() + a.tril(-1).transpose(-1, -2)
        curvature = torch.diag_embed(a.diagonal(dim1=-2, dim2=-1)) if family.covariance == "diagonal" else a
        off = curvature - torch.eye(dim, dtype=a.dtype, device=a.device)
        residual = (b.square().sum(-1) + off.square().sum((-1, -2)) / 2).sqrt()
        broken = ~(elbo.isfinite() & residual.isfinite())
        elbo, residual = elbo.masked_fill(broken, -math.inf), residual.masked_fill(broken, math.inf)
        return cls(loc, tril, z, w, elbo, b.nan_to_num(), a.nan_to_num(0.0, 0.0, 0.0), residual)

    def step(self, rho: Float[Tensor, " b"], family: Gaussian, target: Target) -> _State:
        """Move every Gaussian by its ρ and evaluate there; a full step is damped only where A isn't positive."""
        eigenvalue, vector = torch.linalg.eigh(self.a)
        tame = (rho < 1) | (eigenvalue[:, 0] <= 1e-8)
        length = rho[:, None]
        precision = 1 - length + length * torch.where(tame[:, None], eigenvalue.clamp(0.25, 16.0), eigenvalue)
        pull = torch.einsum("bji,bj->bi", vector, self.b) / precision
        move = length * torch.einsum("bij,bj->bi", vector, pull)
        limit = 2 * length * math.sqrt(self.loc.shape[1])
        norm = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
        move = torch.where(tame[:, None], move * (limit / norm).clamp(max=1.0), move)
        if family.covariance == "diagonal":
            diagonal = self.a.diagonal(dim1=-2, dim2=-1)
            tame_scale = tame | (diagonal <= 1e-8).any(-1)
            own = 1 - length + length * torch.where(tame_scale[:, None], diagonal.clamp(0.25, 16.0), diagonal)
            factor = torch.diag_embed(own.rsqrt())
        else:
            factor = torch.linalg.cholesky((vector / precision[:, None]) @ vector.transpose(-1, -2))
        loc = self.loc + torch.einsum("bij,bj->bi", self.tril, move)
        return _State.at(loc, self.tril @ factor, self.z, self.w, family, target)

    def improves_on(self, before: _State) -> Bool[Tensor, " b"]:
        """A higher ELBO on the same nodes; near the end, where rounding blurs it, a smaller residual."""
        near = (before.residual < 1e-3) & (self.residual <= 0.9 * before.residual)
        return self.elbo.isfinite() & ((self.elbo > before.elbo) | near | ~before.elbo.isfinite())

    def take(self, which: Bool[Tensor, " b"]) -> _State:
        """Select some of the Gaussians."""
        return replace(self, **{name: getattr(self, name)[which] for name in _MOVING})

    def put(self, active: Bool[Tensor, " b"], better: Bool[Tensor, " a"], trial: _State) -> _State:
        """Replace those active ones that got better."""
        index = active.nonzero()[:, 0][better]
        return replace(self, **{name: getattr(self, name).index_copy(0, index, getattr(trial, name)[better]) for name in _MOVING})


_MOVING = ("loc", "tril", "elbo", "b", "a", "residual")


def _is_full(tril: Tensor) -> bool:
    return bool((tril.tril(-1) != 0).any())
