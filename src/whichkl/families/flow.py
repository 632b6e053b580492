"""Flow: an invertible network that carries N(0, I) to the data, with an exact density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, TransformedDistribution, constraints, transforms

from whichkl._checks import require
from whichkl.families.field_checks import check_choice, check_whole, check_widths, quoted
from whichkl.families.gaussian import diagonal_gaussian
from whichkl.families.layers import Shape, Standardised, Summary
from whichkl.families.network_family import NetworkFamily
from whichkl.families.regression import Regression
from whichkl.process.lock import PROCESS_LOCK
from whichkl.process.torch_modes import own_defaults

Kind = Literal["spline", "coupling", "maf"]
_SPLINE_EDGE = 5.0
"""Largest distance from the mean that splines reach, in standard deviations."""
_OPTIONAL = ("slope", "tril", "within")
"""Names of the buffers that only some networks have."""


@dataclass(frozen=True)
class Flow(NetworkFamily):
    """q(x) = N(f(x); 0, I) |∂f/∂x|, or q(y|x) with f(y; x), of standardised columns; needs the `flows` extra (zuko).

    Splines act on [−5, 5]. The map is the identity outside, so the tails are those of a normal with the data's standard
    deviation. The flow doesn't follow heavier tails, and they stretch the scale and blur the bulk: transform such columns
    first (a logarithm, or `support="positive"`).

    Args:
        kind: ``"spline"`` (autoregressive rational-quadratic splines), ``"coupling"`` (the same splines on half of the
            columns at a time: draws in two passes, not d) or ``"maf"`` (affine steps: cheaper, and less flexible).
        transforms: the number of maps.
        hidden: widths of the layers of each map's network.
        bins: the number of bins of each spline.

    Raises:
        InputError: a field isn't one of these, or zuko isn't installed.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019); Papamakarios, Pavlakou & Murray (2017).

    >>> Flow(transforms=2).label
    'a spline flow of 2 transforms'
    """

    conditional: ClassVar[bool] = True
    optional_context: ClassVar[bool] = True
    starts_from_regression: ClassVar[bool] = True

    kind: Kind = "spline"
    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8

    def __post_init__(self) -> None:
        check_choice(self, "kind", get_args(Kind))
        check_whole(self, "transforms")
        check_whole(self, "bins")
        check_widths(self)

    @property
    def label(self) -> str:
        """Such as ``"a spline flow of 3 transforms"``."""
        return f"a {self.kind} flow of {self.transforms} transform{'s' * (self.transforms > 1)}"

    def network(self, shape: Shape) -> nn.Module:
        """Build zuko's flow between layers of standardised data."""
        return FlowNetwork(shape, self)

    def wider(self) -> Flow:
        """Return the flow with two more transforms."""
        return replace(self, transforms=self.transforms + 2)

    def remarks(self, summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
        """Name the columns that have rows far beyond the splines."""
        ends = torch.maximum(summary.high - summary.mean, summary.mean - summary.low)
        far = ends > 2 * _SPLINE_EDGE * summary.scale
        heavy = f"column {quoted(names, far)} has rows more than 10 standard deviations out: a flow's tails are those of a normal"
        return (*super().remarks(summary, names), *([heavy] if bool(far.any()) else []))


class FlowNetwork(Standardised):
    """Zuko's flow, and the scale around it: one per column, or a lower triangle if the flow started from a Gaussian.

    With a triangle, the flow carries N(0, s² I) and the triangle is 1/s times as large, so splines that end at five units
    reach 5/s standard deviations of that Gaussian. The flow is then inverted: draws and their log q take one pass, and log q
    of other points takes as many passes as draws take otherwise.

    Given x, the flow starts as the identity around the linear regression of y on x: it is trained on residuals of unit variance,
    so a linear Gaussian law is exact before the first step.

    Source: Kingma et al. (2016) for the inverse.
    """

    slope: Tensor | None
    """(c, d) of the regression on x, in units of y per standard deviation of x."""
    tril: Tensor | None
    within: Tensor | None
    """s, the standard deviation of the normal that the flow carries; 1 by default."""

    def __init__(self, shape: Shape, family: Flow) -> None:
        super().__init__(shape)
        fields = {"transforms": family.transforms, "hidden_features": family.hidden, "activation": nn.SiLU}
        fields |= {"maf": {}, "spline": {"bins": family.bins}, "coupling": {"bins": family.bins, "passes": 2}}[family.kind]
        with own_defaults():
            self.flow = getattr(_flows(), "MAF" if family.kind == "maf" else "NSF")(shape.dim, shape.context, **fields)
        for name in _OPTIONAL:
            self.register_buffer(name, None)

    def settle(self, summary: Summary) -> None:
        """Take the scales of the data, and the regression of y on x where there is one."""
        super().settle(summary)
        start = summary.regression
        if start is not None:
            self.rest()
            self.surround(self.mean + self.scale * start.intercept.to(self.mean), self.scale[:, None] * start.tril.to(self.mean))
            self.slope = start.slope.to(self.mean) * self.scale

    def forward(self, x: Tensor | None = None) -> Distribution:
        """Return the law of y, given x where there are contexts."""
        given = None if x is None else self.standard_context(x)
        with own_defaults():
            base = self.inner() if given is None else self.flow(given)
        loc = self.mean if self.slope is None or given is None else self.mean + Regression.features(given) @ self.slope
        around = AffineTransform(self.mean, self.scale, event_dim=1) if self.tril is None else Triangular(loc, self.tril)
        as_number = [transforms.ReshapeTransform(torch.Size((1,)), torch.Size())] if self.is_scalar and self.dim == 1 else []
        return TransformedDistribution(base, [around, *as_number], validate_args=False)

    def inner(self) -> Distribution:
        """Return the law of the flow's draws, before any map around it."""
        law: Any = self.flow()
        if self.within is None:
            return cast(Distribution, law)
        return cast(Distribution, type(law)(law.transform.inv, self.carried_normal(self.within)))

    def carry(self, z: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
        """Carry draws of N(0, within² I) through the flow, with log q of the results."""
        with own_defaults():
            law: Any = self.flow()
        y, volume = law.transform.call_and_ladj(z)
        return y, self.carried_normal(self.within).log_prob(z) - volume

    def carried_normal(self, scale: Tensor | None) -> Distribution:
        """Return N(0, scale² I)."""
        wide = (torch.ones_like(self.mean[0]) if scale is None else scale).expand(self.dim)
        return diagonal_gaussian(torch.zeros_like(wide), wide)

    def rest(self) -> None:
        """Make the flow the identity: zero the last layer of each transform's network (a single column has no network)."""
        for part in self.flow.transform.transforms:
            for one in part.phi if hasattr(part, "phi") else part.hyper[-1].parameters():
                nn.init.zeros_(one)

    def surround(self, loc: Float[Tensor, " d"], tril: Float[Tensor, "d d"], within: float | None = None) -> None:
        """Carry the flow's draws y to loc + tril y; with `within`, those of the inverted flow of N(0, within² I)."""
        self.mean.copy_(loc)
        self.tril = tril.detach().to(self.mean).clone()
        if within is not None:
            self.scale.fill_(1.0)
            self.within = self.mean.new_tensor(within)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Allocate a triangle and a slope if the weights have them."""
        for name in _OPTIONAL:
            found = state_dict.get(f"{prefix}{name}")
            setattr(self, name, None if found is None else torch.empty_like(found).to(self.mean))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Triangular(transforms.Transform):
    """y ↦ loc + L y, with log|∂x/∂y| = Σ log|Lᵢᵢ|; loc may differ per row of the batch."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Float[Tensor, "... d"], tril: Float[Tensor, "d d"]) -> None:
        super().__init__()
        self.loc, self.tril = loc, tril

    def _call(self, y: Tensor) -> Tensor:
        return self.loc + y @ self.tril.mT

    def _inverse(self, x: Tensor) -> Tensor:
        rows = (x - self.loc).reshape(-1, len(self.tril))
        y: Tensor = torch.linalg.solve_triangular(self.tril, rows.mT, upper=False).mT
        return y.reshape(x.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The same number for every row."""
        return self.tril.diagonal().abs().log().sum().expand(x.shape[:-1])


def _flows() -> Any:
    """Import zuko's flows, and restore torch's checks of arguments, which zuko turns off for the whole process."""
    with PROCESS_LOCK.held():
        checks = Distribution._validate_args
        try:
            return require("zuko", "flows").flows
        finally:
            Distribution.set_default_validate_args(checks)
