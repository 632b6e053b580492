"""Flow: an invertible network that carries N(0, I) to the data, with an exact density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution, TransformedDistribution

from whichkl._checks import InputError, cannot, require
from whichkl.families.data_shape import Shape, Summary
from whichkl.families.layers import Standardised, check_count, check_widths
from whichkl.families.network_family import NetworkFamily
from whichkl.families.network_model import Scalar

Kind = Literal["spline", "coupling", "maf"]
_EDGE = 5.0
"""Standard deviations from the mean, beyond which splines end."""


@dataclass(frozen=True)
class Flow(NetworkFamily):
    """q(x) = N(f(x); 0, I) |∂f/∂x|, or q(y|x) with f(y; x), of standardised columns; needs the `flows` extra (zuko).

    Splines live on [−5, 5]; beyond, the map is the identity, so that the tails are those of a normal with the data's
    standard deviation. Heavier tails aren't followed, and stretch the scale at the bulk's cost: transform such columns first
    (a logarithm, or `support="positive"`).

    Args:
        kind: ``"spline"`` (autoregressive rational-quadratic splines), ``"coupling"`` (the same splines on half of the
            columns at a time: draws in two passes, not d) or ``"maf"`` (affine steps: cheaper, and less flexible).
        transforms: how many maps follow each other.
        hidden: widths of the layers of each one's network.
        bins: of each spline.

    Raises:
        InputError: a field isn't one of these, or zuko isn't installed.

    Source: Durkan, Bekasov, Murray & Papamakarios (2019); Papamakarios, Pavlakou & Murray (2017).

    >>> Flow(transforms=2).label
    'a spline flow of 2 transforms'
    """

    conditional: ClassVar[bool] = True
    optional_context: ClassVar[bool] = True

    kind: Kind = "spline"
    transforms: int = 3
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.kind not in get_args(Kind):
            because = f"`kind={self.kind!r}` is none of {', '.join(get_args(Kind))}"
            raise InputError(cannot("use `Flow`", because, "Use kind='spline'"))
        check_count("Flow", "transforms", self.transforms)
        check_count("Flow", "bins", self.bins)
        object.__setattr__(self, "hidden", check_widths("Flow", self.hidden))

    @property
    def label(self) -> str:
        """Such as ``"a spline flow of 3 transforms"``."""
        return f"a {self.kind} flow of {self.transforms} transform{'s' * (self.transforms > 1)}"

    def network(self, shape: Shape) -> nn.Module:
        """Build zuko's flow between layers of standardised data."""
        return _Network(shape, self)

    def wider(self) -> Flow:
        """Return the flow with two transforms more."""
        return replace(self, transforms=self.transforms + 2)

    def remarks(self, summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
        """Say which columns have rows beyond the splines."""
        ends = torch.maximum(summary.high - summary.mean, summary.mean - summary.low)
        far = (ends > 2 * _EDGE * summary.scale).nonzero().flatten().tolist()
        heavy = ", ".join(f"`{names[i]}`" for i in far)
        note = (f"column {heavy} has rows more than 10 standard deviations out: a flow's tails are those of a normal",)
        return (*super().remarks(summary, names), *(note if far else ()))


class _Network(Standardised):
    """Zuko's flow, and the data's scale around it."""

    def __init__(self, shape: Shape, family: Flow) -> None:
        super().__init__(shape)
        flows = _flows()
        fields = {"transforms": family.transforms, "hidden_features": family.hidden, "activation": nn.SiLU}
        if family.kind != "maf":
            fields["bins"] = family.bins
        if family.kind == "coupling":
            fields["passes"] = 2
        kind = flows.MAF if family.kind == "maf" else flows.NSF
        self.flow = kind(shape.dim, shape.context, **fields)

    def forward(self, x: Tensor | None = None) -> Distribution:
        """Return the law of y, given x where there are contexts."""
        base = self.flow() if x is None else self.flow(self.standard_context(x))
        law = TransformedDistribution(base, [AffineTransform(self.mean, self.scale, event_dim=1)], validate_args=False)
        return Scalar(law) if self.is_scalar and self.dim == 1 else law


def _flows() -> Any:
    """Import zuko's flows, and leave torch's checks of arguments on, which zuko turns off for everybody."""
    checks = Distribution._validate_args
    try:
        return require("zuko", "flows").flows
    finally:
        Distribution.set_default_validate_args(checks)
