"""Sticking the landing: reverse KL to flows and user modules, by reparameterised draws whose gradient vanishes at q = p."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.families import Family, Gaussian
from whichkl.families.flow import Flow, FlowNetwork
from whichkl.families.gaussian import diagonal_parts, loc_and_tril
from whichkl.families.layers import Shape
from whichkl.families.network_family import NetworkFamily, law_of
from whichkl.families.user_module import Module
from whichkl.process.seeds import seeded
from whichkl.process.threads import one_thread
from whichkl.solvers.descent import Flat
from whichkl.solvers.draws.cosine_cycles import CycleSolver, Descent, judging_seed
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


class FlowRows:
    """Flows within Gaussians: x = loc + L u, u = s + M f⁻¹(z / r), with s, M and f free, and u = z at the start, where M = r I.

    All of them run as one batch (`torch.func.vmap`), in the coordinates u. `reach` is r: the splines of a flow end at 5 r
    standard deviations of the Gaussian.
    """

    def __init__(
        self,
        build: Callable[[], FlowNetwork],
        seeds: Sequence[int],
        locs: Float[Tensor, "s d"],
        trils: Float[Tensor, "s d d"],
        reach: float,
    ) -> None:
        """Build all flows, each from its own seed and at rest."""
        self.locs, self.trils, self.build, self.reach = locs, trils, build, reach
        self.volume = trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        rows = []
        for seed in seeds:
            with seeded(seed):
                network = build()
            network.rest()
            network.within = network.mean.new_tensor(1 / reach)
            self.operations = _Within(network.to(locs.device), reach)
            self.weights = Flat(self.operations)
            rows.append(self.weights.read())
        self.starts = torch.stack(rows)

    def sample(self, theta: Float[Tensor, "s p"], m: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return m draws of each flow (s, m, d), from the same noise, and log q of them (s, m)."""
        with torch.no_grad():
            u, log_q = self.weights.call_each(theta, self._noise(m, seed).expand(len(theta), -1, -1))
        return u, log_q

    def path(self, theta: Float[Tensor, "s p"], m: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return m draws of each flow, differentiable in its weights, and ∇ log q of them at fixed weights.

        ∇ log q(u) = J⁻ᵀ ∂/∂z [log N(z) − log|J|] with J = ∂u/∂z needs no inverse of the flow. Draws come with their negatives,
        for less noise; `sample` doesn't do that, since the standard error of a loss needs independent draws.
        """
        half = self._noise((m + 1) // 2, seed)
        z = torch.cat([half, -half])[:m].expand(len(theta), -1, -1).clone().requires_grad_(True)
        u, log_q = self.weights.call_each(theta, z)
        (pull,) = torch.autograd.grad(log_q.sum(), z, retain_graph=True)
        units = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[:, None, None, :].expand(-1, *z.shape)
        jacobian = _pulled(u, z, units)
        with one_thread():  # with several threads torch's LU of a batch can be wrong
            return u, torch.linalg.solve(jacobian.permute(1, 2, 3, 0), pull)

    def place(self, which: list[int], x: Float[Tensor, "s m d"]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the points in the target's coordinates, the matrices L of that map, and log|L|."""
        return self.locs[which, None] + x @ self.trils[which].mT, self.trils[which], self.volume[which]

    def module(self, theta: Tensor, which: int) -> nn.Module:
        """Return the flow with s and M merged into its outer map."""
        self.weights.write(theta)
        with seeded(0):  # its weights are overwritten
            network = self.build().to(self.locs.device)
        network.load_state_dict(self.operations.network.state_dict())
        shift, mix = self.operations.shift.detach(), self.reach * self.operations.mix.detach().tril()
        tril = self.trils[which]
        network.surround(self.locs[which] + tril @ shift, tril @ mix, 1 / self.reach)
        return network

    def _noise(self, m: int, seed: int) -> Float[Tensor, "m d"]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(m, self.locs.shape[1], generator=generator, dtype=self.locs.dtype, device="cpu").to(self.locs.device)


class ModuleRows:
    """A copy of a user's module, whose weights may be overwritten. Nothing is assumed about it, so nothing is batched."""

    def __init__(self, module: nn.Module, dim: int) -> None:
        """Read its free weights."""
        self.operations, self.dim = _Law(module), dim
        self.weights = Flat(self.operations)
        self.starts = self.weights.read()[None].to(torch.float64)

    def sample(self, theta: Float[Tensor, "1 p"], m: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return m draws (1, m, d), under torch's global seed, which is restored, and log q of them (1, m)."""
        with torch.no_grad():
            x = self._call(theta, "draw", m, seed)
            return self._shaped(x), self._call(theta, "log_prob", x)[None].to(torch.float64)

    def path(self, theta: Float[Tensor, "1 p"], m: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return m draws, differentiable in the weights, and ∇ log q of them at fixed weights."""
        x = self._call(theta, "draw", m, seed)
        at = x.detach().requires_grad_(True)
        (pull,) = torch.autograd.grad(self._call(theta.detach(), "log_prob", at).sum(), at)
        return self._shaped(x), self._shaped(pull)

    def place(self, which: list[int], x: Float[Tensor, "1 m d"]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the draws themselves, which are in the target's coordinates, no matrix, and 0."""
        return x, None, torch.zeros_like(x[:, 0, 0])

    def module(self, theta: Tensor, which: int) -> nn.Module:
        """Return the module itself, with these weights."""
        self.weights.write(theta)
        return self.operations.module

    def _call(self, theta: Tensor, what: str, given: Any, seed: int = 0) -> Tensor:
        with seeded(seed):
            value: Tensor = functional_call(self.operations, self.weights.named(theta[0]), (what, given))
        return value

    def _shaped(self, x: Tensor) -> Float[Tensor, "1 m d"]:
        return x.reshape(1, len(x), self.dim).to(torch.float64)


def _pulled(u: Tensor, z: Tensor, units: Float[Tensor, "d ..."]) -> Float[Tensor, "d ..."]:
    """Return the gradient in z of u along each unit; one by one under `detect_anomaly`, which allows no batches."""
    if torch.is_anomaly_enabled():
        return torch.stack([torch.autograd.grad(u, z, one, retain_graph=True)[0] for one in units])
    (jacobian,) = torch.autograd.grad(u, z, units, retain_graph=True, is_grads_batched=True)
    return jacobian


class _Within(nn.Module):
    """A flow inside an affine map; both are in `forward` because `functional_call` replaces weights there alone."""

    def __init__(self, network: FlowNetwork, reach: float) -> None:
        super().__init__()
        self.network, self.reach = network, reach
        self.shift = nn.Parameter(network.mean.new_zeros(network.dim))
        self.mix = nn.Parameter(torch.eye(network.dim, dtype=network.mean.dtype, device=network.mean.device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y, log_q = self.network.carry(z / self.reach)
        mix = self.reach * self.mix.tril()
        return self.shift + y @ mix.mT, log_q - mix.diagonal().abs().log().sum()


class _Law(nn.Module):
    """The law of a user's module: its draws and its log density."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, what: str, given: Any) -> Tensor:
        law: Distribution = law_of(self.module)
        if what == "draw":
            return law.rsample(torch.Size((given,)))
        value: Tensor = law.log_prob(given)
        return value


ModelRows = FlowRows | ModuleRows
"""Models of one shape, whose free weights are the rows of a matrix; `starts` are the weights at the start."""
