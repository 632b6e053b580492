"""Score function: reverse KL to autoregressive networks of categories, too many states to list, by draws with a baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.families import Autoregressive, Family
from whichkl.families.data_shape import Shape
from whichkl.objectives import Direction, Objective
from whichkl.process.seeds import seeded
from whichkl.solvers.draws.cosine_cycles import Cycles
from whichkl.solvers.flat_weights import Flat
from whichkl.solvers.solver import Optimum, Solution, Solver
from whichkl.solvers.states.category_tables import categories_for
from whichkl.solvers.states.enumeration import uniform
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_ROUND = 50


@dataclass(frozen=True)
class ScoreFunction(Solver):
    """argmin KL(q‖p) over an autoregressive network: ∇ = 1/(m−1) Σᵢ (rᵢ − r̄) ∇ log q(xᵢ), r = log q − log p, on m draws of q.

    The mean r̄ is the leave-one-out baseline: unbiased, and the gradient vanishes, draw by draw, at q = p. Two networks from
    the uniform distribution are trained as one batch, by `Cycles`, as `StickingTheLanding` does. It finds a local optimum; with
    far-apart modes it settles on some of them.

    Args:
        steps: of a cycle.
        cycles: at most.
        draws: of q a step.
        learning_rate: its peak in the first cycle.
        clip: the largest length of a gradient.
        tolerance: nats that a cycle must gain to be followed by another.
        judged_on: draws by which the best weights are chosen.
        starts: networks.
        skips: steps without a finite gradient, before a network is given up.

    Source: Williams (1992); Kool, van Hoof & Welling (2019) for the baseline.
    """

    name: ClassVar[str] = "score_function"
    refits: ClassVar[bool] = False
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Autoregressive,)

    steps: int = 400
    cycles: int = 6
    draws: int = 256
    learning_rate: float = 0.01
    clip: float = 5.0
    tolerance: float = 0.01
    judged_on: int = 2_048
    starts: int = 2
    skips: int = 50

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Reverse KL to an autoregressive network, where log p can be evaluated."""
        return super().solves(objective, family, access) and access.can_evaluate

    def quick(self) -> ScoreFunction:
        """One short cycle."""
        return replace(self, steps=max(1, self.steps // 4), cycles=1)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Train the networks, and return the better one."""
        if not isinstance(family, Autoregressive):
            raise TypeError(family)
        counts = categories_for(target, family)
        shape = Shape(target.dim, categories=counts)
        problem = Columns(target, family, shape, [seed + 101 * i for i in range(self.starts)], self.draws, self.judged_on)
        numbers = (self.learning_rate, self.steps, self.cycles, self.clip, self.tolerance, self.skips)
        state = Cycles(problem.gradient, problem.losses, *numbers).run(problem.starts, seed, work)
        losses = problem.losses(state.best, list(range(self.starts)), (seed + 77) % 2**31).mean(-1).nan_to_num(math.inf, math.inf)
        best = int(losses.argmin())
        if not math.isfinite(float(losses[best])):
            because = "the ELBO isn't finite: `log_prob` is -inf, or not a number, at states that the model draws"
            raise TargetError(cannot("minimise `reverse_kl` here", because, "Give these states a finite penalty"))
        notes = []
        if not bool(state.settled[best]):
            notes.append(
                f"the last cycle still gained {float(state.gain[best]):.2g} nats: give "
                f"solver=ScoreFunction(cycles={2 * self.cycles}), or more, to see whether it goes on"
            )
        if int(state.skipped.sum()):
            notes.append(f"{int(state.skipped.sum())} steps were skipped, whose gradient wasn't finite")
        model = family.finished(problem.module(state.best[best]), shape)
        end = Optimum(model, float(losses[best]), bool(state.settled[best]), True)
        steps = min(int(state.rounds) * _ROUND, self.steps * self.cycles)
        return Solution(
            (end,), iterations=steps, residual=float(state.size[best]), notes=tuple(notes), history=tuple(state.history.tolist())
        )


class Columns:
    """The score-function gradient of several networks at once, and log q − log p on fixed noise.

    Args:
        target: p.
        family: of the networks.
        shape: of the rows.
        seeds: of the networks' weights.
        draws: of a gradient.
        judged_on: draws of a loss.
    """

    def __init__(
        self, target: Target, family: Autoregressive, shape: Shape, seeds: list[int], draws: int, judged_on: int
    ) -> None:
        """Build the networks at the uniform distribution."""
        self.target, self.draws, self.judged_on, rows = target, draws, judged_on, []
        for seed in seeds:
            with seeded(seed):
                network: Any = family.network(shape).to(torch.float64)
            uniform(network)
            self.operations = _Drawn(network)
            self.flat = Flat(self.operations)
            rows.append(self.flat.read())
        self.starts = torch.stack(rows)

    def gradient(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s p"]:
        """Weigh the scores of draws by how far r is above its mean; NaN where log p isn't a finite number."""
        x, _ = self._drawn(theta, self.draws, seed)
        free = theta.detach().requires_grad_(True)
        log_q = self._log_prob(free, x)
        ratio = log_q.detach() - self._log_p(x)
        weight = (ratio - ratio.mean(-1, keepdim=True)) / (self.draws - 1)
        (gradient,) = torch.autograd.grad(log_q, free, weight)
        return gradient

    def losses(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s m"]:
        """Log q − log p on draws of each network from the same uniform numbers."""
        x, log_q = self._drawn(theta, self.judged_on, seed)
        return log_q - self._log_p(x)

    def module(self, theta: Float[Tensor, " p"]) -> nn.Module:
        """Return the network with these weights."""
        self.flat.write(theta)
        network: nn.Module = self.operations.network
        return network

    def _drawn(self, theta: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(m, self.target.dim, generator=generator, dtype=torch.float64, device="cpu")

        def one(row: Tensor) -> Any:
            return functional_call(self.operations, self.flat.named(row), (uniforms,))

        with torch.no_grad():
            x, log_q = vmap(one)(theta)
        return x, log_q

    def _log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        def one(row: Tensor, states: Tensor) -> Any:
            return functional_call(self.operations, self.flat.named(row), (states,))

        log_q: Tensor = vmap(one)(theta, x)
        return log_q

    def _log_p(self, x: Float[Tensor, "s m d"]) -> Float[Tensor, "s m"]:
        rows = x.reshape(-1, x.shape[-1]).to(self.target.device, self.target.dtype)
        return self.target.log_prob(rows).detach().cpu().to(torch.float64).reshape(x.shape[:-1])


class _Drawn(nn.Module):
    """Of uniform numbers: draws, by the inverse of each column's distribution function, and log q. Of whole rows: log q."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Any:
        return self._draw(given) if given.is_floating_point() else self._log_prob(given)

    def _draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        columns = [torch.zeros_like(uniforms[:, 0], dtype=torch.long)] * uniforms.shape[1]
        for j in range(len(columns)):
            log = self.network.logits(torch.stack(columns, -1), None)[j]
            above = uniforms[:, j, None] > log.exp().cumsum(-1)[..., :-1]
            columns[j] = above.sum(-1)
        x = torch.stack(columns, -1)
        return x, self._log_prob(x)

    def _log_prob(self, x: Tensor) -> Tensor:
        found = self.network.logits(x, None)
        return torch.stack([one.gather(-1, x[:, j, None])[:, 0] for j, one in enumerate(found)], -1).sum(-1)
