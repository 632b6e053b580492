"""Gaussians: several at once on shared nodes, with the expectations in reverse KL's natural gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.families.gaussian import entropy
from whichkl.solvers.nodes.batched_lbfgs import Memory, ascend
from whichkl.solvers.nodes.ensemble import Nodes, evaluate
from whichkl.targets import Target

_STEPS_IN_MEMORY, _MAX_DIM_OF_MEMORY = 20, 200
"""Number of steps that L-BFGS remembers, and the largest dimension in which it does; above, it remembers ten."""
_MOVING = ("loc", "tril", "elbo", "b", "a", "residual")


@dataclass(frozen=True)
class Gaussians:
    """B Gaussians with their ELBO, whitened gradient b and curvature A on shared nodes.

    With x = m + L z and h = Lᵀ∇log p(x): b = E[h] and A = −E[h zᵀ] (its lower triangle, mirrored) over the nodes, so that
    (b, I − A) is the exact gradient of the ELBO on these nodes. The residual is √(‖b‖² + ½‖A − I‖²).
    """

    target: Target
    z: Float[Tensor, "m d"]
    w: Float[Tensor, " m"]
    loc: Float[Tensor, "b d"]
    tril: Float[Tensor, "b d d"]
    elbo: Float[Tensor, " b"]
    b: Float[Tensor, "b d"]
    a: Float[Tensor, "b d d"]
    residual: Float[Tensor, " b"]
    memory: Memory | None
    """The steps of L-BFGS at each Gaussian, on these nodes or on fewer, in the coordinates that were whitened then."""

    @classmethod
    def at(cls, target: Target, nodes: Nodes, loc: Tensor, tril: Tensor, memory: Memory | None = None) -> Gaussians:
        """Evaluate the target at B × m points in one call."""
        z, w = nodes.z, nodes.w
        value, score = evaluate(target, loc[:, None] + z @ tril.transpose(-1, -2))
        elbo = value @ w + entropy(tril)
        b, slope = cls._moments(score, tril, torch.cat([w[:, None], w[:, None] * z], 1))
        return cls._made(target, z, w, loc, tril, elbo, b, -slope, memory)

    @staticmethod
    def _moments(
        score: Float[Tensor, "b m d"], tril: Float[Tensor, "b d d"], weighted: Float[Tensor, "m 1+d"]
    ) -> tuple[Tensor, Tensor]:
        """Return E[h] and E[h zᵀ] for h = Lᵀ∇log p, with the nodes' (w, w z); L multiplies last, when the sums are small."""
        moments = tril.transpose(-1, -2) @ (score.transpose(-1, -2) @ weighted)
        return moments[..., 0], moments[..., 1:]

    @classmethod
    def _made(
        cls,
        target: Target,
        z: Tensor,
        w: Tensor,
        loc: Tensor,
        tril: Tensor,
        elbo: Tensor,
        b: Tensor,
        a: Tensor,
        memory: Memory | None,
    ) -> Gaussians:
        """Mirror the lower triangle of A, and measure the residual; it is ∞ and the ELBO −∞ where something isn't finite."""
        a = a.tril() + a.tril(-1).transpose(-1, -2)
        off = a - torch.eye(loc.shape[1], dtype=a.dtype, device=a.device)
        residual = (b.square().sum(-1) + off.square().sum((-1, -2)) / 2).sqrt()
        broken = ~(elbo.isfinite() & residual.isfinite())
        elbo, residual = elbo.masked_fill(broken, -math.inf), residual.masked_fill(broken, math.inf)
        return cls(target, z, w, loc, tril, elbo, b.nan_to_num(), a.nan_to_num(0.0, 0.0, 0.0), residual, memory)

    def moved(self, loc: Float[Tensor, "b d"], tril: Float[Tensor, "b d d"]) -> Gaussians:
        """Evaluate other Gaussians on the same nodes."""
        return Gaussians.at(self.target, Nodes(self.z, self.w), loc, tril)

    def step(self, rho: Float[Tensor, " b"]) -> Gaussians:
        """Take natural-gradient steps of length ρ; a full step is damped only where A isn't positive.

        In the coordinates whitened by q the precision becomes (1 − ρ) I + ρ A and the mean moves by ρ · precision⁻¹ b:
        at ρ = 1 Newton's step, exact at once on a Gaussian target.
        """
        eigenvalue, vector = torch.linalg.eigh(self.a)
        tame = (rho < 1) | (eigenvalue[:, 0] <= 1e-8)
        length = rho[:, None]
        precision = 1 - length + length * torch.where(tame[:, None], eigenvalue.clamp(0.25, 16.0), eigenvalue)
        pull = torch.einsum("bji,bj->bi", vector, self.b) / precision
        move = length * torch.einsum("bij,bj->bi", vector, pull)
        limit = 2 * length * math.sqrt(self.loc.shape[1])
        norm = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
        move = torch.where(tame[:, None], move * (limit / norm).clamp(max=1.0), move)
        factor = torch.linalg.cholesky((vector / precision[:, None]) @ vector.transpose(-1, -2))
        return self.moved(self.loc + torch.einsum("bij,bj->bi", self.tril, move), self.tril @ factor)

    def ascended(self, max_calls: int, tolerance: float = 1e-15) -> Gaussians:
        """Climb the ELBO on these nodes by L-BFGS over (a, T), m ← m + L a, L ← L T, where its Hessian is near the identity.

        T is lower triangular with diagonal exp(t). The free numbers are a, √2 t and T's strict lower triangle, each of curvature
        1 on a Gaussian target. Their gradient is known at the start without a call, as are b, A and the residual at the end:
        with S = E[h zᵀ] in the coordinates of the start, b = Tᵀ E[h] and A = −Tᵀ S, whose lower triangle needs only that of S.
        """
        dim = self.loc.shape[1]
        row, column = torch.tril_indices(dim, dim, -1, device=self.loc.device)
        volume, weighted = entropy(self.tril), torch.cat([self.w[:, None], self.w[:, None] * self.z], 1)

        def read(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grow = (theta[:, dim : 2 * dim] / math.sqrt(2)).exp()
            factor = torch.diag_embed(grow)
            factor[:, row, column] = theta[:, 2 * dim :]
            return theta[:, :dim], grow, factor

        def gradient(pull: Tensor, slope: Tensor, grow: Tensor) -> Tensor:
            stretch = (slope.diagonal(dim1=-2, dim2=-1) * grow + 1) / math.sqrt(2)
            return torch.cat([pull, stretch, slope[:, row, column]], -1).nan_to_num(0.0, 0.0, 0.0)

        def trial(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            shift, grow, factor = read(theta)
            tril = self.tril[rows]
            loc = self.loc[rows] + torch.einsum("bij,bj->bi", tril, shift)
            value, score = evaluate(self.target, loc[:, None] + self.z @ (tril @ factor).transpose(-1, -2))
            elbo = value @ self.w + volume[rows] + grow.log().sum(-1)
            return elbo, gradient(*self._moments(score, tril, weighted), grow)

        start = self.loc.new_zeros(len(self.loc), 2 * dim + len(row))
        first = (self.elbo, gradient(self.b, -self.a, torch.ones_like(self.b)))
        memory = self.memory or Memory.empty(start, _STEPS_IN_MEMORY if dim <= _MAX_DIM_OF_MEMORY else None)
        peaks = ascend(trial, start, tolerance=tolerance, max_calls=max_calls, first=first, memory=memory)
        if not isinstance(peaks.curvature, Memory):
            raise TypeError(peaks.curvature)
        shift, grow, factor = read(peaks.x)
        slope = torch.diag_embed((math.sqrt(2) * peaks.score[:, dim : 2 * dim] - 1) / grow)
        slope[:, row, column] = peaks.score[:, 2 * dim :]
        b, a = torch.einsum("bji,bj->bi", factor, peaks.score[:, :dim]), -factor.transpose(-1, -2) @ slope
        loc = self.loc + torch.einsum("bij,bj->bi", self.tril, shift)
        return Gaussians._made(self.target, self.z, self.w, loc, self.tril @ factor, peaks.value, b, a, peaks.curvature)

    def improves_on(self, before: Gaussians) -> Bool[Tensor, " b"]:
        """Return whether the ELBO on the same nodes is higher; near the end, where rounding hides it, the residual decides."""
        near = (before.residual < 1e-3) & (self.residual <= 0.9 * before.residual)
        return self.elbo.isfinite() & ((self.elbo > before.elbo) | near | ~before.elbo.isfinite())

    def take(self, which: Bool[Tensor, " b"]) -> Gaussians:
        """Select some of the Gaussians."""
        index = which.nonzero()[:, 0]
        memory = self.memory and self.memory.take(index)
        return replace(self, memory=memory, **{name: getattr(self, name)[index] for name in _MOVING})

    def put(self, active: Bool[Tensor, " b"], better: Bool[Tensor, " a"], trial: Gaussians) -> Gaussians:
        """Replace the active Gaussians that improved; those that improved without L-BFGS lose its steps."""
        index, chosen = active.nonzero()[:, 0][better], better.nonzero()[:, 0]
        moving = {name: getattr(self, name).index_copy(0, index, getattr(trial, name)[chosen]) for name in _MOVING}
        memory = self.memory
        if trial.memory is not None:
            memory = (memory or trial.memory.blank(len(active))).put(index, trial.memory.take(chosen))
        elif memory is not None:
            memory = memory.put(index, memory.blank(len(index)))
        return replace(self, memory=memory, **moving)
