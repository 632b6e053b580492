"""Reparameterised draws of several models at once, differentiable in their weights, which are the rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call

from whichkl.families.flow import FlowNetwork
from whichkl.families.network_family import law_of
from whichkl.process.seeds import seeded
from whichkl.process.threads import one_thread
from whichkl.solvers.descent import Flat


class FlowRows:
    """Flows within Gaussians: x = loc + L u, u = s + M f⁻¹(z / r), with s, M and f free, and u = z at the start, where M = r I.

    All of them run as one batch (`torch.func.vmap`), in the coordinates u.

    Args:
        build: returns a flow with random weights.
        seeds: one seed per flow.
        locs: means of the Gaussians.
        trils: Cholesky factors of the Gaussians.
        reach: r; a flow's splines end at 5 r standard deviations of the Gaussian.
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
    """One module of a user, from its own weights. Nothing is assumed about it, so nothing is batched.

    Args:
        module: a copy whose weights may be overwritten.
        dim: number of columns of its draws.
    """

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


ModelRows = FlowRows | ModuleRows
"""Models of one shape, whose free weights are the rows of a matrix; `starts` are the weights at the start."""


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
