"""Score function: reverse KL to autoregressive networks of categories, with too many states to list, by draws with a baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import TargetError, cannot
from whichkl.families import Autoregressive, Family
from whichkl.families.layers import Shape
from whichkl.process.seeds import seeded
from whichkl.solvers.descent import Flat
from whichkl.solvers.draws.cosine_cycles import CycleSolver, judging_seed
from whichkl.solvers.solver import Optimum, Solution
from whichkl.solvers.states.category_tables import categories_for, log_prob_of_states
from whichkl.solvers.states.enumeration import make_uniform
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target


@dataclass(frozen=True)
class ScoreFunction(CycleSolver):
    """argmin KL(q‖p) over an autoregressive network: ∇ = 1/(m−1) Σᵢ (rᵢ − r̄) ∇ log q(xᵢ), r = log q − log p, on m draws of q.

    The mean r̄ is the leave-one-out baseline: the gradient is unbiased, and it vanishes for every draw at q = p. Two networks
    start from the uniform distribution and are trained as one batch; the descent is that of `CycleSolver`. The result is a local
    optimum; if the modes of p are far apart, it settles on some of them.

    Args:
        starts: number of networks.
        steps, cycles, draws, learning_rate, clip, tolerance, judged_on, skips: see `CycleSolver`.

    Raises:
        InputError: a field is out of range.

    Source: Williams (1992); Kool, van Hoof & Welling (2019) for the baseline.
    """

    name = "score_function"
    families = (Autoregressive,)

    draws: int = 256
    learning_rate: float | None = 0.01
    starts: int = 2

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Train the networks, and return the best one."""
        if not isinstance(family, Autoregressive):
            raise TypeError(family)
        shape = Shape(target.dim, categories=categories_for(target, family))
        problem = Columns(target, family, shape, [seed + 101 * i for i in range(self.starts)], self.draws, self.judged_on)
        state = self.descend(problem, problem.starts, 0.01, seed, work)
        losses = problem.losses(state.best, list(range(self.starts)), judging_seed(seed)).mean(-1).nan_to_num(math.inf, math.inf)
        best = int(losses.argmin())
        if not math.isfinite(float(losses[best])):
            because = "the ELBO isn't finite: `log_prob` is -inf, or not a number, at states that the model draws"
            raise TargetError(cannot("minimise `reverse_kl` here", because, "Give these states a finite penalty"))
        model = family.finished(problem.module(state.best[best]), shape)
        return self.finish([Optimum(model, float(losses[best]), bool(state.settled[best]), True)], state, best)


class Columns:
    """The score-function gradient of networks, one per seed, on `draws` draws, and log q − log p on `judged_on` fixed ones."""

    def __init__(
        self, target: Target, family: Autoregressive, shape: Shape, seeds: list[int], draws: int, judged_on: int
    ) -> None:
        """Build the networks at the uniform distribution."""
        self.target, self.draws, self.judged_on, rows = target, draws, judged_on, []
        for seed in seeds:
            with seeded(seed):
                network: Any = family.network(shape).to(torch.float64)
            make_uniform(network)
            self.operations = _Drawn(network)
            self.flat = Flat(self.operations)
            rows.append(self.flat.read())
        self.starts = torch.stack(rows)

    def gradient(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s p"]:
        """Weight the score of each draw by r − r̄; NaN where log p isn't a finite number."""
        x, _ = self._drawn(theta, self.draws, seed)
        free = theta.detach().requires_grad_(True)
        log_q: Tensor = self.flat.call_each(free, x)
        ratio = log_q.detach() - log_prob_of_states(self.target, x)
        weight = (ratio - ratio.mean(-1, keepdim=True)) / (self.draws - 1)
        (gradient,) = torch.autograd.grad(log_q, free, weight)
        return gradient

    def losses(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s m"]:
        """Return log q − log p on draws of each network from the same uniform numbers."""
        x, log_q = self._drawn(theta, self.judged_on, seed)
        return log_q - log_prob_of_states(self.target, x)

    def module(self, theta: Float[Tensor, " p"]) -> nn.Module:
        """Return the network with these weights."""
        self.flat.write(theta)
        network: nn.Module = self.operations.network
        return network

    def _drawn(self, theta: Tensor, m: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(m, self.target.dim, generator=generator, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            x, log_q = self.flat.call_each(theta, uniforms.expand(len(theta), -1, -1))
        return x, log_q


class _Drawn(nn.Module):
    """Draws and their log q from uniform numbers, by the inverse distribution functions; or log q of whole rows."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Tensor) -> Any:
        if not given.is_floating_point():
            return self._log_prob(given)
        columns = [torch.zeros_like(given[:, 0], dtype=torch.long)] * given.shape[1]
        for j in range(len(columns)):
            log = self.network.logits(torch.stack(columns, -1), None)[j]
            columns[j] = (given[:, j, None] > log.exp().cumsum(-1)[..., :-1]).sum(-1)
        x = torch.stack(columns, -1)
        return x, self._log_prob(x)

    def _log_prob(self, x: Tensor) -> Tensor:
        found = self.network.logits(x, None)
        return torch.stack([one.gather(-1, x[:, j, None])[:, 0] for j, one in enumerate(found)], -1).sum(-1)
