"""Natural gradient on fixed nodes: reverse KL to a Gaussian, deterministic, without a step size to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from whichkl.families import Family, Gaussian
from whichkl.families.gaussian import entropy, gaussian
from whichkl.solvers.ascents import Memory, ascend
from whichkl.solvers.nodes.doubling import Verdict, double_nodes, near_best, refuse_infinite, refuse_unbounded
from whichkl.solvers.nodes.gaussian_rule import first_count, least_count
from whichkl.solvers.nodes.points import Nodes, evaluate
from whichkl.solvers.nodes.starts import find_starts
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_OPTIMA = 12
"""Largest number of optima that are carried to more nodes."""
_NEAR = 0.5
"""Residual below which L-BFGS takes over from natural-gradient steps."""
_MAX_CALLS_PER_ROUND = 40
"""Largest number of calls of L-BFGS before the coordinates are whitened again."""
_ROUGH = 3e-3
"""Residual that suffices to judge the nodes: it costs 5·10⁻⁶ nats."""
_STALLED = 0.03
"""Residual at which a step may no longer improve a model: nodes that cross a kink of log p keep the gradient from vanishing."""
_MAX_FACTOR = 8
"""Largest factor by which the nodes grow at once."""
_STEPS_IN_MEMORY, _MAX_DIM_OF_MEMORY = 20, 200
"""Number of steps that L-BFGS remembers, and the largest dimension in which it does; above, it remembers ten."""
_MOVING = ("loc", "tril", "elbo", "b", "a", "residual")


@dataclass(frozen=True)
class NaturalGradient(Solver):
    """argmin KL(q‖p) over Gaussians, from several starts at once, each step one batched call of the target.

    On fixed antithetic nodes the ELBO is a smooth function of mean and scale, with the exact gradient (b, I − A) of
    `Gaussians`. Far from the maximum each start takes natural-gradient steps, which are halved if the ELBO on the same nodes
    doesn't rise. Near the maximum L-BFGS climbs in the coordinates that these steps have whitened, in which the curvature is
    near 1 in every direction. A climb ends by its residual √(‖b‖² + ½‖A − I‖²), never on a plateau.

    All starts climb on few nodes first, and their distinct optima on more: nodes are doubled, each time with new ones, until
    the means of every good optimum move by less than `node_tolerance` standard deviations and its nodes cost less than
    `node_loss` nats. L-BFGS keeps what it has learnt. If the optimum of m nodes gains G by climbing on n others, then the cost
    of the n nodes is G / (1 + n/m), since costs fall as 1/n. If many more nodes are needed, some doublings are skipped.

    Source: Amari (1998); Opper & Archambeau (2009) for the two expectations; Giordano, Ingram & Broderick (2024) for
    fixed draws.
    """

    name = "natural_gradient"
    direction = "reverse"
    families = (Gaussian,)
    mode_families = families
    covariances = ("full",)

    tolerance: float = 1e-6
    max_iterations: int = 30
    rounds: int = 6
    node_tolerance: float = 0.02
    node_loss: float = 0.004
    max_nodes: int = 16_384

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of seven arrays of nodes: points and scores of two starts and what they are made of."""
        nodes = least_count(dim)
        return 56 * dim * max(nodes, min(2 * nodes, self.max_nodes))

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run all starts on few nodes, then the distinct optima on more until they stay, and these to the end."""
        if not isinstance(family, Gaussian):
            raise TypeError(family)
        loc, tril = (part.to(target.device) for part in find_starts(target, seed))
        count, trail = least_count(target.dim), list[float]()

        def climbed(begun: Gaussians, tolerance: float = _ROUGH) -> Gaussians:
            ended = self._climb(begun, tolerance, trail)
            if not bool(ended.elbo.isfinite().any()):  # on fewer nodes the models may have spread too far for these
                unknown, spread = begun.elbo.new_zeros(1), torch.linalg.vector_norm(begun.tril, dim=-1)
                refuse_unbounded(unknown, spread[None], unknown, target.names)
            refuse_infinite(ended.elbo)
            return ended

        def refit(before: Gaussians, count: int) -> tuple[Gaussians, Verdict] | None:
            nonlocal loc
            rows = torch.tensor(self._optima(before, family)[1][:_MAX_OPTIMA], device=loc.device, dtype=torch.int64)
            if not target.evaluations.affords(len(rows) * count):
                return None
            loc, memory = before.loc[rows], before.memory and before.memory.take(rows)
            begun = Gaussians.at(target, Nodes.of(target, count, seed), loc, before.tril[rows], memory)
            ended = climbed(begun)
            _check(ended)
            shift, lost = _shift(ended, loc), (ended.elbo - begun.elbo) / (1 + count / len(before.nodes.z))
            # Optima far worse than the best one needn't stay: more nodes for them would be wasted.
            good = near_best(-ended.elbo)
            is_settled = bool(((shift <= self.node_tolerance) & (lost <= self.node_loss))[good].all())
            # Costs fall as 1/n and shifts as 1/√n: this is by how much the nodes have to grow.
            times = float(torch.maximum(lost / self.node_loss, (shift / self.node_tolerance).square())[good].max())
            factor = min(_MAX_FACTOR, 1 << max(1, math.floor(math.log2(max(times, 2)))))
            return ended, Verdict(float(shift[int(ended.elbo.argmax())]), is_settled, factor)

        state = climbed(Gaussians.at(target, Nodes.of(target, count, seed), loc, tril))
        _check(state)
        state, error = double_nodes(state, count, self.max_nodes, target.dim == 1, refit, first_count(target.dim))
        state = climbed(state, self.tolerance)
        best = int(state.elbo.argmax())
        _check(state, is_last=True)
        node_error = None if target.dim == 1 else math.inf if error is None else float(_shift(state, loc)[best])
        found, _ = self._optima(state, family)
        return Solution(found, len(trail), float(state.residual[best]), node_error, len(state.nodes.z), history=tuple(trail))

    def _climb(self, state: Gaussians, tolerance: float, trail: list[float]) -> Gaussians:
        """Take natural-gradient steps far from the optimum, and rounds of L-BFGS near it; `trail` gets each iteration's loss."""
        rho, held = torch.ones_like(state.elbo), torch.zeros_like(state.elbo)
        counts, nodes = state.target.evaluations, len(state.nodes.z)
        for iteration in range(self.max_iterations):
            is_known = torch.zeros_like(held, dtype=torch.bool) if state.memory is None else state.memory.held[:, -1]
            # A memory from fewer nodes is ready to use: L-BFGS can take over at once where the residual is small.
            enough = torch.where(is_known | (iteration > 0), rho.new_tensor(_NEAR), tolerance)
            active = (state.residual > enough) & (rho > 1e-6)
            if not bool(active.any()) or not counts.affords(int(active.sum()) * nodes):
                break
            now = state.take(active)
            trial = now.step(rho[active])
            better = trial.improves_on(now)
            state = state.put(active, better, trial)
            # A step that was just halved isn't doubled at the first success: it would fail again.
            held[active] = torch.where(better, held[active] - 1, torch.ones_like(held[active]))
            rho[active] = torch.where(better, torch.where(held[active] < 0, 2 * rho[active], rho[active]), rho[active] / 2)
            rho, held = rho.clamp(max=1.0), held.clamp(min=0.0)
            trail.append(-float(state.elbo.max()))
        inherits = state.memory is not None
        for _ in range(self.rounds):
            active = (state.residual > tolerance) & state.elbo.isfinite()
            points = int(active.sum()) * nodes
            if not bool(active.any()) or not counts.affords(points):
                break
            now = state.take(active)
            trial = now.ascended(counts.calls(points, _MAX_CALLS_PER_ROUND), tolerance**2 / 4)
            better = trial.improves_on(now)
            state = state.put(active, better, trial)
            trail.append(-float(state.elbo.max()))
            if not bool(better.any()):
                if not inherits:
                    break
                state = replace(state, memory=None)  # what was learnt on fewer nodes may mislead
            inherits = False
        return state

    def _optima(self, state: Gaussians, family: Gaussian) -> tuple[tuple[Optimum, ...], list[int]]:
        """Return the distinct optima, the best first, and their rows."""
        found = {
            i: Optimum(gaussian(loc, tril, family.covariance), -float(elbo), bool(r <= _STALLED), False)
            for i, (loc, tril, elbo, r) in enumerate(zip(state.loc, state.tril, state.elbo, state.residual, strict=True))
            if math.isfinite(float(elbo))
        }
        kept = distinct([one for one in found.values() if one.converged] or list(found.values()))
        return kept, [next(i for i, one in found.items() if one.model is two.model) for two in kept]


def _check(state: Gaussians, *, is_last: bool = False) -> None:
    """Refuse a target whose best model spreads or shrinks without bound, or whose last ELBO is out of bounds."""
    best = int(state.elbo.argmax())
    elbo = state.elbo[best, None] if is_last else state.elbo.new_zeros(1)
    spread = torch.linalg.vector_norm(state.tril[best, None, None], dim=-1)
    refuse_unbounded(elbo, spread, state.residual[best, None], state.target.names)


def _shift(state: Gaussians, loc: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Return the largest shift of each model's means, in standard deviations."""
    moved: Tensor = (state.loc - loc).abs() / torch.linalg.vector_norm(state.tril, dim=-1)
    return moved.amax(-1)


@dataclass(frozen=True)
class Gaussians:
    """B Gaussians with their ELBO, whitened gradient b and curvature A on shared nodes.

    With x = m + L z and h = Lᵀ∇log p(x): b = E[h] and A = −E[h zᵀ] (its lower triangle, mirrored) over the nodes, so that
    (b, I − A) is the exact gradient of the ELBO on these nodes. The residual is √(‖b‖² + ½‖A − I‖²).
    """

    target: Target
    nodes: Nodes
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
        value, score = evaluate(target, loc[:, None] + nodes.z @ tril.mT)
        b, slope = _moments(score, tril, nodes)
        return cls._made(target, nodes, loc, tril, value @ nodes.w + entropy(tril), b, -slope, memory)

    @classmethod
    def _made(
        cls, target: Target, nodes: Nodes, loc: Tensor, tril: Tensor, elbo: Tensor, b: Tensor, a: Tensor, memory: Memory | None
    ) -> Gaussians:
        """Mirror the lower triangle of A, and measure the residual; it is ∞ and the ELBO −∞ where something isn't finite."""
        # On finite nodes E[h zᵀ] isn't symmetric. L is lower triangular, so that only the lower half is a derivative of the ELBO.
        a = a.tril() + a.tril(-1).mT
        off = a - torch.eye(loc.shape[1], dtype=a.dtype, device=a.device)
        residual = (b.square().sum(-1) + off.square().sum((-1, -2)) / 2).sqrt()
        broken = ~(elbo.isfinite() & residual.isfinite())
        elbo, residual = elbo.masked_fill(broken, -math.inf), residual.masked_fill(broken, math.inf)
        return cls(target, nodes, loc, tril, elbo, b.nan_to_num(), a.nan_to_num(0.0, 0.0, 0.0), residual, memory)

    def step(self, rho: Float[Tensor, " b"]) -> Gaussians:
        """Take natural-gradient steps of length ρ; a full step is damped only where A isn't positive.

        In the coordinates whitened by q the precision becomes (1 − ρ) I + ρ A and the mean moves by ρ · precision⁻¹ b:
        at ρ = 1 Newton's step, exact at once on a Gaussian target.
        """
        eigenvalue, vector = torch.linalg.eigh(self.a)
        # A step that was refused, or one where A isn't positive, is damped: its precision would be far off, or not one at all.
        tame = (rho < 1) | (eigenvalue[:, 0] <= 1e-8)
        length = rho[:, None]
        precision = 1 - length + length * torch.where(tame[:, None], eigenvalue.clamp(0.25, 16.0), eigenvalue)
        pull = torch.einsum("bji,bj->bi", vector, self.b) / precision
        move = length * torch.einsum("bij,bj->bi", vector, pull)
        # The length of z is near √d: a tame step stays within two of q's own radii.
        limit = 2 * length * math.sqrt(self.loc.shape[1])
        norm = torch.linalg.vector_norm(move, dim=-1, keepdim=True)
        move = torch.where(tame[:, None], move * (limit / norm).clamp(max=1.0), move)
        factor = torch.linalg.cholesky((vector / precision[:, None]) @ vector.mT)
        loc = self.loc + torch.einsum("bij,bj->bi", self.tril, move)
        return Gaussians.at(self.target, self.nodes, loc, self.tril @ factor)

    def ascended(self, max_calls: int, tolerance: float = 1e-15) -> Gaussians:
        """Climb the ELBO on these nodes by L-BFGS over (a, T), m ← m + L a, L ← L T, where its Hessian is near the identity.

        T is lower triangular with diagonal exp(t). The free numbers are a, √2 t and T's strict lower triangle, each of curvature
        1 on a Gaussian target. Their gradient is known at the start without a call, as are b, A and the residual at the end:
        with S = E[h zᵀ] in the coordinates of the start, b = Tᵀ E[h] and A = −Tᵀ S, whose lower triangle needs only that of S.
        """
        dim = self.loc.shape[1]
        row, column = torch.tril_indices(dim, dim, -1, device=self.loc.device)
        # The entropy of L T is that of L plus Σ t: no determinant is needed again.
        volume = entropy(self.tril)

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
            value, score = evaluate(self.target, loc[:, None] + self.nodes.z @ (tril @ factor).mT)
            elbo = value @ self.nodes.w + volume[rows] + grow.log().sum(-1)
            return elbo, gradient(*_moments(score, tril, self.nodes), grow)

        start = self.loc.new_zeros(len(self.loc), 2 * dim + len(row))
        first = (self.elbo, gradient(self.b, -self.a, torch.ones_like(self.b)))
        memory = self.memory or Memory.empty(start, _STEPS_IN_MEMORY if dim <= _MAX_DIM_OF_MEMORY else None)
        peaks = ascend(trial, start, tolerance=tolerance, max_calls=max_calls, first=first, memory=memory)
        if not isinstance(peaks.curvature, Memory):
            raise TypeError(peaks.curvature)
        shift, grow, factor = read(peaks.x)
        slope = torch.diag_embed((math.sqrt(2) * peaks.score[:, dim : 2 * dim] - 1) / grow)
        slope[:, row, column] = peaks.score[:, 2 * dim :]
        b, a = torch.einsum("bji,bj->bi", factor, peaks.score[:, :dim]), -factor.mT @ slope
        loc = self.loc + torch.einsum("bij,bj->bi", self.tril, shift)
        return Gaussians._made(self.target, self.nodes, loc, self.tril @ factor, peaks.value, b, a, peaks.curvature)

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


def _moments(score: Float[Tensor, "b m d"], tril: Float[Tensor, "b d d"], nodes: Nodes) -> tuple[Tensor, Tensor]:
    """Return E[h] and E[h zᵀ] for h = Lᵀ∇log p; L multiplies last, when the sums are small."""
    moments = tril.mT @ (score.mT @ nodes.weighted)
    return moments[..., 0], moments[..., 1:]
