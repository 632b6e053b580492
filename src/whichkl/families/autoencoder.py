"""Autoencoder: a latent variable and a network that turns it into data, trained on a lower bound of the likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from whichkl.families.field_checks import check_choice, check_whole, check_widths
from whichkl.families.layers import Shape, Standardised, Summary, perceptron
from whichkl.families.network_family import MAX_CATEGORIES, NetworkFamily

Likelihood = Literal["bernoulli", "normal", "categorical"]

_DRAWS = 128
"""Number of draws of the latent variable per log density."""
_MIN_NOISE = 1e-3
"""Least standard deviation of a normal likelihood, as a share of the column's."""
_MAX_NUMBERS_PER_BLOCK = 2**20
"""Largest number of coordinates of draws in memory at once."""


@dataclass(frozen=True)
class VariationalAutoencoder(NetworkFamily):
    """q(x) = ∫ N(z; 0, I) q(x|z) dz, which has no formula: its `log_prob` is a lower bound, and the fit reports it.

    Trained on the ELBO, E_r[log q(x, z) − log r(z|x)] with a Gaussian encoder r. A fitted model's `log_prob(x)` is the
    tighter log (1/K) Σₖ q(x, zₖ) / r(zₖ|x) with K = 128 draws, which depend only on the row x. In expectation over draws it
    is at most log q(x), so a cross-entropy is an upper bound.

    Args:
        latent: coordinates of z.
        hidden: widths of both networks' layers; () makes them linear.
        likelihood: ``"normal"`` (one standard deviation per column, at least 0.1 % of the data's), ``"bernoulli"`` (columns of
            0 and 1) or ``"categorical"`` (columns of whole numbers 0 … Kⱼ − 1); columns are independent given z.

    Raises:
        InputError: a field isn't one of these.

    Source: Kingma & Welling (2014); the tighter bound, Burda, Grosse & Salakhutdinov (2016).

    >>> VariationalAutoencoder(latent=2, likelihood="bernoulli").label
    'a variational autoencoder with 2 latent coordinates'
    """

    latent: int = 8
    hidden: tuple[int, ...] = (64, 64)
    likelihood: Likelihood = "normal"

    def __post_init__(self) -> None:
        """Check the fields; a discrete likelihood brings its own support."""
        check_whole(self, "latent")
        check_widths(self)
        check_choice(self, "likelihood", get_args(Likelihood))
        object.__setattr__(self, "carried", self.likelihood == "normal")

    @property
    def label(self) -> str:
        """Such as ``"a variational autoencoder with 8 latent coordinates"``."""
        return f"a variational autoencoder with {self.latent} latent coordinate{'s' * (self.latent > 1)}"

    @property
    def max_value(self) -> int | None:
        """The largest value that the likelihood has a probability for."""
        most = {"bernoulli": 1, "categorical": MAX_CATEGORIES - 1}
        return most.get(self.likelihood)

    def shape(self, summary: Summary, scalar: bool) -> Shape:
        """Count the categories of each column, if there are any."""
        counts = summary.categories if self.likelihood == "categorical" else ()
        return Shape(len(summary.mean), 0, False, counts)

    def network(self, shape: Shape) -> nn.Module:
        """Build encoder and decoder."""
        return _Network(shape, self)

    def loss(self, model: Any, x: Tensor, context: Tensor | None, generator: torch.Generator) -> Float[Tensor, " n"]:
        """Return −ELBO of each row, by one draw of z."""
        noise = torch.randn(1, len(x), self.latent, generator=generator, dtype=torch.float64, device="cpu").to(x)
        ratio: Tensor = model.module.log_ratio(x, noise)[0]
        return -ratio

    def remarks(self, summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
        """State that the value is a bound."""
        bound = f"its value is a bound: log q is at least `log_prob` ({_DRAWS} importance-weighted draws per row)"
        return (bound, *super().remarks(summary, names))


class _Network(Standardised):
    """An encoder to N(m(x), diag s²(x)) and a decoder to the parameters of q(x|z)."""

    is_bound: ClassVar[bool] = True

    def __init__(self, shape: Shape, family: VariationalAutoencoder) -> None:
        super().__init__(shape, scales_y=family.likelihood == "normal")
        self.kind, self.latent = family.likelihood, family.latent
        self.counts = shape.categories or (1,) * shape.dim
        self.encoder = perceptron(sum(self.counts), family.hidden, 2 * family.latent)
        self.decoder = perceptron(family.latent, tuple(reversed(family.hidden)), sum(self.counts))
        self.noise = nn.Parameter(torch.zeros(shape.dim, dtype=torch.float32, device="cpu"))

    def forward(self) -> Distribution:
        """Return the law of x."""
        return Latent(self)

    def log_ratio(self, x: Float[Tensor, "n d"], noise: Float[Tensor, "k n l"]) -> Float[Tensor, "k n"]:
        """Return log q(x, z) − log r(z|x) at z = m(x) + s(x) · noise."""
        inputs = self.standard(x)
        if self.kind == "categorical":
            hot = [nn.functional.one_hot(one.long(), k) for one, k in zip(x.unbind(-1), self.counts, strict=True)]
            inputs = torch.cat(hot, -1).to(self.mean)
        centre, log_spread = self.encoder(inputs).chunk(2, -1)
        log_spread = 6 * torch.tanh(log_spread / 6)
        z = centre + log_spread.exp() * noise
        apart = (noise.square() - z.square()).sum(-1) / 2 + log_spread.sum(-1)
        ratio: Tensor = self.likelihood(x, self.decoder(z)) + apart
        return ratio

    def likelihood(self, x: Float[Tensor, "n d"], out: Float[Tensor, "k n p"]) -> Float[Tensor, "k n"]:
        """Return log q(x|z) for the decoder's outputs."""
        if self.kind == "normal":
            sigma = self.sigma()
            white = (self.standard(x) - out) / sigma
            return -(white.square() / 2 + sigma.log() + self.scale.log() + math.log(2 * math.pi) / 2).sum(-1)
        if self.kind == "bernoulli":
            signed = out * (2 * x - 1)
            return nn.functional.logsigmoid(signed).sum(-1)
        logs = [one.log_softmax(-1) for one in out.split(self.counts, -1)]
        picked = [one.gather(-1, x[:, j, None].long().expand(*one.shape[:-1], 1))[..., 0] for j, one in enumerate(logs)]
        return torch.stack(picked, -1).sum(-1)

    def sigma(self) -> Float[Tensor, " d"]:
        """The standard deviations of a normal likelihood, in units of the data's."""
        return _MIN_NOISE + nn.functional.softplus(self.noise)

    def draw(self, z: Float[Tensor, "m l"]) -> Float[Tensor, "m d"]:
        """Draw x given z."""
        out = self.decoder(z)
        if self.kind == "normal":
            drawn: Tensor = self.mean + self.scale * (out + self.sigma() * torch.randn_like(out))
            return drawn
        if self.kind == "bernoulli":
            return torch.bernoulli(torch.sigmoid(out))
        logs = out.split(self.counts, -1)
        return torch.cat([torch.multinomial(one.softmax(-1), 1) for one in logs], -1).to(self.mean)


class Latent(Distribution):
    """The law of x under a latent variable; `log_prob` is a lower bound of its log density."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, network: _Network) -> None:
        self.network = network
        super().__init__(Size(()), Size((network.dim,)), validate_args=False)

    @property
    def support(self) -> Any:
        """Where the likelihood has its mass."""
        if self.network.kind == "normal":
            return constraints.real_vector
        return constraints.independent(constraints.integer_interval(0, max(max(self.network.counts), 2) - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log (1/K) Σₖ q(x, zₖ)/r(zₖ|x), at most log q(x) in expectation; −∞ outside the support."""
        rows = value.reshape(-1, self.network.dim)
        inside = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if self.network.kind != "normal":
            counts = self.network.counts if self.network.kind == "categorical" else (2,) * self.network.dim
            most = torch.tensor(counts, dtype=torch.int64, device=rows.device)
            inside = ((rows >= 0) & (rows < most) & (rows == rows.floor())).all(-1)
        safe = torch.where(inside[:, None], rows, torch.zeros_like(rows))
        step = max(1, _MAX_NUMBERS_PER_BLOCK // (_DRAWS * max(self.network.dim, self.network.latent)))
        bound = torch.cat([self._bound(one) for one in safe.split(step)]) if len(safe) else safe.sum(-1)
        return torch.where(inside, bound, torch.full_like(bound, -math.inf)).reshape(value.shape[:-1])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z, and x given z."""
        size = Size(sample_shape)
        with torch.no_grad():
            z = torch.randn(size.numel(), self.network.latent, dtype=self.network.mean.dtype, device=self.network.mean.device)
            return self.network.draw(z).reshape(*size, self.network.dim)

    def _bound(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        noise = noise_of(rows.detach(), _DRAWS, self.network.latent)
        return self.network.log_ratio(rows, noise.to(rows)).logsumexp(0) - math.log(_DRAWS)


def noise_of(rows: Float[Tensor, "n d"], draws: int, latent: int) -> Float[Tensor, "k n l"]:
    """Return standard normal numbers that depend only on the bits of each row, so a row's density is the same in any batch.

    A hash of the row and of a counter (Steele, Lea & Flood, 2014) gives uniform numbers; their normal quantiles are returned.
    """
    bits = (rows.to(torch.float64) + 0.0).contiguous().view(torch.int64)
    key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for column in bits.unbind(-1):
        key = _mixed(key * 31 + column)
    counter = torch.arange(1, draws * latent + 1, device=rows.device).reshape(draws, 1, latent)
    hashed = _mixed(_mixed(key[:, None]) + counter * -7046029254386353131)
    uniform = (((hashed >> 11) & (2**53 - 1)).to(torch.float64) + 0.5) / 2**53
    normal: Tensor = torch.special.ndtri(uniform)
    return normal


def _mixed(number: Tensor) -> Tensor:
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        number = (number ^ ((number >> shift) & (2 ** (64 - shift) - 1))) * factor
    return number ^ ((number >> 31) & (2**33 - 1))
