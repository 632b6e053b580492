"""Solver: how the minimum of an objective is found; each declares what it solves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.distributions import Distribution, LowRankMultivariateNormal

from whichkl.access import Access
from whichkl.families import Family
from whichkl.objectives import Direction, Objective
from whichkl.samples import Block
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target


@dataclass(frozen=True)
class Optimum:
    """One local optimum: its model, the loss there (in nats, up to the objective's constant) and how it ended."""

    model: Any
    """A `Distribution`; of a conditional family, a function of contexts that returns one."""
    loss: float
    converged: bool
    is_global: bool
    """Whether no other optimum that was found is better (several can tie)."""


@dataclass(frozen=True)
class Held:
    """Rows in free coordinates, and a model that was fitted without them."""

    block: Block
    model: Any


@dataclass(frozen=True)
class Solution:
    """What a solver returns; `optima` holds every distinct one that was found, best first."""

    optima: tuple[Optimum, ...]
    iterations: int
    residual: float
    """Size of the (natural) gradient at the best optimum; 0 for a closed form."""
    node_error: float | None = None
    """Largest shift of a mean, in model standard deviations, when the nodes are doubled."""
    nodes: int | None = None
    held: Held | None = None
    """What was held out, where the solver was asked to."""
    notes: tuple[str, ...] = ()
    """What the user should know of how it was found, such as a margin inferred from the data."""
    history: tuple[float, ...] = ()
    """The loss of the best start after each iteration, where the solver has it at hand; of a network trained on rows the least so
    far on those set aside, round by round. It may rise where nodes were doubled, or where all rows followed some."""

    @property
    def best(self) -> Optimum:
        """The optimum with the least loss."""
        return self.optima[0]


class Solver(ABC):
    """One algorithm; `solves` says for which objective and families."""

    name: ClassVar[str]
    refits: ClassVar[bool] = True
    """Whether refitting is cheap enough for cross-fitting and for comparing neighbouring families."""
    holds_chains: ClassVar[bool] = False
    """Whether it leaves out the ends of chains where it's given a stride."""
    direction: ClassVar[Direction]
    families: ClassVar[tuple[type[Family], ...]]

    @classmethod
    def solves(cls, objective: Objective, family: Family, access: Access) -> bool:
        """Whether this solver can do the job."""
        return objective.direction == cls.direction and isinstance(family, cls.families)

    def toward(self, objective: Objective) -> Solver:
        """Return the solver of this very objective, where the class solves several; itself unless said."""
        return self

    def starts_from_modes(self, family: Family) -> bool:
        """Whether it starts from the modes of p, and so from those in `Target.known_modes`."""
        return False

    def quick(self) -> Solver:
        """Return a cheaper copy, good enough for refits whose answer is compared within its statistical error."""
        return self

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes that a fit in `dim` free coordinates allocates at least, as far as they are known before it begins.

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
            family: which models are allowed.
            seed: fixes every random choice.
            work: where passes over the rows run, whom to tell, and where to write down what is done.
            stride: above 0, also give a model fitted without every `stride`-th row of each part (`Solution.held`).
        """


def distinct(optima: list[Optimum], same: float = 0.02, tie: float = 1e-6) -> tuple[Optimum, ...]:
    """Sort optima by loss, drop those that repeat a better one, and mark the global ones.

    Two models are the same where mean and covariance agree to `same` of the spread; a tie in loss is within `tie` nats.
    """
    kept: list[Optimum] = []
    for one in sorted(optima, key=lambda o: (round(o.loss, 9), tuple(o.model.mean.tolist()))):
        if not any(_alike(one.model, other.model, same) for other in kept):
            kept.append(one)
    best = kept[0].loss
    return tuple(Optimum(o.model, o.loss, o.converged, o.loss - best <= tie) for o in kept)


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
