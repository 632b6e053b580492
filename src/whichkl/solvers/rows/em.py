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
from whichkl.solvers.rows.em_partial import partial_cycles
from whichkl.solvers.rows.em_starts import MAX_MOVES, moves_to, seed_states, split_and_merge, state_of
from whichkl.solvers.rows.em_steps import Frame, State
from whichkl.solvers.rows.rows import Rows, is_exact, mean_log_likelihood, rows_of, thinned
from whichkl.solvers.rows.squarem import squarem_cycle
from whichkl.solvers.solver import Held, Optimum, Solution, Solver, distinct
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.evaluations import Evaluations

_MAX_ROWS_OF_SAMPLE = 30_000
"""Largest number of rows on which the starts are tried; the best start then uses all rows."""
_MIN_ROWS_OF_SAMPLE, _MIN_ROWS_PER_PARAMETER = 8_000, 5
"""Number of rows on which the starts are tried, or rows per parameter if that is more, up to `_MAX_ROWS_OF_SAMPLE`."""
_MIN_ROWS_OF_SEEDS, _ROWS_OF_SEEDS_PER_COMPONENT = 2_000, 200
"""Number of rows from which the centres of starts are drawn, or rows per component if that is more."""
_MAX_ROWS_OF_MOVES = 8_000
"""About the largest number of rows on which splits and mergers are compared."""
_CYCLES_OF_STARTS, _CYCLES_OF_OTHERS = 7, 4
"""Cycles after which starts are compared: those drawn from the rows, and the same for a comparison with another model."""
_ITERATIONS_OF_CYCLE, _MOST_GAINS = 3, 4
"""Iterations of a cycle, and how many times what its last cycle gained a state may still gain."""
_CYCLES_OF_MOVES, _KEPT_MOVES, _KEPT_AFTER_CYCLES = 2, 4, (3, 3, 3)
"""Cycles of the new components alone after which nine splits and mergers are compared, how many of them stay, and how many states
after each cycle of all components."""
_MIN_ROWS_PER_COLUMN = 5
"""Rows per column that every component must have after a split and a merger."""
_ITERATIONS_OF_ROUND = 15
"""Iterations after which states that have settled leave a batch."""
_MIN_NATS_LEFT, _NATS_LEFT_PER_PARAMETER = 0.1, 0.005
"""Nats over all rows that may be left to gain when EM ends: a hundredth of what the noise of p fitted parameters gains, p/2."""
_MAX_ROWS_OF_TOLERANCE = 10_000
"""Rows from which on these nats grow with the rows, so that EM doesn't climb for long for a gain below 0.001 nats per row."""
_SETTLED = 1e-3
"""Share of the nats per row that may be left below which the gain of a single step ends EM: even where a step only takes a
hundredth of what is left, less than a tenth of these nats is then left."""
_COARSE = 1e-5
"""Nats per row. The tolerance on a sample, and that of float32."""
_SECONDS_BETWEEN_ENTRIES = 2.0
"""Seconds between two entries in the journal."""
_AT_THE_FLOOR = (
    "a component's covariance lies at its floor, a millionth of that of all rows: its rows repeat or lie on a line or a plane, "
    "or others lie a thousand times farther away, so that the floor sets the value"
)


@dataclass(frozen=True)
class ExpectationMaximization(Solver):
    """argmin KL(p‖q) over mixtures: responsibilities, then weighted moments, until the likelihood no longer rises.

    Every covariance is kept above a floor: in every direction, 1e-6 times the variance of all rows plus δ²/12, where δ is the
    step in which a column was recorded. No component can therefore collapse onto a point or a line of rounded values; a value
    that the floor sets isn't reliable. All starts run as one batch on at
    most 30,000 rows, and the best two run to the end. Components of the best are split and merged while that helps. If there
    are more rows, the best start then uses all of them. The sums of a pass are exact; they are in float32 while that is precise
    enough, and in float64 at the end. SQUAREM leaps make EM several times faster. It stops when two cycles in a row gain less
    than a tenth of what may be left: 0.1 nats over all rows, or 0.005 nats for each parameter if that is more, which is a
    hundredth of what the parameters' own noise is worth. At most 10,000 rows count for this. On a quadrature rule a cycle may
    gain 1e-10 nats in the mean.

    Args:
        starts: number of starts.
        tolerance: nats per row that may be left, if that is more than the above.
        max_iterations: largest number of iterations of each climb.
        moves: whether components are split and merged where that helps.
        neighbour: a mixture of as many components, of one more or one fewer, near which EM starts instead.

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
    neighbour: Distribution | None = None

    def quick(self) -> ExpectationMaximization:
        """Return a solver with two starts and 1e-5 nats per row, far below the error of a held-out mean."""
        return replace(self, starts=min(2, self.starts), tolerance=max(self.tolerance, 1e-5), max_iterations=200, moves=False)

    def near(self, model: Any, tolerance: float) -> ExpectationMaximization:
        """Return a solver that starts from a mixture of as many components, of one more or one fewer."""
        return replace(self, neighbour=model, tolerance=max(self.tolerance, tolerance))

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Run EM from every start and keep the distinct optima."""
        return self.run(rows_of(target, seed, work.workers), family, seed, work, stride, exact=is_exact(target))

    def run(self, rows: Rows, family: Family, seed: int, work: Work = QUIET, stride: int = 0, *, exact: bool = False) -> Solution:
        """Run EM on rows: the starts on a sample of them, the best on all."""
        fitted = replace(rows, stride=stride)
        sample, count = thinned(fitted, _MAX_ROWS_OF_SAMPLE)
        frame = Frame.of(sample, family, rows.names)
        if len(sample) == count:  # read once
            fitted = Rows(frame.parts(sample, 1), rows.names, None, rows.workers, evaluations=rows.evaluations)
        sample = sample.thinned(max(_MIN_ROWS_OF_SAMPLE, _MIN_ROWS_PER_PARAMETER * frame.parameters))
        whole = count <= len(sample)
        tolerance = self.tolerance if exact else self._tolerance(frame, count)
        near = None if self.neighbour is None else state_of(self.neighbour, frame)
        is_final = self.neighbour is None  # the last digits of a neighbour are far below the error of its gain
        finalists, climbs = 2 if self.moves else 1, []
        few = Rows((), rows.names, None, rows.workers, evaluations=rows.evaluations)
        few, state, iterations = self._begun(few, sample, frame, near, finalists, seed, work)
        enough = tolerance if whole else max(_COARSE, self._tolerance(frame, len(sample)))
        if self.moves and frame.count > 2:
            some = sample.thinned(_MAX_ROWS_OF_MOVES)
            least = _MIN_ROWS_PER_COLUMN * len(frame.shift) / len(some)
            fewer = replace(few, parts=frame.parts(some, MAX_MOVES))
            better, moved = self._rearrange(fewer, frame, state.each(lambda part: part[:1]), least, work)
            state = better if self.starts == 1 else better.joined(state.each(lambda part: part[:1]))
            iterations += moved
        if whole or self.moves or near is None:
            step = "the best starts" if whole else "a sample"
            climbs.append(self._climb(few, frame, state, enough, work, step, polish=is_final and whole))
            state = climbs[-1].best
        if not whole:
            climbs.append(self._climb(fitted, frame, state, tolerance, work, "all rows", polish=is_final and not stride))
        held = None
        if stride:
            held = Held(replace(rows, stride=stride, held=True).gather(), frame.model(climbs[-1].best, 0))
            if whole:
                climbs.append(self._climb(rows, frame, climbs[-1].best, tolerance, work, "held-out rows too"))
            else:  # one step is enough: the held-out rows are a small share of all, and hardly move the optimum
                likelihood, state = frame.update(rows, torch.float64, climbs[-1].best)
                climbs.append(replace(climbs[-1], state=state, likelihood=likelihood, iterations=1, history=()))
        last, optima = climbs[-1], []
        for i in range(len(last.likelihood)):
            model = frame.model(last.state, i)
            is_measured = whole and is_final  # a neighbour is compared on other rows
            loss = -mean_log_likelihood(model, rows) if is_measured else frame.loss(last.likelihood[i])
            optima.append(Optimum(model, loss, last.small == 2, False))
        doubts = (_AT_THE_FLOOR,) if frame.is_at_floor(last.best) else ()
        iterations += sum(one.iterations for one in climbs)
        history = tuple(h for one in climbs for h in one.history)
        return Solution(distinct(optima), iterations, last.gain, held=held, doubts=doubts, history=history)

    def _begun(
        self, rows: Rows, sample: Block, frame: Frame, near: State | None, finalists: int, seed: int, work: Work
    ) -> tuple[Rows, State, int]:
        """Return a sample as rows, the best states after a few cycles on them, and the iterations taken."""
        moves = [] if near is None or near.probs.shape[1] == frame.count else moves_to(frame.count, near)
        states = len(moves) or (self.starts if near is None else 1)
        few = replace(rows, parts=frame.parts(sample, states))
        if near is None:
            some = sample.thinned(max(_MIN_ROWS_OF_SEEDS, _ROWS_OF_SEEDS_PER_COMPONENT * frame.count))
            first = seed_states(frame.standard(some.x), some.w, states, frame.count, seed, is_student=frame.is_student)
            cycles = _CYCLES_OF_OTHERS if self.neighbour else _CYCLES_OF_STARTS
            cycles = min(cycles, -(-self.max_iterations // _ITERATIONS_OF_CYCLE))
            best, _, iterations = self._race(few, frame, first, (states,) * (cycles - 1) + (finalists,), finalists, work)
            return few, best, iterations
        if not moves:
            return few, near, 0
        moved = partial_cycles(few, frame, near, moves, 1)
        return few, moved.state.each(lambda part: part[:finalists]), moved.iterations

    def solve_without(self, target: Target, family: Family, left_out: Sequence[Tensor], seed: int) -> list[Any]:
        """Climb for all sets at once."""
        return self.run_without(replace(rows_of(target, seed), evaluations=Evaluations()), family, left_out, seed)

    def run_without(self, rows: Rows, family: Family, left_out: Sequence[Tensor], seed: int) -> list[Distribution]:
        """Climb from all starts of all sets in one batch, in which the rows that a set leaves out have the weight 0."""
        block, sets = rows.gather(), len(left_out)
        frame, weights = Frame.of(block, family, rows.names), block.w[:, None].repeat(1, sets)
        for i, one in enumerate(left_out):
            weights[one.cpu(), i] = 0  # the rows are on the CPU, wherever the target is
        y, starts = frame.standard(block.x), self.starts if frame.count > 1 else 1  # one law has one optimum, as a rule
        seeded = (seed_states(y, w, starts, frame.count, seed, is_student=frame.is_student) for w in weights.T)
        repeated = Block(block.x, weights.repeat_interleave(starts, 1))
        state, likelihood = self._climb_each(rows, frame, repeated, next(seeded).joined(*seeded))
        best = likelihood.view(sets, starts).argmax(1)
        return [frame.model(state, i * starts + int(start)) for i, start in enumerate(best)]

    def _climb_each(self, rows: Rows, frame: Frame, block: Block, state: State) -> tuple[State, Float[Tensor, " s"]]:
        """Climb from states with weights of their own, in rounds: a state that a round hardly raised stays where it is."""
        tolerance = self._tolerance(frame, len(block))
        likelihood = torch.full((len(state.probs),), -math.inf, dtype=torch.float64, device="cpu")
        left, iterations = torch.arange(len(likelihood), device="cpu"), 0
        while len(left) and iterations < self.max_iterations:
            some = Block(block.x, block.w[:, left])
            part = Rows(frame.parts(some, len(left)), rows.names, None, rows.workers)
            round_of = replace(self, max_iterations=min(_ITERATIONS_OF_ROUND, self.max_iterations - iterations))
            climb = round_of._climb(part, frame, state.take(left), tolerance, QUIET, "some rows")
            state = state.each(lambda old, new, left=left: old.index_copy(0, left, new), climb.state)
            rises = climb.likelihood - likelihood[left] >= len(climb.history) * tolerance / 10
            likelihood[left], iterations = climb.likelihood, iterations + climb.iterations
            left = left[rises & (climb.small < 2)]
        return state, likelihood

    def _tolerance(self, frame: Frame, rows: int) -> float:
        """Return the nats per row that EM may leave; a family that is too rich climbs along a plateau for very long."""
        nats = max(_MIN_NATS_LEFT, _NATS_LEFT_PER_PARAMETER * frame.parameters)
        return max(self.tolerance, nats / min(rows, _MAX_ROWS_OF_TOLERANCE))

    def _rearrange(self, rows: Rows, frame: Frame, here: State, least: float, work: Work) -> tuple[State, int]:
        """Split and merge components as long as a few cycles from the result end higher than as many from `here`.

        A component with less than `least` of the rows, and than each had before, may be on its way to a few rows and its floor,
        where its likelihood says nothing.
        """
        iterations = 0
        for _ in range(frame.count):
            moved = partial_cycles(rows, frame, here, split_and_merge(here), _CYCLES_OF_MOVES)
            iterations += moved.iterations + 1
            may_lead = moved.likelihood + _MOST_GAINS * moved.gain >= frame.update(rows, torch.float64, here)[0]
            may_lead &= moved.state.probs.amin(1) >= min(least, float(here.probs.min()))
            if not bool(may_lead.any()):
                break
            states = here.joined(moved.state.take(may_lead.nonzero()[:_KEPT_MOVES, 0]))
            here, gain, more = self._race(rows, frame, states, _KEPT_AFTER_CYCLES, 1, work.quiet())
            iterations += more
            work.tell("EM, components rearranged", math.nan)
            if gain < _COARSE:
                break
        return here, iterations

    def _race(
        self, rows: Rows, frame: Frame, state: State, most: Sequence[int], finalists: int, work: Work
    ) -> tuple[State, float, int]:
        """Take one cycle for each entry of `most`, which is the largest number of states to keep after it.

        A state is dropped if it wouldn't lead at the end even if each cycle that is left gained twice what its last one did, or
        all of them four times that. At least `finalists` states are kept; once no more are left, no further cycle is taken.

        Returns:
            The `finalists` best states, the best first; by how much that one leads the first state given; the iterations taken.
        """
        cycle, iterations = replace(self, max_iterations=_ITERATIONS_OF_CYCLE), 0
        number, before = torch.arange(len(state.probs), device="cpu"), torch.tensor([math.nan], dtype=torch.float64, device="cpu")
        for left, kept in zip(range(len(most))[::-1], most, strict=True):
            climb = cycle._climb(rows, frame, state, _COARSE, work, f"starts, cycle {len(most) - left}", polish=False)
            iterations += climb.iterations
            now = climb.likelihood
            order = now.argsort(descending=True)
            # In the first cycle there is nothing before: all may lead.
            may_lead = ~(now + min(2 * left, _MOST_GAINS) * (now - before) < now.max())
            stay = order[may_lead[order]][:kept] if left else order[:kept]
            stay = stay if len(stay) > finalists else order[:finalists]
            state, before, number = climb.state.take(stay), now[stay], number[stay]
            if len(stay) <= finalists or rows.evaluations.is_spent:
                break
        behind = before[0] - before[number == 0]
        lead = math.inf if len(behind) == 0 else float(behind)
        return state.each(lambda part: part[:finalists]), lead, iterations

    def _climb(
        self, rows: Rows, frame: Frame, state: State, tolerance: float, work: Work, step: str, *, polish: bool = True
    ) -> Climb:
        """Run cycles until two in a row gain less than `tolerance` / 10, at first in float32 where that is precise enough.

        With `polish` a step in float64 is the last one.
        """
        name = f"em-{step.replace(' ', '-')}"
        climb = Climb(state, torch.full((len(state.probs),), -math.inf, dtype=torch.float64, device="cpu"))
        if work.journal is not None and (found := work.journal.load(name, climb.read)) is not None:
            climb = found
        saved = time.monotonic()
        while climb.small < 2 and climb.iterations < self.max_iterations and not (climb.iterations and rows.evaluations.is_spent):
            # Rows of a single part are few: float32 would save next to nothing.
            single = climb.single and climb.state.fits_single and len(rows.parts) > 1
            update = partial(frame.update, rows, torch.float32 if single else torch.float64)
            allowed = max(tolerance, _COARSE) if single else tolerance
            settled = allowed * _SETTLED if allowed >= _COARSE else -math.inf  # not on a quadrature rule
            here, likelihood, state, steps, has_settled = squarem_cycle(climb.state, update, climb.likelihood, settled)
            gain = float((likelihood - (here if steps > 1 else climb.likelihood)).max())
            small = 2 if has_settled else climb.small + 1 if gain < allowed / 10 else 0
            if single and small and tolerance >= _COARSE:  # settled; one step in float64 for the last digits
                if polish:
                    (_, state), steps = frame.update(rows, torch.float64, state), steps + 1
                small = 2
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


def _done(gain: float, enough: float) -> float:
    """Return the fraction that is done, on a logarithmic scale of gains from 1 down to `enough`."""
    if not 0 < gain < 1:
        return 0.0 if gain > 0 else 0.99
    return min(0.99, math.log(gain) / math.log(enough))
