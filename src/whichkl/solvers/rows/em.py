"""EM: maximum likelihood for mixtures and Student-t on any number of rows: k-means++ starts in one batch, splits, mergers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution

from whichkl.families import Family, Mixture, StudentT
from whichkl.files.journal import tensors_behind
from whichkl.samples import Block
from whichkl.samples.stream import slices
from whichkl.solvers.rows.em_steps import Frame, State, squarem_cycle
from whichkl.solvers.rows.rows import Rows, is_exact, mean_log_likelihood, rows_of, thinned
from whichkl.solvers.solver import Held, Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations

_MAX_ROWS_OF_SAMPLE = 30_000
"""Largest number of rows on which the starts are tried; the best start then uses all rows."""
_MAX_ROWS_OF_MOVES = 8_000
"""About the largest number of rows on which splits and mergers are compared."""
_ITERATIONS_OF_STARTS, _ITERATIONS_OF_MOVES = 21, 12
"""Iterations after which starts, and splits and mergers, are compared."""
_MIN_NATS_LEFT, _NATS_LEFT_PER_PARAMETER = 0.1, 0.005
"""Nats over all rows that may be left to gain when EM ends: a hundredth of what the noise of p fitted parameters gains, p/2."""
_COARSE = 1e-5
"""Nats per row. The tolerance on a sample, and that of float32."""
_SECONDS_BETWEEN_ENTRIES = 2.0
"""Seconds between two entries in the journal."""
_FIRST_FREEDOM = 10.0
"""Degrees of freedom of a Student-t component at the start."""
_MAX_MERGERS, _MAX_SPLITS = 3, 3
"""Largest number of pairs to merge, and of components to split for each of them."""
_SPLIT_DISTANCE = 0.8
"""Distance of the halves of a split component from its mean, in standard deviations along the longest axis."""
_AT_THE_FLOOR = (
    "a component's covariance lies at its floor: rows repeat, or columns depend on each other, so that the likelihood has no "
    "maximum and the floor sets the value"
)


@dataclass(frozen=True)
class ExpectationMaximization(Solver):
    """argmin KL(p‖q) over mixtures: responsibilities, then weighted moments, until the likelihood no longer rises.

    Every covariance is kept above a floor, 1e-6 times the data's variances plus δ²/12, where δ is the step in which a column was
    recorded. No component can therefore collapse onto a point or a line of rounded values. All starts run as one batch on at
    most 30,000 rows, and the best two run to the end. Components of the best are split and merged while that helps. If there
    are more rows, the best start then uses all of them. The sums of a pass are exact; they are in float32 while that is precise
    enough, and in float64 at the end. SQUAREM leaps make EM several times faster. It stops when two cycles in a row gain less
    than a tenth of what may be left: 0.1 nats over all rows, or 0.005 nats for each parameter if that is more, which is a
    hundredth of what the parameters' own noise is worth. At most 30,000 rows count for this. On a quadrature rule a cycle may
    gain 1e-10 nats in the mean.

    Args:
        starts: number of starts.
        tolerance: nats per row that may be left, if that is more than the above.
        max_iterations: largest number of iterations of each climb.
        moves: whether components are split and merged where that helps.

    Source: Dempster, Laird & Rubin (1977); Student-t, Liu & Rubin (1995); starts, Arthur & Vassilvitskii (2007), Biernacki,
    Celeux & Govaert (2003); leaps, Varadhan & Roland (2008); splits and mergers, Ueda et al. (2000).
    """

    name = "em"
    direction = "forward"
    families = (Mixture, StudentT)

    starts: int = 5
    tolerance: float = 1e-9
    max_iterations: int = 500
    moves: bool = True

    def quick(self) -> ExpectationMaximization:
        """Return a solver with two starts and 1e-5 nats per row, far below the error of a held-out mean."""
        return replace(self, starts=min(2, self.starts), tolerance=1e-5, max_iterations=200, moves=False)

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run EM from every start and keep the distinct optima."""
        return self.run(rows_of(target, seed, work.workers), family, seed, work, stride, exact=is_exact(target))

    def run(self, rows: Rows, family: Family, seed: int, work: Work = QUIET, stride: int = 0, *, exact: bool = False) -> Solution:
        """Run EM on rows: the starts on a sample of them, the best on all."""
        fitted = replace(rows, stride=stride)
        sample, count = thinned(fitted, _MAX_ROWS_OF_SAMPLE)
        frame = Frame.of(sample, family)
        few = Rows(slices(sample), rows.names, None, rows.workers, evaluations=rows.evaluations)
        whole = count <= len(sample)
        tolerance = self.tolerance if exact else self._tolerance(frame, min(count, _MAX_ROWS_OF_SAMPLE))
        first = seed_states(frame.standard(sample.x), sample.w, self.starts, frame.count, seed, is_student=frame.is_student)
        near = tolerance if whole else max(_COARSE, tolerance)
        climbs = [replace(self, max_iterations=_ITERATIONS_OF_STARTS)._climb(few, frame, first, near, work, "starts")]
        state, moved = climbs[0].state.take(climbs[0].likelihood.topk(min(2, self.starts)).indices), 0
        if self.moves and frame.count > 2:
            fewer = sample.take(torch.arange(0, len(sample), max(1, len(sample) // _MAX_ROWS_OF_MOVES), device="cpu"))
            better, moved = self._rearrange(replace(few, parts=slices(fewer)), frame, climbs[0].best, work)
            state = better if self.starts == 1 else better.beside(state.each(lambda part: part[:1]))
        climbs.append(self._climb(few, frame, state, near, work, "the best starts" if whole else "a sample"))
        if not whole:
            climbs.append(self._climb(fitted, frame, climbs[-1].best, tolerance, work, "all rows"))
        held = None
        if stride:
            held = Held(replace(fitted, held=True).gather(), frame.model(climbs[-1].best, 0))
            climbs.append(self._climb(rows, frame, climbs[-1].best, tolerance, work, "held-out rows too"))
        last, optima = climbs[-1], []
        for i in range(len(last.likelihood)):
            model = frame.model(last.state, i)
            loss = -mean_log_likelihood(model, rows) if whole else frame.loss(last.likelihood[i])
            optima.append(Optimum(model, loss, last.small == 2, False))
        notes = (_AT_THE_FLOOR,) if frame.is_at_floor(last.best) else ()
        iterations, history = moved + sum(one.iterations for one in climbs), tuple(h for one in climbs for h in one.history)
        return Solution(distinct(optima), iterations, last.gain, held=held, notes=notes, history=history)

    def solve_without(self, target: Target, family: Family, left_out: Sequence[Tensor], seed: int) -> list[Any]:
        """Climb for all sets at once."""
        return self.run_without(replace(rows_of(target, seed), evaluations=Evaluations()), family, left_out, seed)

    def run_without(self, rows: Rows, family: Family, left_out: Sequence[Tensor], seed: int) -> list[Distribution]:
        """Climb from all starts of all sets in one batch, in which the rows that a set leaves out have the weight 0."""
        block, sets = rows.gather(), len(left_out)
        frame, weights = Frame.of(block, family), block.w[:, None].repeat(1, sets)
        for i, one in enumerate(left_out):
            weights[one.cpu(), i] = 0  # the rows are on the CPU, wherever the target is
        y = frame.standard(block.x)
        seeded = (seed_states(y, w, self.starts, frame.count, seed, is_student=frame.is_student) for w in weights.T)
        part = Rows(slices(Block(block.x, weights.repeat_interleave(self.starts, 1))), rows.names, None, rows.workers)
        climb = self._climb(part, frame, next(seeded).beside(*seeded), self._tolerance(frame, len(block)), QUIET, "some rows")
        best = climb.likelihood.view(sets, self.starts).argmax(1)
        return [frame.model(climb.state, i * self.starts + int(start)) for i, start in enumerate(best)]

    def _tolerance(self, frame: Frame, rows: int) -> float:
        """Return the nats per row that EM may leave; a family that is too rich climbs along a plateau for very long."""
        return max(self.tolerance, max(_MIN_NATS_LEFT, _NATS_LEFT_PER_PARAMETER * frame.parameters) / rows)

    def _rearrange(self, rows: Rows, frame: Frame, here: State, work: Work) -> tuple[State, int]:
        """Split and merge components as long as a few iterations from the result end higher than as many from `here`."""
        iterations, short = 0, replace(self, max_iterations=_ITERATIONS_OF_MOVES)
        for _ in range(frame.count):
            tried = short._climb(rows, frame, here.beside(*split_and_merge(here)), _COARSE, work.quiet(), "other places")
            iterations += tried.iterations
            work.tell("EM, components rearranged", math.nan)
            best = tried.likelihood.argmax()
            here = tried.best
            if int(best) == 0 or float(tried.likelihood[best] - tried.likelihood[0]) < _COARSE:
                break
        return here, iterations

    def _climb(self, rows: Rows, frame: Frame, state: State, tolerance: float, work: Work, step: str) -> Climb:
        """Run cycles until two in a row gain less than `tolerance` / 10, at first in float32 where that is precise enough."""
        name = f"em-{step.replace(' ', '-')}"
        climb = Climb(state, torch.full((len(state.probs),), -math.inf, dtype=torch.float64, device="cpu"))
        if work.journal is not None and (found := work.journal.load(name, climb.read)) is not None:
            climb = found
        saved = time.monotonic()
        while climb.small < 2 and climb.iterations < self.max_iterations and not (climb.iterations and rows.evaluations.is_spent):
            # Rows of a single part are few: float32 would save next to nothing.
            single = climb.single and climb.state.fits_single and len(rows.parts) > 1
            update = partial(frame.update, rows, torch.float32 if single else torch.float64)
            here, likelihood, state = squarem_cycle(climb.state, update)
            gain = float((likelihood - here).max())
            small = climb.small + 1 if gain < (max(tolerance, _COARSE) if single else tolerance) / 10 else 0
            steps = 3
            if single and small and tolerance >= _COARSE:  # settled; one step in float64 for the last digits
                (_, state), small, steps = frame.update(rows, torch.float64, state), 2, 4
            elif single and small:
                single, small = False, 0
            history = (*climb.history, frame.loss(likelihood.max()))
            climb = Climb(state, likelihood, gain, climb.iterations + steps, small, single, history)
            work.tell(f"EM on {step}", _done(gain, tolerance / 10))
            if work.journal is not None and (climb.small == 2 or time.monotonic() - saved > _SECONDS_BETWEEN_ENTRIES):
                work.journal.save(name, *climb.written())
                saved = time.monotonic()
        return climb


@dataclass(frozen=True)
class Climb:
    """The progress of EM: the state of each start, its mean log likelihood a step ago, and the gain of the last cycle."""

    state: State
    likelihood: Float[Tensor, " s"]
    gain: float = math.inf
    iterations: int = 0
    small: int = 0
    """Number of cycles in a row that gained next to nothing; two end the climb."""
    single: bool = True
    """Whether the climb is still in float32."""
    history: tuple[float, ...] = ()
    """The loss of the best start in each cycle."""

    @property
    def best(self) -> State:
        """The start with the largest likelihood."""
        return self.state.take(self.likelihood.topk(1).indices)

    def written(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and notes for the journal."""
        notes: dict[str, Any] = {name: getattr(self, name) for name in ("gain", "iterations", "small", "single")}
        return self.state.named() | {"likelihood": self.likelihood}, notes | {"history": list(self.history)}

    def read(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> Climb:
        """Return the climb from the same starts that `written` gave.

        Raises:
            ValueError: it began at others.
        """
        found = tensors_behind("", tensors, self.written()[0])
        likelihood = found.pop("likelihood")
        numbers = (float(notes["gain"]), int(notes["iterations"]), int(notes["small"]), bool(notes["single"]))
        return Climb(State(**found), likelihood, *numbers, tuple(map(float, notes["history"])))


def seed_states(
    y: Float[Tensor, "n d"], w: Float[Tensor, " n"], starts: int, count: int, seed: int, *, is_student: bool
) -> State:
    """Return k-means++ starts: each next centre is drawn with probability proportional to w × squared distance to the nearest.

    Each centre is the best of 2 + log K draws, the one that leaves the least sum of these. Covariances start as the identity over
    K^(2/d), weights are equal, and the degrees of freedom are ten.

    Source: Arthur & Vassilvitskii (2007).
    """
    # k-means++ spreads the centres; starts that share a cluster are EM's usual bad optimum.
    generator = torch.Generator(y.device).manual_seed(seed)
    first = torch.multinomial(w, starts, replacement=True, generator=generator)
    centres = y[first][:, None]
    nearest = torch.cdist(y, centres[:, 0]).square()
    trials = 2 + int(math.log(count))
    for _ in range(1, count):
        chance = (w[:, None] * nearest).T + 1e-300
        drawn = y[torch.multinomial(chance, trials, replacement=True, generator=generator)]
        left = torch.stack([torch.minimum(nearest, torch.cdist(y, drawn[:, t]).square()) for t in range(trials)])
        best = (w[:, None] * left).sum(1).argmin(0)
        each = torch.arange(starts, device="cpu")
        centres = torch.cat([centres, drawn[each, best][:, None]], 1)
        nearest = left[best, :, each].T
    dim = y.shape[1]
    spread = torch.eye(dim, dtype=y.dtype, device=y.device) / max(1.0, count ** (1 / dim)) ** 2
    even = torch.full((starts, count), 1 / count, dtype=y.dtype, device=y.device)
    df = torch.full_like(even, _FIRST_FREEDOM) if is_student else None
    return State(even, centres, spread.expand(starts, count, dim, dim), df)


def split_and_merge(state: State) -> list[State]:
    """Return up to nine states of three or more components in which two are merged and a third is split.

    The pairs are those that lose least by Runnalls' bound, ½ [(πᵢ + πⱼ) log|Σᵢⱼ| − πᵢ log|Σᵢ| − πⱼ log|Σⱼ|]. The components of
    largest volume are split. Both moves keep the moments.

    Source: split and merge EM, Ueda, Nakano, Ghahramani & Hinton (2000); the bound, Runnalls (2007).
    """
    probs, loc, cov = state.probs[0], state.loc[0], state.cov[0]
    count, volume = len(probs), _log_det(cov)
    weight = probs[:, None] + probs
    share = probs[:, None] / weight
    apart = loc[:, None] - loc
    between = (share * (1 - share))[..., None, None] * apart[..., :, None] * apart[..., None, :]
    merged = share[..., None, None] * cov[:, None] + (1 - share)[..., None, None] * cov + between
    cost = (weight * _log_det(merged) - probs[:, None] * volume[:, None] - probs * volume) / 2
    row, column = torch.triu_indices(count, count, 1, device="cpu")
    nearest = cost[row, column].argsort()
    # A component with hardly any rows can be large by chance, and splitting it gains nothing.
    widest = torch.where(probs > 0.25 / count, volume, -math.inf).argsort(descending=True)
    found: list[State] = []
    for pair in nearest.tolist()[:_MAX_MERGERS]:
        i, j = int(row[pair]), int(column[pair])
        found += [_moved(state, i, j, k) for k in [one for one in widest.tolist() if one not in (i, j)][:_MAX_SPLITS]]
    return found


def _log_det(cov: Float[Tensor, "... d d"]) -> Float[Tensor, ...]:
    """Log determinants by Cholesky: torch's LU of a batch can be wrong (see `whichkl.process.threads`)."""
    total: Tensor = 2 * torch.linalg.cholesky(cov).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return total


def _moved(state: State, i: int, j: int, k: int) -> State:
    """Merge i and j into i, and split k into k and j."""
    probs, loc, cov = state.probs.clone(), state.loc.clone(), state.cov.clone()
    a = float(probs[0, i] / (probs[0, i] + probs[0, j]))
    apart = loc[0, i] - loc[0, j]
    cov[0, i] = a * cov[0, i] + (1 - a) * cov[0, j] + a * (1 - a) * torch.outer(apart, apart)
    loc[0, i] = a * loc[0, i] + (1 - a) * loc[0, j]
    probs[0, i] = probs[0, i] + probs[0, j]
    value, vector = torch.linalg.eigh(cov[0, k])
    step = _SPLIT_DISTANCE * value[-1].sqrt() * vector[:, -1]
    # The halves lie apart by ± step: with this covariance both together keep the moments of the whole.
    cov[0, k] = cov[0, k] - torch.outer(step, step)
    cov[0, j] = cov[0, k]
    loc[0, j], loc[0, k] = loc[0, k] - step, loc[0, k] + step
    probs[0, k] = probs[0, k] / 2
    probs[0, j] = probs[0, k]
    return State(probs, loc, cov, state.df)


def _done(gain: float, enough: float) -> float:
    """Return the fraction that is done, on a logarithmic scale of gains from 1 down to `enough`."""
    if not 0 < gain < 1:
        return 0.0 if gain > 0 else 0.99
    return min(0.99, math.log(gain) / math.log(enough))
