"""Gaussians: several at once on shared nodes, with what reverse KL's natural gradient needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.families.gaussian import entropy
from whichkl.solvers.ascent import Memory, ascend
from whichkl.targets import Target

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

    @classmethod
    def at(cls, target: Target, z: Tensor, w: Tensor, loc: Tensor, tril: Tensor) -> Gaussians:
        """Evaluate the target at B × m points in one call."""
        value, score = evaluate(target, loc[:, None] + z @ tril.transpose(-1, -2))
        elbo = value @ w + entropy(tril)
        h = score @ tril
        b = torch.einsum("m,bmi->bi", w, h)
        return cls._made(target, z, w, loc, tril, elbo, b, -(h.transpose(-1, -2) @ (w[:, None] * z)))

    @classmethod
    def _made(
        cls, target: Target, z: Tensor, w: Tensor, loc: Tensor, tril: Tensor, elbo: Tensor, b: Tensor, a: Tensor
    ) -> Gaussians:
        """Mirror the lower triangle of A, and measure the residual; where something isn't finite, it is ∞ and the ELBO −∞."""
        a = a.tril() + a.tril(-1).transpose(-1, -2)
        off = a - torch.eye(loc.shape[1], dtype=a.dtype, device=a.device)
        residual = (b.square().sum(-1) + off.square().sum((-1, -2)) / 2).sqrt()
        broken = ~(elbo.isfinite() & residual.isfinite())
        elbo, residual = elbo.masked_fill(broken, -math.inf), residual.masked_fill(broken, math.inf)
        return cls(target, z, w, loc, tril, elbo, b.nan_to_num(), a.nan_to_num(0.0, 0.0, 0.0), residual)

    def moved(self, loc: Float[Tensor, "b d"], tril: Float[Tensor, "b d d"]) -> Gaussians:
        """Evaluate others on the same nodes."""
        return Gaussians.at(self.target, self.z, self.w, loc, tril)

    def step(self, rho: Float[Tensor, " b"]) -> Gaussians:
        """Take every natural-gradient step of length ρ; a full one is damped only where A isn't positive.

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

    def ascended(self, path: Path, max_calls: int, tolerance: float = 1e-15) -> tuple[Gaussians, Path]:
        """Climb the ELBO on these nodes by L-BFGS in the coordinates of a path, where its Hessian is near the identity.

        With L = L₀ T, b = Tᵀ b₀ and A = −Tᵀ E[h₀ zᵀ], of which the lower triangle needs only that of E[h₀ zᵀ]: so the gradient by
        θ is known at the start, and b, A and the residual at the end, without a call.
        """
        dim = self.loc.shape[1]
        row, column = torch.tril_indices(dim, dim, -1, device=self.loc.device)
        volume = entropy(path.tril)

        def trial(theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            shift, grow, factor = _read(theta, dim)
            tril = path.tril[rows]
            value, score = evaluate(
                self.target, path.loc[rows, None] + (shift[:, None] + self.z @ factor.transpose(-1, -2)) @ tril.transpose(-1, -2)
            )
            h = score @ tril
            slope = h.transpose(-1, -2) @ (self.w[:, None] * self.z)
            elbo = value @ self.w + volume[rows] + grow.log().sum(-1)
            return elbo, gradient(torch.einsum("m,bmi->bi", self.w, h), slope, grow)

        def gradient(pull: Tensor, slope: Tensor, grow: Tensor) -> Tensor:
            stretch = (slope.diagonal(dim1=-2, dim2=-1) * grow + 1) / math.sqrt(2)
            return torch.cat([pull, stretch, slope[:, row, column]], -1).nan_to_num(0.0, 0.0, 0.0)

        _, grow, factor = _read(path.theta, dim)
        pull = torch.linalg.solve_triangular(factor.mT, self.b[..., None], upper=True)[..., 0]
        slope = torch.linalg.solve_triangular(factor.mT, -self.a.tril(), upper=True)
        first = (self.elbo, gradient(pull, slope, grow))
        peaks = ascend(trial, path.theta, tolerance=tolerance, max_calls=max_calls, memory=path.memory, first=first)
        shift, grow, factor = _read(peaks.x, dim)
        slope = torch.diag_embed((math.sqrt(2) * peaks.score[:, dim : 2 * dim] - 1) / grow)
        slope[:, row, column] = peaks.score[:, 2 * dim :]
        b = torch.einsum("bji,bj->bi", factor, peaks.score[:, :dim])
        loc = path.loc + torch.einsum("bij,bj->bi", path.tril, shift)
        a = -factor.transpose(-1, -2) @ slope
        new = Gaussians._made(self.target, self.z, self.w, loc, path.tril @ factor, peaks.value, b, a)
        return new, replace(path, theta=peaks.x)

    def improves_on(self, before: Gaussians) -> Bool[Tensor, " b"]:
        """A higher ELBO on the same nodes; near the end, where rounding blurs it, a smaller residual."""
        near = (before.residual < 1e-3) & (self.residual <= 0.9 * before.residual)
        return self.elbo.isfinite() & ((self.elbo > before.elbo) | near | ~before.elbo.isfinite())

    def take(self, which: Bool[Tensor, " b"]) -> Gaussians:
        """Select some of the Gaussians."""
        return replace(self, **{name: getattr(self, name)[which] for name in _MOVING})

    def put(self, active: Bool[Tensor, " b"], better: Bool[Tensor, " a"], trial: Gaussians) -> Gaussians:
        """Replace those active ones that got better."""
        index = active.nonzero()[:, 0][better]
        return replace(self, **{name: getattr(self, name).index_copy(0, index, getattr(trial, name)[better]) for name in _MOVING})


@dataclass(frozen=True)
class Path:
    """Coordinates θ = (a, √2 t, T's strict lower triangle) of m = m₀ + L₀ a and L = L₀ T, and what an ascent in them has learnt.

    T is lower triangular with diagonal exp(t); each coordinate has curvature 1 on a Gaussian target, at its optimum (m₀, L₀).
    """

    loc: Float[Tensor, "b d"]
    tril: Float[Tensor, "b d d"]
    theta: Float[Tensor, "b p"]
    memory: Memory

    @classmethod
    def begin(cls, state: Gaussians) -> Path:
        """Start where the Gaussians are."""
        dim = state.loc.shape[1]
        theta = state.loc.new_zeros(len(state.loc), dim * (dim + 3) // 2)
        return cls(state.loc, state.tril, theta, Memory.empty(theta))

    def take(self, rows: Tensor) -> Path:
        """Select some of them."""
        return Path(self.loc[rows], self.tril[rows], self.theta[rows], self.memory.of(rows))

    def put(self, rows: Tensor, other: Path) -> Path:
        """Replace where some of them are, and what they have learnt."""
        self.memory.put(rows, other.memory)
        return replace(self, theta=self.theta.index_copy(0, rows.nonzero()[:, 0], other.theta))


def _read(theta: Float[Tensor, "b p"], dim: int) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"], Float[Tensor, "b d d"]]:
    """Return a, exp(t) and T."""
    row, column = torch.tril_indices(dim, dim, -1, device=theta.device)
    grow = (theta[:, dim : 2 * dim] / math.sqrt(2)).exp()
    factor = torch.diag_embed(grow)
    factor[:, row, column] = theta[:, 2 * dim :]
    return theta[:, :dim], grow, factor


def evaluate(target: Target, x: Float[Tensor, "b m d"]) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m d"]]:
    """Return log p and ∇log p at a batch of node sets, in one call."""
    value, score = target.trial(x.reshape(-1, x.shape[-1]))
    return value.reshape(x.shape[:2]), score.reshape(x.shape)
