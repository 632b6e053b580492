"""Sticking the landing: reverse KL to flows and user modules, by reparameterised draws whose gradient vanishes at q = p."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.data_shape import Shape
from whichkl.families.flow import Flow, FlowNetwork
from whichkl.families.gaussian import diagonal_parts, loc_and_tril
from whichkl.families.network_family import NetworkFamily
from whichkl.families.network_model import law_of
from whichkl.families.user_module import Module
from whichkl.objectives import Direction, Objective
from whichkl.process.seeds import seeded
from whichkl.solvers.draws.cosine_cycles import Cycles, Descent
from whichkl.solvers.draws.reparameterised import FlowRows, ModuleRows, Rows
from whichkl.solvers.nodes.mean_field import MeanField
from whichkl.solvers.nodes.natural_gradient import NaturalGradient
from whichkl.solvers.solver import Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_WIDE = 100
"""In more dimensions than these a flow starts from a Gaussian of diagonal covariance."""
_SAME = 0.5
"""Flows whose means and spreads agree to this much of the spread are one optimum, found twice."""
REACH = 3.0
"""Splines end at 15 standard deviations of the Gaussian that a flow starts from."""
_WIDER = 1.5


@dataclass(frozen=True)
class StickingTheLanding(Solver):
    """argmin KL(q‖p) over a network's weights φ: ∇ = E_z[(∇ₓ log q(x; φ̄) − ∇ₓ log p(x)) · ∂x(z; φ)/∂φ], φ̄ held fixed.

    Leaving out the score of q, whose expectation is 0, makes every draw's gradient vanish at q = p. A flow starts as the
    reverse-KL Gaussian, exactly: its networks are at rest, inside the affine map of that Gaussian, so that its ELBO is where
    the Gaussian's ends. The best optima of the Gaussian, what covers them all, and a wider Gaussian are starts, trained
    as one batch. A module of yours starts from its own weights. Descent is `Cycles`: it ends when a whole cosine cycle gains
    less than `tolerance` nats or two standard errors of the gain. On fresh draws the flow is held against the
    Gaussian, and isn't kept where it does worse. A step whose gradient isn't finite is skipped and counted.

    Args:
        steps: of a cycle.
        cycles: at most.
        draws: of q a step.
        learning_rate: its peak in the first cycle; 0.005 unless said, for a module of yours 0.02.
        clip: the largest length of a gradient, in coordinates where the Gaussian is N(0, I).
        tolerance: nats that a cycle must gain to be followed by another.
        judged_on: draws by which the best weights are chosen.
        starts: at most so many, of a flow.
        skips: steps without a finite gradient, before a start is given up.

    Raises:
        InputError: a field is out of range.

    Source: Roeder, Wu & Duvenaud (2017); Agrawal, Sheldon & Domke (2020) for the combination of these parts.
    """

    name: ClassVar[str] = "sticking_the_landing"
    refits: ClassVar[bool] = False
    direction: ClassVar[Direction] = "reverse"
    families: ClassVar[tuple[type[Family], ...]] = (Flow, Module)

    steps: int = 400
    cycles: int = 6
    draws: int = 128
    learning_rate: float | None = None
    clip: float = 5.0
    tolerance: float = 0.01
    judged_on: int = 2_048
    starts: int = 4
    skips: int = 50

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("steps", "cycles", "draws", "judged_on", "starts", "skips"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                because = f"`{name}={value!r}` isn't a whole number of at least 1"
                raise InputError(cannot("use `StickingTheLanding`", because, f"Give, say, {name}=100"))
        for name in ("learning_rate", "clip", "tolerance"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                because = f"`{name}={value!r}` isn't a positive number"
                raise InputError(cannot("use `StickingTheLanding`", because, f"Leave `{name}` out"))

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Reverse KL to a flow or a module that needs no x, where log p can be evaluated."""
        is_single = not family.conditional or family.optional_context
        return is_single and super().solves(objective, family, access) and access.can_evaluate

    def quick(self) -> StickingTheLanding:
        """One short cycle."""
        return replace(self, steps=max(1, self.steps // 4), cycles=1)

    def starts_from_modes(self, family: Family) -> bool:
        """A flow's starts are Gaussians at the modes of p; a module has its own weights."""
        return isinstance(family, Flow)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Train all starts, and return their distinct ends, best first."""
        if not isinstance(family, NetworkFamily):
            raise TypeError(family)
        work.tell("fitting a Gaussian to start from" if isinstance(family, Flow) else "trying the module", math.nan)
        shape = Shape(target.dim)
        rows = self._flows(target, family, shape, seed) if isinstance(family, Flow) else _user_rows(target, family, shape, seed)
        problem = _Path(target, rows, self.draws, self.judged_on)
        rate = self.learning_rate or (0.005 if isinstance(family, Flow) else 0.02)
        numbers = (rate, self.steps, self.cycles, self.clip, self.tolerance, self.skips)
        engine = Cycles(problem.gradient, problem.losses, *numbers)
        state = engine.run(rows.starts, seed, work)
        return self._solution(problem, state, family, shape, seed)

    def _flows(self, target: Target, family: Flow, shape: Shape, seed: int) -> FlowRows:
        """Flows at rest inside the Gaussians to start from."""
        locs, trils = gaussians_to_start(target, seed, self.starts)

        def build() -> FlowNetwork:
            network = family.network(shape)
            if not isinstance(network, FlowNetwork):
                raise TypeError(network)
            return network.to(torch.float64)

        return FlowRows(build, [seed + 101 * i for i in range(len(locs))], locs, trils, REACH)

    def _solution(self, problem: _Path, state: Descent, family: NetworkFamily, shape: Shape, seed: int) -> Solution:
        """Hold the ends against the Gaussian on fresh draws, and say how the descent ended."""
        rows, fresh = problem.rows, (seed + 77) % 2**31
        every = list(range(len(state.best)))
        losses, start = problem.losses(state.best, every, fresh), problem.losses(rows.starts, every, fresh)
        finite = losses.isfinite().all(-1)
        if not bool(finite.any() | start[0].isfinite().all()):
            because = "the ELBO isn't finite: `log_prob` is -inf, or not a number, where the model has mass"
            raise TargetError(cannot("minimise `reverse_kl` here", because, "Pass `support=`, or start nearer to the target"))
        notes, found, best = [], [], state.best.clone()
        for i in finite.nonzero()[:, 0].tolist():
            found.append((float(losses[i].mean()), i, bool(state.settled[i])))
        if isinstance(family, Flow) and (not found or min(found)[0] > float(start[0].mean())):
            best[0] = rows.starts[0]
            found = [(float(start[0].mean()), 0, bool(state.settled[0]))]
            notes.append("the flow gained nothing on the Gaussian that it started from, which is the answer")
        optima = []
        for loss, i, settled in sorted(found):
            optima.append(Optimum(family.finished(rows.module(best[i], i), shape), loss, settled, False))
        with seeded(fresh):
            kept = distinct(optima, same=_SAME) if len(optima) > 1 else (replace(optima[0], is_global=True),)
        winner = min(found)[1]
        skipped = int(state.skipped.sum())
        if skipped:
            notes.append(f"{skipped} steps were skipped, whose gradient wasn't finite")
        if not kept[0].converged:
            notes.append(
                f"the last cycle still gained {float(state.gain[winner]):.2g} nats: give "
                f"solver=StickingTheLanding(cycles={2 * self.cycles}), or more, to see whether it goes on"
            )
        steps = min(int(state.rounds) * 50, self.steps * self.cycles)
        return Solution(
            kept, iterations=steps, residual=float(state.size[winner]), notes=tuple(notes), history=tuple(state.history.tolist())
        )


@dataclass(frozen=True)
class _Path:
    """The sticking-the-landing gradient of every start, and log q − log p on fixed noise."""

    target: Target
    rows: Rows
    draws: int
    judged_on: int

    def gradient(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s p"]:
        """Mean over draws of (∇ log q − ∇ log p) · ∂x/∂φ; NaN for a start with a draw where log p isn't a finite number."""
        free = theta.detach().requires_grad_(True)
        with torch.enable_grad():
            x, pull = self.rows.path(free, which, self.draws, seed)
        value, score = self._evaluate(which, x.detach())
        pull = torch.where(value.isfinite()[..., None], pull - score, math.nan)
        (gradient,) = torch.autograd.grad(x, free, pull / self.draws)
        return gradient

    def losses(self, theta: Float[Tensor, "s p"], which: list[int], seed: int) -> Float[Tensor, "s m"]:
        """Log q − log p on draws of each model."""
        x, log_q = self.rows.sample(theta, which, self.judged_on, seed)
        placed, _, volume = self.rows.place(which, x)
        value = self.target.log_prob(placed.reshape(-1, x.shape[-1]).to(self.target.device)).detach()
        return log_q - value.reshape(log_q.shape).to(log_q) - volume[:, None]

    def _evaluate(self, which: list[int], x: Float[Tensor, "s m d"]) -> tuple[Tensor, Tensor]:
        """Return log p and its gradient in the rows' own coordinates; −∞ outside the support."""
        placed, matrix, _ = self.rows.place(which, x)
        flat = placed.reshape(-1, x.shape[-1]).to(self.target.device)
        value, score = self.target.trial(flat)
        value = torch.where(self.target.bijection.contains(flat), value, -math.inf)
        value, score = value.reshape(x.shape[:-1]).to(x), score.reshape(x.shape).to(x)
        return value, score if matrix is None else score @ matrix


def gaussians_to_start(target: Target, seed: int, most: int) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d d"]]:
    """The best optima of the reverse-KL Gaussian, the Gaussian that covers them all, and a wider one."""
    if target.dim > _WIDE:
        optima = MeanField().solve(target, Gaussian("diagonal"), seed).optima
        parts = [(loc, torch.diag(scale)) for loc, scale in (diagonal_parts(one.model) for one in optima[:most])]
    else:
        optima = NaturalGradient().solve(target, Gaussian(), seed).optima
        parts = [loc_and_tril(one.model) for one in optima[:most]]
    parts = parts[: max(1, most - 2)]
    locs, trils = (torch.stack(part) for part in zip(*parts, strict=True))
    weight = torch.softmax(-torch.tensor([one.loss for one in optima[: len(parts)]], dtype=locs.dtype, device="cpu"), 0).to(
        locs.device
    )
    if len(parts) > 1:
        mean = weight @ locs
        apart = (locs - mean) * weight.sqrt()[:, None]
        whole = torch.linalg.cholesky((weight[:, None, None] * trils @ trils.mT).sum(0) + apart.mT @ apart)
        locs, trils = torch.cat([locs, mean[None]]), torch.cat([trils, whole[None]])
    locs, trils = torch.cat([locs, locs[:1]]), torch.cat([trils, _WIDER * trils[:1]])
    return locs[:most], trils[:most]


def _user_rows(target: Target, family: NetworkFamily, shape: Shape, seed: int) -> ModuleRows:
    """A copy of the user's module, once its law is seen to be one of rows that can be drawn with a gradient.

    Raises:
        InputError: it isn't.
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
