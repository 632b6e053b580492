"""Enumeration: reverse KL on a discrete target whose states can all be listed, without any draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from whichkl._checks import TargetError, cannot
from whichkl.access import Access
from whichkl.families import Autoregressive, Categorical, Family, Product
from whichkl.families.layers import Shape
from whichkl.process.seeds import seeded
from whichkl.solvers.descent import Flat
from whichkl.solvers.solver import Optimum, Solution, Solver, check_counts, check_positive
from whichkl.solvers.states.category_tables import categories_for, distinct_tables, is_table
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_STARTS = 16
"""Number of starts of coordinate ascent."""
_NUDGE = 0.01
"""Standard deviation of the noise on the log odds that moves an end off a saddle."""
_WINDOW_OF_GAP, _WINDOW_OF_HALVING = 100, 50
"""Iterations of L-BFGS in which the KL must fall by `gap`; and, once it is below `gap`, by half."""
_EXACT_KL = 1e-9
"""Nats. A KL at which no iteration can gain anything."""


@dataclass(frozen=True)
class Enumeration(Solver):
    """argmin KL(q‖p) = Σ q (log q − log p) over all states: exact values and gradients.

    Independent columns are fitted by coordinate ascent from 16 starts at once: log qⱼ(k) = E_q[log p | xⱼ = k] + const. never
    lowers the ELBO. Every end is nudged, so that it can't stay on a saddle. A single column of categories is p itself. An
    autoregressive network is fitted by L-BFGS on its weights, from the uniform distribution. It ends when the KL, which bounds
    what can still be gained, is at most `gap` nats and fifty iterations no longer halve it, or when a hundred iterations gain
    less than `gap`.

    Args:
        tolerance: nats that a sweep may gain, and probability that it may move, at the end.
        sweeps: largest number of sweeps of coordinate ascent.
        gap: nats between a network and p.
        iterations: largest number of iterations of L-BFGS.

    Raises:
        InputError: a field is out of range.

    Source: Saul, Jaakkola & Jordan (1996) for mean field on Boltzmann machines.
    """

    name = "enumeration"
    direction = "reverse"
    families = (Product, Categorical, Autoregressive)

    tolerance: float = 1e-9
    sweeps: int = 2_000
    gap: float = 1e-3
    iterations: int = 2_000

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, sweeps=1, iterations=1)
        check_positive(self, "tolerance", "gap")

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the columns are categories, and all states can be listed."""
        return (is_table(family) or isinstance(family, Autoregressive)) and Access.ENUMERABLE in access

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """List the states, and minimise."""
        counts = categories_for(target, family)
        x, log_p = (part.cpu() for part in target.atoms)
        if isinstance(family, Categorical):
            return Solution(distinct_tables(family, [(-float(log_p.logsumexp(0)), [log_p.log_softmax(0)], True)]), 1, 0.0)
        if empty := int((log_p == -torch.inf).sum()):
            because = f"`log_prob` is -inf at {empty:,} of {len(log_p):,} states, where every model of it has mass"
            instead = "Give these states a finite penalty, or draw from the target and use forward KL"
            raise TargetError(cannot(f"minimise `reverse_kl` over `{family}` here", because, instead))
        if isinstance(family, Autoregressive):
            return self._network(family, x, log_p, counts, seed, work)
        return self._columns(family, log_p, counts, seed)

    def _columns(self, family: Family, log_p: Float[Tensor, " n"], counts: Sequence[int], seed: int) -> Solution:
        """Run coordinate ascent from uniform and from random probabilities, and again from the nudged ends."""
        generator = torch.Generator().manual_seed(seed)
        logits = [torch.randn(_STARTS, n, generator=generator, dtype=torch.float64, device="cpu").mul(2.0) for n in counts]
        for one in logits:
            one[0] = 0.0
        logs = [one.log_softmax(-1) for one in logits]
        table, done = log_p.reshape(tuple(counts)), 0
        history: list[float] = []
        for again in (False, True):
            if again:
                noise = [torch.randn(one.shape, generator=generator, dtype=torch.float64, device="cpu") for one in logs]
                logs = [(one + _NUDGE * more).log_softmax(-1) for one, more in zip(logs, noise, strict=True)]
            loss = torch.full((_STARTS,), torch.inf, dtype=torch.float64, device="cpu")
            for _ in range(self.sweeps):
                before = [one.exp() for one in logs]
                after, logs = sweep(table, logs)
                done += 1
                move = torch.stack([(one.exp() - old).abs().amax(-1) for one, old in zip(logs, before, strict=True)]).amax(0)
                settled, loss = (loss - after <= self.tolerance) & (move <= self.tolerance), after
                history.append(float(loss.min()))
                if bool(settled.all()):
                    break
        ends = [(float(loss[i]), [one[i] for one in logs], bool(settled[i])) for i in range(_STARTS)]
        optima = distinct_tables(family, ends)
        return Solution(optima, done, float(move[loss.argmin()]), history=tuple(history))

    def _network(
        self, family: Autoregressive, x: Tensor, log_p: Tensor, counts: tuple[int, ...], seed: int, work: Work
    ) -> Solution:
        """Run L-BFGS on the weights of the network, from the uniform distribution."""
        shape = Shape(len(counts), categories=counts)
        with seeded(seed):
            network = family.network(shape).to(torch.float64)
        make_uniform(network)
        flat, states, log_z = Flat(network), _States(network), log_p.logsumexp(0)
        leading, table = x.long()[:: counts[-1]], log_p.reshape(-1, counts[-1]) - log_z
        kls, best = [math.inf], flat.read().numpy()

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            row = torch.from_numpy(theta).requires_grad_(True)
            named = {f"network.{name}": value for name, value in flat.named(row).items()}
            log_q = functional_call(states, named, (leading,))
            value = (log_q.exp() * (log_q - table)).sum()
            (gradient,) = torch.autograd.grad(value, row)
            return value.item(), gradient.numpy()

        def watch(intermediate_result: scipy.optimize.OptimizeResult) -> None:
            nonlocal best
            kls.append(float(intermediate_result.fun))
            best = np.array(intermediate_result.x)
            work.tell(f"minimising over all states, KL {kls[-1]:.4g}", len(kls) / self.iterations)
            if self._has_settled(kls):
                raise StopIteration

        options = {"maxiter": self.iterations, "maxfun": 2 * self.iterations, "gtol": 0.0, "ftol": 0.0, "maxcor": 30}
        result = scipy.optimize.minimize(loss, best, jac=True, method="L-BFGS-B", options=options, callback=watch)
        kl = min(kls[-1], float(result.fun))
        flat.write(torch.from_numpy(best if kls[-1] < math.inf else result.x))
        settled = kl <= self.gap or self._has_settled(kls)
        notes = () if settled else (f"{len(kls) - 1:,} iterations ended {kl:.2g} nats from p, and still gained",)
        optimum = Optimum(family.finished(network, shape), kl - float(log_z), settled, True)
        history = tuple(one - float(log_z) for one in kls[1:])
        return Solution((optimum,), int(result.nit), float(np.abs(result.jac).max()), notes=notes, history=history)

    def _has_settled(self, kls: Sequence[float]) -> bool:
        """Return whether the KL, which bounds what can be gained, is small enough, or the last iterations gained too little."""
        halves = len(kls) <= _WINDOW_OF_HALVING or kls[-1] <= kls[-1 - _WINDOW_OF_HALVING] / 2
        is_near = kls[-1] <= self.gap and (kls[-1] < _EXACT_KL or not halves)
        return is_near or (len(kls) > _WINDOW_OF_GAP and kls[-1 - _WINDOW_OF_GAP] - kls[-1] <= self.gap)


def sweep(
    table: Float[Tensor, ...], logs: Sequence[Float[Tensor, "s k"]]
) -> tuple[Float[Tensor, " s"], list[Float[Tensor, "s k"]]]:
    """Update every column once, in order; return −ELBO after it and the log probabilities; `table` has an axis per column."""
    logs, starts = list(logs), len(logs[0])
    left = table.expand(starts, *table.shape)
    for j in range(len(logs)):
        rest = left
        for i in reversed(range(j + 1, len(logs))):
            rest = (rest.reshape(starts, -1, logs[i].shape[1]) @ logs[i].exp()[:, :, None])[..., 0]
        logs[j] = rest.reshape(starts, -1).log_softmax(-1)
        left = (logs[j].exp()[:, None] @ left.reshape(starts, logs[j].shape[1], -1))[:, 0]
        left = left.reshape(starts, *table.shape[j + 1 :])
    entropy = -sum((one.exp() * one).nan_to_num(0.0).sum(-1) for one in logs)
    return -(left.reshape(starts) + entropy), logs


def make_uniform(network: nn.Module) -> None:
    """Give every category the same probability, by zeros in the last layer."""
    last = [one for one in network.modules() if isinstance(one, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


class _States(nn.Module):
    """Log q of every state, (n / K, K): a row holds all K values of the last column, on which no other column depends.

    The sum is in `forward` because `functional_call` replaces weights there alone.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, leading: Tensor) -> Tensor:
        *before, last = self.network.logits(leading, None)  # type: ignore[operator]
        each = [one.gather(-1, leading[:, j, None]) for j, one in enumerate(before)]
        log_q: Tensor = torch.cat([*each, torch.zeros_like(last[:, :1])], -1).sum(-1, keepdim=True) + last
        return log_q
