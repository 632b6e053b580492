"""EM: maximum likelihood for mixtures and Student-t, several k-means++ starts in one batch, exact on any number of rows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Family, Mixture, StudentT
from whichkl.families.mixture import mixture
from whichkl.families.student_t import MultivariateStudentT
from whichkl.files.journal import tensors_behind
from whichkl.objectives import Direction
from whichkl.samples import Block
from whichkl.samples.stream import slices
from whichkl.solvers.rows.em_acceleration import cycle
from whichkl.solvers.rows.em_expectation import Expectation, State, Sums, maximize
from whichkl.solvers.rows.em_initialization import seed_states
from whichkl.solvers.rows.em_split_merge import rearranged
from whichkl.solvers.rows.points import is_exact
from whichkl.solvers.rows.rows import Rows, mean_log_likelihood, rows_of, thinned
from whichkl.solvers.solver import Held, Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

_FLOOR = 1e-6
_SHORT, _TRIED = 21, 12
_MOVED = 8_000
"""Splits and mergers are compared on about so many rows."""
_ENOUGH = 0.1
_COARSE = 1e-5
_OFTEN = 2.0
_AT_THE_FLOOR = (
    "a component's covariance lies at its floor: rows repeat, or columns depend on each other, so that the likelihood has no "
    "maximum and the floor sets the value"
)
_SAMPLE = 30_000
"""The starts are tried on at most so many rows; the best goes on with all."""


@dataclass(frozen=True)
class ExpectationMaximization(Solver):
    """argmin KL(p‖q) over mixtures: responsibilities, then weighted moments, until the likelihood stays.

    Every covariance is kept above a floor of 1e-6 times the data's variances plus δ²/12, δ the step in which a column was
    recorded, so that no component can collapse onto a point, or onto a line of rounded values. All starts run as one batch on
    at most 30,000 rows, the better two to the end; components of the best are split and merged while that helps; where there
    are more rows, the best goes on with all of them, in passes whose sums are exact, in single precision while that is enough
    and in double at the end. SQUAREM leaps make it some times faster. It stops when two cycles in a row gain less than a
    hundredth of a nat over all rows (over 30,000 where there are more; on a quadrature rule 1e-10 nats in the mean).

    Source: Dempster, Laird & Rubin (1977); Student-t, Liu & Rubin (1995); starts, Arthur & Vassilvitskii (2007), Biernacki,
    Celeux & Govaert (2003); leaps, Varadhan & Roland (2008); splits and mergers, Ueda et al. (2000).
    """

    name: ClassVar[str] = "em"
    direction: ClassVar[Direction] = "forward"
    families: ClassVar[tuple[type[Family], ...]] = (Mixture, StudentT)

    starts: int = 5
    tolerance: float = 1e-9
    max_iterations: int = 500
    moves: bool = True
    """Whether components are split and merged where that helps."""

    def quick(self) -> ExpectationMaximization:
        """Two starts and 1e-5 nats a row: far below the error of a held-out mean."""
        return replace(self, starts=min(2, self.starts), tolerance=1e-5, max_iterations=200, moves=False)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run EM from every start and keep the distinct optima."""
        return self.run(rows_of(target, seed, work.workers), family, seed, work, stride, exact=is_exact(target))

    def run(self, rows: Rows, family: Family, seed: int, work: Work = QUIET, stride: int = 0, *, exact: bool = False) -> Solution:
        """Run EM on rows: the starts on a sample of them, the best on all."""
        fitted = replace(rows, stride=stride)
        sample, count = thinned(fitted, _SAMPLE)
        frame = Frame.of(sample, family)
        few = Rows(slices(sample), rows.names, None, rows.workers, evaluations=rows.evaluations)
        whole = count <= len(sample)
        tolerance = self.tolerance if exact else max(self.tolerance, _ENOUGH / min(count, _SAMPLE))
        first = seed_states(frame.standard(sample.x), sample.w, self.starts, frame.count, seed, is_student=frame.is_student)
        near = tolerance if whole else _COARSE
        climb = replace(self, max_iterations=_SHORT)._climb(few, frame, first, near, work, "starts")
        iterations, state = climb.iterations, climb.state.take(climb.likelihood.topk(min(2, self.starts)).indices)
        history = climb.history
        if self.moves and frame.count > 2:
            fewer = sample.take(torch.arange(0, len(sample), max(1, len(sample) // _MOVED), device="cpu"))
            less = replace(few, parts=slices(fewer))
            better, more = self._rearrange(less, frame, climb.best, work)
            iterations += more
            state = better if self.starts == 1 else better.beside(state.take(torch.tensor([0], dtype=torch.int64, device="cpu")))
        climb = self._climb(few, frame, state, near, work, "a sample" if not whole else "the best starts")
        iterations += climb.iterations
        history += climb.history
        if not whole:
            climb = self._climb(fitted, frame, climb.best, tolerance, work, "all rows")
            iterations += climb.iterations
            history += climb.history
        held = None
        if stride:
            held = Held(replace(fitted, held=True).gather(), frame.model(climb.best, 0))
            climb = self._climb(rows, frame, climb.best, tolerance, work, "held-out rows too")
            iterations += climb.iterations
            history += climb.history
        optima = []
        for i in range(len(climb.likelihood)):
            model = frame.model(climb.state, i)
            loss = -mean_log_likelihood(model, rows) if whole else frame.loss(climb.likelihood[i])
            optima.append(Optimum(model, loss, climb.small == 2, False))
        ordered = distinct(optima)
        notes = (_AT_THE_FLOOR,) if frame.is_at_floor(climb.best) else ()
        return Solution(ordered, iterations, climb.gain, held=held, notes=notes, history=history)

    def _rearrange(self, rows: Rows, frame: Frame, here: State, work: Work) -> tuple[State, int]:
        """Split and merge components, as long as a few iterations from there end higher than as many from here."""
        iterations, short = 0, replace(self, max_iterations=_TRIED)
        for _ in range(frame.count):
            others = rearranged(here)
            if others is None:
                break
            tried = short._climb(rows, frame, here.beside(others), _COARSE, work.quiet(), "other places")
            iterations += tried.iterations
            work.tell("EM, components rearranged", math.nan)
            best = tried.likelihood.argmax()
            here = tried.best
            if int(best) == 0 or float(tried.likelihood[best] - tried.likelihood[0]) < _COARSE:
                break
        return here, iterations

    def _climb(self, rows: Rows, frame: Frame, state: State, tolerance: float, work: Work, step: str) -> Climb:
        """Cycle until two in a row gain less than `tolerance` / 10; in single precision first, where that is enough."""
        name = f"em-{step.replace(' ', '-')}"
        climb = Climb.begin(state)
        if work.journal is not None and (found := work.journal.load(name, climb.read)) is not None:
            climb = found
        saved = time.monotonic()
        while climb.small < 2 and climb.iterations < self.max_iterations and not (climb.iterations and rows.is_spent):
            single = climb.single and climb.state.fits_single and len(rows.parts) > 1
            here, likelihood, state = cycle(climb.state, _Update(rows, frame, torch.float32 if single else torch.float64))
            gain = float((likelihood - here).max())
            small = climb.small + 1 if gain < (max(tolerance, _COARSE) if single else tolerance) / 10 else 0
            steps = 3
            if single and small and tolerance >= _COARSE:  # settled; one step in double precision for the last digits
                (_, state), small, steps = _Update(rows, frame, torch.float64)(state), 2, 4
            elif single and small:
                single, small = False, 0
            history = (*climb.history, frame.loss(likelihood.max()))
            climb = Climb(state, likelihood, gain, climb.iterations + steps, small, single, history)
            work.tell(f"EM on {step}", _done(gain, tolerance / 10))
            if work.journal is not None and (climb.small == 2 or time.monotonic() - saved > _OFTEN):
                work.journal.save(name, *climb.written())
                saved = time.monotonic()
        return climb


@dataclass(frozen=True)
class Climb:
    """How far EM is: the state of each start, its mean log likelihood a step ago, and the gain of the last cycle."""

    state: State
    likelihood: Float[Tensor, " s"]
    gain: float
    iterations: int
    small: int
    """How many cycles in a row gained next to nothing; two end it."""
    single: bool
    """Whether it is still in single precision."""
    history: tuple[float, ...] = ()
    """The loss of the best start in each cycle."""

    @classmethod
    def begin(cls, state: State) -> Climb:
        """Start from a state that hasn't been evaluated."""
        return cls(
            state, torch.full((len(state.probs),), -math.inf, dtype=torch.float64, device="cpu"), math.inf, 0, 0, single=True
        )

    @property
    def best(self) -> State:
        """The start with the largest likelihood."""
        return self.state.take(self.likelihood.topk(1).indices)

    def written(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and notes for the journal."""
        s = self.state
        tensors = {"probs": s.probs, "loc": s.loc, "cov": s.cov, "likelihood": self.likelihood}
        notes: dict[str, Any] = {"gain": self.gain, "iterations": self.iterations, "small": self.small, "single": self.single}
        notes["history"] = list(self.history)
        return tensors | ({} if s.df is None else {"df": s.df}), notes

    def read(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> Climb:
        """Return the climb from the same starts that `written` gave.

        Raises:
            ValueError: it began at others.
        """
        mine, _ = self.written()
        found = tensors_behind("", tensors, mine)
        state = State(found["probs"], found["loc"], found["cov"], found.get("df"))
        numbers = (float(notes["gain"]), int(notes["iterations"]), int(notes["small"]), bool(notes["single"]))
        return Climb(state, found["likelihood"], *numbers, tuple(map(float, notes["history"])))


@dataclass(frozen=True)
class Frame:
    """Coordinates in which every column has mean 0 and variance 1, and what the family is there."""

    shift: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]
    floor: Float[Tensor, " d"]
    covariance: str
    count: int
    is_student: bool
    is_single: bool
    """Whether the model is one law, not a mixture."""

    @classmethod
    def of(cls, sample: Block, family: Family) -> Frame:
        """Take the scales from a sample of the rows."""
        if not isinstance(family, (Mixture, StudentT)):
            raise TypeError(family)
        x, w = sample.x, sample.w / sample.w.sum()
        shift = w @ x
        scale = (w @ (x - shift).square()).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
        floor = _FLOOR + (resolution(x) / scale).square() / 12
        is_single = isinstance(family, StudentT)
        count = 1 if isinstance(family, StudentT) else family.count
        is_student = True if isinstance(family, StudentT) else family.law == "student_t"
        return cls(shift, scale, floor, family.covariance, count, is_student, is_single)

    def is_at_floor(self, state: State) -> bool:
        """Whether some component is as narrow, in some direction, as the floor allows."""
        root = self.floor.sqrt()
        narrowest = torch.linalg.eigvalsh(state.cov[0] / (root[:, None] * root))[..., 0].min()
        return bool(narrowest < 1 + 1e-6)

    def standard(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Carry rows there."""
        return (x - self.shift) / self.scale

    def model(self, state: State, i: int) -> Distribution:
        """Carry one of the states back, as a torch distribution."""
        tril = torch.diag(self.scale) @ torch.linalg.cholesky(state.cov[i])
        loc, df = self.shift + self.scale * state.loc[i], None if state.df is None else state.df[i]
        if self.is_single and df is not None:
            return MultivariateStudentT(df[0], loc[0], tril[0], validate_args=False)
        return mixture(state.probs[i], loc, tril, self.covariance, df)

    def loss(self, likelihood: Tensor) -> float:
        """−mean log q in the coordinates of the rows."""
        return float(self.scale.log().sum() - likelihood)


@dataclass(frozen=True)
class _Update:
    """One E and one M step over all rows."""

    rows: Rows
    frame: Frame
    dtype: torch.dtype

    def __call__(self, state: State) -> tuple[Float[Tensor, " s"], State]:
        f = self.frame
        total: Sums | None = None
        for part in self.rows.map(Expectation(state, f.shift, f.scale, f.covariance == "diagonal", self.dtype)):
            if total is None:
                total = part
            else:
                total.add(part)
        if total is None:
            raise ValueError("no rows")
        return total.likelihood / total.weight, maximize(total, state, f.floor, f.covariance)


def resolution(x: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The step in which each column was recorded: its smallest gap where most values repeat, 0 where they don't."""
    steps = []
    for column in x.T:
        values = column.unique()
        steps.append(values.diff().min() if 1 < len(values) < len(column) / 2 else column.new_zeros(()))
    return torch.stack(steps)


def _done(gain: float, enough: float) -> float:
    """The fraction that is done, on a logarithmic scale of gains from 1 down to `enough`."""
    if not 0 < gain < 1:
        return 0.0 if gain > 0 else 0.99
    return min(0.99, math.log(gain) / math.log(enough))
