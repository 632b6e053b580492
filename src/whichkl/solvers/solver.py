"""Solver: the base class of the algorithms that minimise an objective, and what they return."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.distributions import Distribution, LowRankMultivariateNormal

from whichkl._checks import InputError, as_int, cannot
from whichkl.access import Access
from whichkl.divergences import Estimate
from whichkl.families import Family
from whichkl.objectives import Direction, Objective
from whichkl.printable import brief
from whichkl.samples import Block
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_TIE = 1e-6
"""Nats. An optimum is global if its loss exceeds the least one by at most this."""


@dataclass(frozen=True)
class Optimum:
    """One local optimum: its model, the loss there (in nats, up to the objective's constant) and how it ended."""

    __repr__ = brief

    model: Any
    """A `Distribution`; for a conditional family, a function of contexts that returns one."""
    loss: float
    converged: bool
    is_global: bool
    """Whether no optimum with a lower loss was found; several optima can tie."""


@dataclass(frozen=True)
class Held:
    """Rows in free coordinates, and a model that was fitted without them."""

    block: Block
    model: Any


@dataclass(frozen=True)
class Solution:
    """The result of a solver."""

    __repr__ = brief

    optima: tuple[Optimum, ...]
    """Every distinct optimum, best first."""
    iterations: int
    residual: float
    """Length of the (natural) gradient at the best optimum; 0 for a closed form."""
    node_error: float | None = None
    """Largest shift of a mean, in standard deviations of the model, on more nodes; for mixtures, and for divergences between the
    two KLs, the change of the loss in nats."""
    nodes: int | None = None
    held: Held | None = None
    """The rows that the solver was asked to hold out."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about how the optimum was found, such as a margin that was inferred from the data."""
    history: tuple[float, ...] = ()
    """The loss of the best start after each iteration. A network trained on rows has its least loss on the validation rows so
    far, per round. The loss can rise where nodes were doubled, or where all rows followed a sample of them."""
    doubts: tuple[str, ...] = ()
    """Sentences that state why the value of the best optimum isn't reliable."""
    value: Estimate | None = None
    """The forward KL of the best optimum on unseen points, where the solver found these by p's density."""
    log_z: Estimate | None = None
    """Log of p's normaliser by the same points."""
    corrects_weights: bool = False
    """Whether all rows were used, and the model's own draws corrected for their weights."""
    family: Family | None = None
    """The family that was fitted, where the solver chose what the family leaves to the data."""
    curve: Any = None
    """The losses by which it chose the number of components, if it did."""

    @property
    def best(self) -> Optimum:
        """The optimum with the least loss."""
        return self.optima[0]


class Solver(ABC):
    """One algorithm. A subclass names its direction and its families, and implements `solve`.

    `whichkl.solvers.register` makes a solver available to `fit`.
    """

    name: ClassVar[str]
    direction: ClassVar[Direction]
    families: ClassVar[tuple[type[Family], ...]]
    covariances: ClassVar[tuple[str, ...]] = ()
    """The covariances of Gaussians, alone or in a mixture, that it can fit; empty where `covers` decides otherwise."""
    mode_families: ClassVar[tuple[type[Family], ...]] = ()
    """The families whose fits start from the modes of p."""
    needs_draws: ClassVar[bool] = True
    """Whether a solver of forward KL needs samples or a sampler of p; otherwise log p alone is enough."""
    refits: ClassVar[bool] = True
    """Whether a refit is cheap enough for cross-fitting and for comparing neighbouring families."""
    holds_chains: ClassVar[bool] = False
    """Whether the solver holds out the ends of chains when it is given a stride."""

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Return whether this solver can minimise the objective over the family with this access."""
        is_asked = objective.direction == cls.direction and isinstance(family, cls.families)
        has_draws = access.can_sample or cls.direction != "forward" or not cls.needs_draws
        return is_asked and has_draws and objective.requires.met_by(access) and cls.covers(family, access)

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether the options of a family in `families` are ones that this solver can fit. By default all are.

        A solver with `covariances` can fit Gaussians that have one of these.
        """
        is_gaussian = getattr(family, "law", "gaussian") == "gaussian"
        return not cls.covariances or (is_gaussian and getattr(family, "covariance", None) in cls.covariances)

    def toward(self, objective: Objective) -> Solver:
        """Return the solver of this objective, for a class that solves several; by default itself."""
        return self

    def starts_from_modes(self, family: Family) -> bool:
        """Return whether the fit starts from the modes of p, and therefore from those in `Target.known_modes`."""
        return isinstance(family, self.mode_families)

    def quick(self) -> Solver:
        """Return a cheaper copy, good enough for refits whose answer is compared within its statistical error."""
        return self

    def near(self, model: Any, tolerance: float) -> Solver:
        """Return a solver that starts from a model of this family or a neighbouring one, if it can; by default itself.

        It may leave `tolerance` nats per row.
        """
        return self

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the least number of bytes that a fit in `dim` free coordinates allocates, as far as it is known in advance.

        By default four matrices per full covariance: the model, its factor, and the sums or gradients that they come from.
        """
        components = getattr(family, "components", 1)
        count = components if isinstance(components, int) else 1
        return 32 * count * dim**2 if getattr(family, "covariance", None) == "full" else 0

    @abstractmethod
    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Minimise the objective over the family.

        Args:
            target: p in unconstrained coordinates.
            family: the models that are allowed.
            seed: fixes every random choice.
            work: where passes over the rows run, where progress is reported, and where it is written down.
            stride: above 0, also return a model that was fitted without every `stride`-th row of each part (`Solution.held`).
        """

    def solve_without(self, target: Target, family: Family, left_out: Sequence[Tensor], seed: int) -> list[Any]:
        """Fit again without each of several sets of rows, and return the models.

        By default these are that many fits; a solver that can share work between them overrides this.

        Args:
            target: p in unconstrained coordinates, with rows in memory.
            family: the models that are allowed.
            left_out: the numbers of the rows of each set.
            seed: fixes every random choice.
        """
        return [self.solve(target.without(rows), family, seed).best.model for rows in left_out]


def distinct(optima: list[Optimum], same: float = 0.02) -> tuple[Optimum, ...]:
    """Sort optima by loss, drop those that repeat a better one, and mark the global ones.

    Two models are the same if their means and covariances differ by at most `same` times the spread.
    """
    kept: list[Optimum] = []
    for one in sorted(optima, key=lambda o: (round(o.loss, 9), tuple(o.model.mean.tolist()))):
        if not any(_alike(one.model, other.model, same) for other in kept):
            kept.append(one)
    best = kept[0].loss
    return tuple(Optimum(o.model, o.loss, o.converged, o.loss - best <= _TIE) for o in kept)


def check_counts(solver: Solver, **least: int) -> None:
    """Refuse fields of a solver that aren't whole numbers of at least the given values; None, a default, is allowed."""
    for name, low in least.items():
        value = as_int(getattr(solver, name))
        object.__setattr__(solver, name, value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            because = f"`{name}={value!r}` isn't a whole number of at least {low}"
            raise InputError(cannot(f"use `{type(solver).__name__}`", because, f"Give, say, {name}={max(low, 10)}"))


def check_positive(solver: Solver, *names: str) -> None:
    """Refuse fields of a solver that aren't positive numbers; None, a default, is allowed."""
    for name in names:
        value = getattr(solver, name)
        if value is not None and not 0 < value < math.inf:
            because = f"`{name}={value!r}` isn't a positive number"
            raise InputError(cannot(f"use `{type(solver).__name__}`", because, f"Leave `{name}` out"))


def _alike(a: Distribution, b: Distribution, same: float) -> bool:
    spread = b.variance.sqrt()
    if isinstance(a, LowRankMultivariateNormal) and isinstance(b, LowRankMultivariateNormal):
        sizes = [(one.cov_factor.T / b.variance) @ two.cov_factor for one, two in ((a, a), (b, b), (a, b))]
        off = sizes[0].square().sum() + sizes[1].square().sum() - 2 * sizes[2].square().sum()
        if float(off) > (2 * same) ** 2 * len(spread):
            return False
    elif hasattr(a, "covariance_matrix") and hasattr(b, "covariance_matrix"):
        off = (a.covariance_matrix - b.covariance_matrix).abs() / (spread[:, None] * spread)
        if bool((off > 2 * same).any()):
            return False
    near = ((a.mean - b.mean).abs() <= same * spread).all() and ((a.variance.sqrt() - spread).abs() <= same * spread).all()
    return bool(near)
