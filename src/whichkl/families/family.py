"""Family: what every set of models offers to the solvers, and what parameters a model can have; how a fit is found isn't here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Distribution, constraints

from whichkl._checks import InputError, IntegrityError, RowError, cannot
from whichkl.arrays import or_transposed
from whichkl.distributions import log_prob_of_rows
from whichkl.families.field_checks import quoted

_MAX_COUNT = 10_000
"""Largest number in a family's configuration that isn't the size of a stored tensor, such as layers and bins."""
_MAX_UNIT_ERROR = 1e-5
"""Largest error of the sum of probabilities, per category; float32 rounds by this much over some hundred categories."""


def _is_simplex(value: Tensor) -> bool:
    if not value.numel():
        return False
    if value.ndim == 0:
        return bool(0 <= value <= 1)
    return bool((value >= 0).all() and ((value.sum(-1) - 1).abs() <= _MAX_UNIT_ERROR * value.shape[-1]).all())


def _default(field: Field[Any]) -> Any:
    """The default of a field; a list or a dict, which no family has, would be made."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


_RANGES: dict[str, tuple[str, Callable[[Tensor], bool]]] = {
    "probs": ("holds no probabilities", _is_simplex),
    "scale_tril": ("is no Cholesky factor", lambda value: bool(constraints.lower_cholesky.check(value).all())),
    "rate": ("is negative", lambda value: bool((value >= 0).all())),
    **{
        name: ("isn't positive", lambda value: bool((value > 0).all()))
        for name in ("scale", "cov_diag", "df", "concentration", "concentration0", "concentration1")
    },
}


class Family(ABC):
    """An immutable description of a set of models; a model is a `torch.distributions.Distribution`.

    A conditional family's model is a function of (n, c) contexts that returns a `Distribution` with n rows.
    A concrete family is a frozen dataclass, so its fields are its configuration.
    """

    kinds: ClassVar[dict[str, type[Family]]] = {}
    carried: ClassVar[bool] = True
    """Whether its models live on ℝᵈ and a bijection carries them into the target's support; else they have their own."""
    conditional: ClassVar[bool] = False
    """Whether its models can be q(y|x), for targets of pairs (x, y)."""
    optional_context: ClassVar[bool] = False
    """Whether a conditional family also has models without x."""

    def __init_subclass__(cls) -> None:
        """Register a family under its class name, by which a saved fit names it."""
        Family.kinds[cls.__name__] = cls

    def __str__(self) -> str:
        """The shortest call that makes this family, as it's typed."""
        given = [one for one in fields(self) if one.init]  # type: ignore[arg-type]
        other = {one.name: repr(getattr(self, one.name)) for one in given if getattr(self, one.name) != _default(one)}
        first = [other.pop(given[0].name)] if given and given[0].name in other else []
        return f"{type(self).__name__}({', '.join([*first, *(f'{name}={value}' for name, value in other.items())])})"

    @property
    @abstractmethod
    def label(self) -> str:
        """A short description of the family, for titles and sentences."""

    @abstractmethod
    def parameters(self, model: Distribution) -> dict[str, Tensor]:
        """Return the model's parameters by name, in their natural form."""

    @abstractmethod
    def model(self, parameters: Mapping[str, Tensor]) -> Distribution:
        """Build the model with these parameters."""

    @abstractmethod
    def minimum_rows(self, dim: int) -> int:
        """Return the smallest number of distinct samples that determine a model of this family."""

    def check_samples(self, x: Float[Tensor, "n d"], names: Sequence[str]) -> None:
        """Refuse samples that make this family's likelihood unbounded.

        Raises:
            InputError: too few rows, or a constant column.
        """
        self.check_count(len(x), x.shape[1])
        self.refuse_constant((x == x[:1]).all(0), names)

    def check_count(self, rows: int, dim: int) -> None:
        """Refuse fewer rows than `minimum_rows`."""
        needed = self.minimum_rows(dim)
        if rows < needed:
            because = f"it needs at least {needed} rows in dimension {dim}, and there are {rows}"
            self.refuse(because, f"Give more samples, or a smaller family{or_transposed(rows, dim)}")

    def refuse(self, because: str, instead: str, row: int | None = None) -> NoReturn:
        """Refuse what can't be fitted, with an `InputError` that names this family, because of one row if it's given."""
        message = cannot(f"fit `{self}`", because, instead)
        if row is None:
            raise InputError(message)
        error = RowError(message)
        error.row = row
        raise error

    def with_categories(self, counts: Sequence[int | None], names: Sequence[str]) -> Family:
        """Return this family for columns of which some hold categories; most families refuse them.

        Args:
            counts: the number of categories of each column; None for a column of numbers.
            names: the columns' names.

        Raises:
            InputError: the family takes codes of categories as numbers.
        """
        which = [f"`{name}`" for name, count in zip(names, counts, strict=True) if count is not None]
        hold = "hold" if len(which) > 1 else "holds"
        self.refuse(f"its columns are numbers, and {', '.join(which)} {hold} categories", "Use `product`, or drop the categories")

    def refuse_constant(self, is_constant: Bool[Tensor, " d"], names: Sequence[str]) -> None:
        """Refuse columns whose values are all the same."""
        if bool(is_constant.any()):
            which, is_one = quoted(names, is_constant), int(is_constant.sum()) == 1
            because = f"column {which} is constant, so its" if is_one else f"columns {which} are constant, so their"
            self.refuse(f"{because} density is unbounded", f"Drop the column{'' if is_one else 's'}")

    def config(self) -> dict[str, Any]:
        """Return the class name and the fields, as JSON can hold them."""
        return {"family": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


class MomentFamily(Family):
    """A family whose maximum likelihood follows from sums over the rows, such as an exponential family."""

    @abstractmethod
    def statistics(
        self,
        x: Float[Tensor, "m d"],
        w: Float[Tensor, " m"],
        origin: Float[Tensor, " d"],
        context: Float[Tensor, "m c"] | None = None,
        *,
        overwrite: bool = False,
        total: Float[Tensor, " d"] | None = None,
    ) -> dict[str, Tensor]:
        """Return sums over these rows in float64, which can be added over blocks.

        Args:
            x: the rows.
            w: their weights.
            origin: a point near the rows, the same for all blocks; sums of powers about it lose no digits.
            context: the rows of x of a conditional family, else None.
            overwrite: whether x may be overwritten.
            total: the column sums of x, if the reader has them, all weights are 1 and the origin is 0.
        """

    def origin(self, x: Float[Tensor, "m d"]) -> Float[Tensor, " d"]:
        """Return a point near all rows, from some of them: the first."""
        return x[0].clone()

    @abstractmethod
    def from_statistics(self, sums: Mapping[str, Tensor], origin: Float[Tensor, " d"], names: Sequence[str]) -> Any:
        """Return the model of maximum likelihood.

        Raises:
            InputError: the likelihood has no maximum: too few rows, a constant column, a singular covariance.
        """


def family_from_config(config: Mapping[str, Any]) -> Family:
    """Build a family from what `Family.config` returned.

    Raises:
        IntegrityError: the name or a field isn't known.
    """
    fields = dict(config)
    kind = Family.kinds.get(str(fields.pop("family", "")))
    try:
        if kind is None:
            raise TypeError(f"no family is called {config.get('family')!r}")
        return kind(**fields)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise IntegrityError(cannot("rebuild the family", str(error), "Load it with the version that wrote it")) from error


def log_likelihood(model: Any, x: Float[Tensor, "n d"], context: Float[Tensor, "n c"] | None = None) -> Float[Tensor, " n"]:
    """Return log q(x) of each row, or log q(y|x) where the model is conditional and `context` holds the x's.

    Raises:
        InputError: the model's `log_prob` isn't one number per row.
    """
    law, rows = (model, x) if context is None else (model(context), x)
    if context is not None and law.batch_shape == () and len(x) != 1:  # a model that ignores x, as a baseline may
        law = law.expand((len(x),))
    if context is not None and len(law.event_shape) == 0 and x.shape[1] == 1:
        rows = x[:, 0]
    try:
        value = log_prob_of_rows(law, rows)
    except ValueError as error:
        because = f"its `log_prob` refuses them ({' '.join(str(error).split())[:200]})"
        raise InputError(cannot("evaluate the model on these samples", because, "Check their columns and support")) from error
    if tuple(value.shape) != (len(x),):
        shapes = f"batch shape {tuple(law.batch_shape)} and event shape {tuple(law.event_shape)}"
        because = f"its distribution has {shapes}, and `log_prob` of {tuple(x.shape)} rows has shape {tuple(value.shape)}"
        instead = f"Return one event a row: torch.distributions.Independent(law, 1) with event shape ({x.shape[1]},)"
        raise InputError(cannot("use this model", because, instead))
    return value


def cast(family: Family, model: Distribution, like: torch.dtype, device: torch.device) -> Distribution:
    """Return the same model with its floating parameters in another dtype, and all parameters on another device."""
    moved = {
        name: value.detach().to(dtype=like if value.is_floating_point() else value.dtype, device=device)
        for name, value in family.parameters(model).items()
    }
    return family.model(moved)


def check_parameters(parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse parameters that no model has: NaN, a scale below 0, probabilities that sum to 2, shapes that contradict each other.

    Raises:
        ValueError: a parameter is wrong; the message names it.
    """
    if not parameters:
        raise ValueError("an optimum has no parameters")
    for name, value in parameters.items():
        if value.is_complex() or (value.is_floating_point() and not bool(value.isfinite().all())):
            raise ValueError(f"the parameter `{name[:80]}` isn't finite")
        why, holds = _RANGES.get(name.rpartition(".")[2], ("", lambda _: True))
        if not name.startswith("module.") and not holds(value):
            raise ValueError(f"the parameter `{name[:80]}` {why}")
    for name, shape in _shapes(parameters).items():
        if name in parameters and tuple(parameters[name].shape) != shape:
            raise ValueError(f"the parameter `{name}` has shape {tuple(parameters[name].shape)}, not {shape}")
    _check_counts(parameters, config)


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that follow from a location (…, d), or from a matrix of weights (k, c)."""
    if (loc := parameters.get("loc")) is not None:
        *batch, dim = tuple(loc.shape) or (0,)
        one: dict[str, tuple[int, ...]] = {"scale": (*batch, dim), "scale_tril": (*batch, dim, dim), "cov_diag": (dim,)}
        factor = parameters.get("cov_factor")
        rank = 0 if factor is None or factor.ndim < 2 else factor.shape[-1]
        return {**one, "df": tuple(batch), "probs": tuple(batch), "cov_factor": (dim, max(1, rank))}
    if (weight := parameters.get("weight")) is not None:
        rows = weight.shape[0] if weight.ndim == 2 else -1
        return {"bias": (rows,), "scale_tril": (rows, rows)}
    return {}


def _check_counts(parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse sizes that no stored tensor has: building such a network would fill the memory before its weights are compared."""
    largest = max([_MAX_COUNT, *(size for value in parameters.values() for size in value.shape)])
    numbers = [one for value in config.values() for one in (value if isinstance(value, (list, tuple)) else [value])]
    shape = parameters.get("shape", torch.zeros(0, dtype=torch.int64, device="cpu"))
    for one in [*numbers, *shape.flatten().tolist()]:
        if isinstance(one, (int, float)) and not -largest <= one <= largest:
            raise ValueError(f"the family's configuration holds {one:.6g}, a size that none of its weights has")
