"""Sticking the landing: reverse KL to flows and user modules, by reparameterised draws whose gradient vanishes at q = p."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.flow import Flow
from whichkl.families.gaussian import diagonal_parts, loc_and_tril
from whichkl.families.layers import Shape
from whichkl.families.network_family import NetworkFamily, law_of
from whichkl.families.user_module import Module
from whichkl.process.seeds import seeded
from whichkl.solvers.draws.cosine_cycles import CycleSolver, Descent, judging_seed
from whichkl.solvers.draws.reparameterised import FlowRows, ModelRows, ModuleRows
from whichkl.solvers.nodes.mean_field import MeanField
from whichkl.solvers.nodes.natural_gradient import NaturalGradient
from whichkl.solvers.solver import Optimum, Solution, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_MAX_DIM_OF_FULL_COVARIANCE = 100
"""Largest number of dimensions in which a flow starts from a Gaussian of full covariance; above, it is diagonal."""
_SAME = 0.5
"""Flows are one optimum, found twice, if their means and spreads differ by at most this multiple of the spread."""
REACH = 3.0
"""Splines end at 5 × REACH standard deviations of the Gaussian that a flow starts from."""
_WIDER = 1.5
"""Scale of the wider Gaussian among the starts, relative to the best optimum."""


@dataclass(frozen=True)
class StickingTheLanding(CycleSolver):
    """argmin KL(q‖p) over a network's weights φ: ∇ = E_z[(∇ₓ log q(x; φ̄) − ∇ₓ log p(x)) · ∂x(z; φ)/∂φ], φ̄ held fixed.

    The gradient omits the score of q, whose expectation is 0, so that every draw's gradient vanishes at q = p. A flow starts
    exactly as the reverse-KL Gaussian: its networks are at rest, inside the affine map of that Gaussian. The starts are the best
    optima of the Gaussian, the Gaussian that covers them all, and a wider one; they are trained as one batch. A user's module
    starts from its own weights. The descent and its end are those of `CycleSolver`. If the flow does worse than the Gaussian on
    fresh draws, the Gaussian is the answer. Steps whose gradient isn't finite are skipped and counted.

    Args:
        learning_rate: peak learning rate of the first cycle; by default 0.005, and 0.02 for a user's module.
        clip: largest length of a gradient, in coordinates where the Gaussian is N(0, I).
        starts: largest number of starts of a flow.
        steps, cycles, draws, tolerance, judged_on, skips: see `CycleSolver`.

    Raises:
        InputError: a field is out of range.

    Source: Roeder, Wu & Duvenaud (2017); Agrawal, Sheldon & Domke (2020) for the combination of these parts.
    """

    name = "sticking_the_landing"
    families = (Flow, Module)
    mode_families = (Flow,)

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the network needs no context."""
        return not family.conditional or family.optional_context

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Train all starts, and return their distinct ends, best first."""
        if not isinstance(family, NetworkFamily):
            raise TypeError(family)
        shape = Shape(target.dim)
        rows: ModelRows
        if isinstance(family, Flow):
            work.tell("fitting a Gaussian to start from", math.nan)
            locs, trils = gaussians_to_start(target, seed, self.starts)

            def build() -> Any:
                return family.network(shape).to(torch.float64)

            rows = FlowRows(build, [seed + 101 * i for i in range(len(locs))], locs, trils, REACH)
        else:
            work.tell("trying the module", math.nan)
            rows = _user_rows(target, family, shape, seed)
        problem = _Path(target, rows, self.draws, self.judged_on)
        state = self.descend(problem, rows.starts, 0.005 if isinstance(family, Flow) else 0.02, seed, work)
        return self._solution(problem, state, family, shape, judging_seed(seed))

    def _solution(self, problem: _Path, state: Descent, family: NetworkFamily, shape: Shape, seed: int) -> Solution:
        """Compare the ends with the Gaussian on fresh draws, and return the distinct ones.

        Raises:
            TargetError: the ELBO is finite nowhere.
        """
        rows, every = problem.rows, list(range(len(state.best)))
        losses, start = problem.losses(state.best, every, seed), problem.losses(rows.starts, every, seed)
        finite = losses.isfinite().all(-1)
        if not bool(finite.any() | start[0].isfinite().all()):
            because = "the ELBO isn't finite: `log_prob` is -inf, or not a number, where the model has mass"
            raise TargetError(cannot("minimise `reverse_kl` here", because, "Pass `support=`, or start nearer to the target"))
        notes, best = [], state.best.clone()
        found = sorted((float(losses[i].mean()), i) for i in finite.nonzero()[:, 0].tolist())
        if isinstance(family, Flow) and (not found or found[0][0] > float(start[0].mean())):
            best[0] = rows.starts[0]
            found = [(float(start[0].mean()), 0)]
            notes.append("the flow gained nothing over the Gaussian that it started from, so that Gaussian is the answer")
        optima = [
            Optimum(family.finished(rows.module(best[i], i), shape), loss, bool(state.settled[i]), False) for loss, i in found
        ]
        with seeded(seed):
            kept = distinct(optima, same=_SAME) if len(optima) > 1 else (replace(optima[0], is_global=True),)
        return self.finish(kept, state, found[0][1], *notes)


@dataclass(frozen=True)
class _Path:
    """The sticking-the-landing gradient of every start, and log q − log p on fixed noise."""

    target: Target
    rows: ModelRows
    draws: int
    judged_on: int

    def gradient(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s p"]:
        """Return the mean of (∇ log q − ∇ log p) · ∂x/∂φ; NaN for a start with a draw where log p isn't a finite number."""
        free = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            x, pull = self.rows.path(free, self.draws, seed)
        placed, matrix, _ = self.rows.place(which, x.detach())
        flat = placed.reshape(-1, x.shape[-1]).to(self.target.device)
        value, score = self.target.trial(flat)
        value = torch.where(self.target.bijection.contains(flat), value, -math.inf)
        value, score = value.reshape(x.shape[:-1]).to(x), score.reshape(x.shape).to(x)
        score = score if matrix is None else score @ matrix  # in the coordinates of the rows
        pull = torch.where(value.isfinite()[..., None], pull - score, math.nan)
        (gradient,) = torch.autograd.grad(x, free, pull / self.draws)
        return gradient

    def losses(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s m"]:
        """Return log q − log p on draws of each model."""
        x, log_q = self.rows.sample(theta, self.judged_on, seed)
        placed, _, volume = self.rows.place(which, x)
        value = self.target.log_prob(placed.reshape(-1, x.shape[-1]).to(self.target.device)).detach()
        return log_q - value.reshape(log_q.shape).to(log_q) - volume[:, None]


def gaussians_to_start(target: Target, seed: int, most: int) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d d"]]:
    """Return means and factors of the best reverse-KL Gaussians, of the Gaussian that covers them all, and of a wider one."""
    if target.dim > _MAX_DIM_OF_FULL_COVARIANCE:
        optima = MeanField().solve(target, Gaussian("diagonal"), seed).optima
        parts = [(loc, torch.diag(scale)) for loc, scale in (diagonal_parts(one.model) for one in optima[:most])]
    else:
        optima = NaturalGradient().solve(target, Gaussian(), seed).optima
        parts = [loc_and_tril(one.model) for one in optima[:most]]
    parts = parts[: max(1, most - 2)]
    locs, trils = (torch.stack(part) for part in zip(*parts, strict=True))
    loss = torch.tensor([one.loss for one in optima[: len(parts)]], dtype=locs.dtype, device="cpu")
    weight = torch.softmax(-loss, 0).to(locs.device)
    if len(parts) > 1:
        mean = weight @ locs
        apart = (locs - mean) * weight.sqrt()[:, None]
        whole = torch.linalg.cholesky((weight[:, None, None] * trils @ trils.mT).sum(0) + apart.mT @ apart)
        locs, trils = torch.cat([locs, mean[None]]), torch.cat([trils, whole[None]])
    locs, trils = torch.cat([locs, locs[:1]]), torch.cat([trils, _WIDER * trils[:1]])
    return locs[:most], trils[:most]


def _user_rows(target: Target, family: NetworkFamily, shape: Shape, seed: int) -> ModuleRows:
    """Return a copy of the user's module, whose law must be one of rows that can be drawn with a gradient.

    Raises:
        InputError: the law is another.
    """
    with seeded(0):
        module = family.network(shape)
        law = law_of(module)
    if not law.has_rsample:
        because = f"its law, a `{type(law).__name__}`, has no `rsample`, through which the gradient would flow"
        raise InputError(cannot(f"fit `{family}` by reverse KL", because, "Return a law that has one, or use Flow()"))
    events = (target.dim,) if len(law.event_shape) or target.dim > 1 else ()
    if law.batch_shape != () or tuple(law.event_shape) != events:
        shapes = f"batch shape {tuple(law.batch_shape)} and event shape {tuple(law.event_shape)}"
        instead = f"Return torch.distributions.Independent(law, 1) with event shape ({target.dim},)"
        raise InputError(cannot(f"fit `{family}` to this target", f"its law has {shapes}", instead))
    return ModuleRows(module, target.dim)
