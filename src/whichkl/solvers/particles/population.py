"""Population: forward KL where log p can be evaluated: points of p, then rounds of draws of q that are reweighted to p."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from whichkl._checks import InputError, TargetError, WhichklError, cannot
from whichkl.access import Access
from whichkl.divergences import Estimate
from whichkl.families import BlockMixture, Family
from whichkl.importance import effective_sample_size
from whichkl.objectives import ForwardKL, ReverseKL
from whichkl.particles.located import ISLANDS, located_particles
from whichkl.particles.pool import Points
from whichkl.solvers.nodes.starts import refuse_unusable
from whichkl.solvers.particles.lost_modes import with_lost_modes
from whichkl.solvers.particles.rounds import Rounds, weighted_rows
from whichkl.solvers.particles.separable import separated, solve_blocks
from whichkl.solvers.particles.value import Proposal, enumerated, measured
from whichkl.solvers.resolve import resolve
from whichkl.solvers.rows.rows import FRESH, log_prob_at_points
from whichkl.solvers.solver import Solution, Solver, check_counts
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.origin import Origin

_ROWS_PER_PARAMETER = 100
"""Rows per parameter of a model: P parameters that are fitted to n rows cost P/(2n), here 0.005 nats, which hardly matter."""
_MIN_DRAWS, _MIN_DRAWS_WITH_SAMPLES = 16_384, 4_096
"""Least numbers of draws of a round, from a density alone, and where there are samples."""
_MIN_DRAWS_UNDER_BUDGET = 100
_SHARE_OF_BUDGET = 0.25
"""Share of the evaluations that are left, of a budget, that a round may use."""
_MIN_GAIN = 0.005
"""Gain of the ESS, as a share of the draws, below which another round isn't worth its draws."""
_HELD_ISLANDS = 4
"""One of this many islands is held out, for the value."""
_DRAWS_FOR_VALUE = 10_000
_MAX_DIM = 200
"""Largest number of dimensions in which few samples are completed by the density unless this solver is named."""
_MIN_PARTICLES_OF_BLOCK, _DRAWS_OF_BLOCK = 1_024, 8_192
"""Least number of particles, and the number of draws per round, where each block of columns is solved alone."""
_SEEDS_APART = 1_009
"""Distance of the seeds of two rounds, so that fits with neighbouring seeds share no draws."""
_MAX_STDERR_OF_LOG_Z, _MIN_ACCEPTANCE = 0.5, 0.3
_MIN_ESS = 0.5
"""ESS, as a share of the model's draws, from which on they correct what the particles got wrong."""


@dataclass(frozen=True)
class Population(Solver):
    """argmin KL(p‖q) from log p: sequential Monte Carlo or the samples give points of p, then q's own draws improve on them.

    The model is fitted to the points by the solver of its family for weighted rows. Then each round draws from the model, and
    fits it to all points and all draws so far, weighted by p/m, m = a p + (1 − a) q̄: q̄ is the mean density of the models that
    were drawn from, a the share of the points by their effective number (`particles.pool`). The draws see p's exact density, and
    the points see mass that the models miss. A round has 100 draws per parameter of the model, between 16,384 (with samples
    4,096) and 65,536. The rounds end when the ESS of p/q gains less than half a percent of the draws, and one more fit uses all
    draws. Networks, whose training is long, are fitted to the particles and once more. Of a discrete target all states are the
    points, and there are no rounds.

    Without samples, a quarter of the particles is held out for the value. With samples, the fit is that to the samples alone
    where k̂ of the weights is too large.

    Args:
        particles: number of particles, a multiple of 32.
        rounds: largest number of rounds.
        draws: number of draws per round; None for the above.

    Raises:
        InputError: a field is out of range.

    Source: Del Moral, Doucet & Jasra (2006) for the particles; population Monte Carlo, Cappé, Douc, Guillin, Marin & Robert
    (2008).
    """

    name = "particles"
    direction = "forward"
    families = (Family,)
    needs_draws = False
    refits = False

    particles: int = 4_096
    rounds: int = 8
    draws: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        check_counts(self, particles=64, rounds=0, draws=100)
        if self.particles % ISLANDS:
            because = f"`particles={self.particles}` isn't a multiple of {ISLANDS}, the number of its islands"
            raise InputError(cannot("use `Population`", because, "Give, say, particles=4096"))

    @classmethod
    def covers(cls, family: Family, access: Access) -> bool:
        """Return whether log p is known, and a solver fits the family to weighted rows."""
        if Access.LOG_PROB not in access or (family.conditional and not family.optional_context):
            return False
        is_taken = Access.ENUMERABLE not in access or _minimises_on_states(family, access)
        return is_taken and _fits_rows(family)

    def least_memory(self, family: Family, dim: int) -> int:
        """Return the bytes of particles with their gradients, and of eight matrices: covariances, factors and the base."""
        return super().least_memory(family, dim) + 32 * self.particles * dim + 64 * dim**2

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Find points of p, fit, and improve the fit by its own draws."""
        work.tell("moving particles to the target", math.nan)
        if target.samples is not None:
            return self._from_samples(target, family, seed, work, stride)
        if isinstance(family, BlockMixture) and not target.access.can_sample:
            family, point = separated(target, family, seed)
            if point is not None and (count := len(family.columns(target.dim))) > 1:
                particles = max(_MIN_PARTICLES_OF_BLOCK, self.particles // count // ISLANDS * ISLANDS)
                each = replace(self, particles=particles, draws=self.draws or _DRAWS_OF_BLOCK)
                return solve_blocks(each, target, family, point, seed, work)
        points, held, doubts, more = self._points(target, seed)
        rows = weighted_rows(target, points.x, points.weights)
        fitted, curve, notes = resolve(rows, family, seed, work.quiet())
        engine = _row_solver(fitted)
        fitted.check_samples(points.x, target.names)
        first = engine.solve(rows, fitted, seed, work.quiet())
        run = Rounds(target, first.family or fitted, engine, points, first)
        has_states = Access.ENUMERABLE in target.access
        rounds = 0 if has_states else self.rounds if engine.refits else min(1, self.rounds)
        self._improve(run, rounds, seed, work)
        found = run.solution(is_last=len(run.proposals) == rounds <= 1)
        value, log_z = self._value(target, held, run.proposal, seed)
        notes = (*found.notes, *notes, *more, *([run.note] if run.proposals else []))
        doubts = doubts if run.ess < _MIN_ESS and not has_states else ()
        return replace(found, notes=notes, doubts=doubts, value=value, log_z=log_z, family=run.family, curve=curve)

    def _from_samples(self, target: Target, family: Family, seed: int, work: Work, stride: int) -> Solution:
        """Fit the samples, and improve that fit by the density if it can be evaluated and the weights can be trusted."""
        engine = _row_solver(family)
        first = engine.solve(target, family, seed, work.quiet(), stride)
        if self._draws(family, target) < _MIN_DRAWS_UNDER_BUDGET:
            return _of_samples_alone(first, "the budget leaves no evaluations for draws of the model")
        try:
            points = _samples(target)
            run = Rounds(target, first.family or family, engine, points, first)
            self._improve(run, self.rounds if engine.refits else min(1, self.rounds), seed, work)
            if not run.is_trusted:
                return _of_samples_alone(first, f"k̂ of p/q is {run.khat:.2f}, too large for weights")
            value, log_z = self._value(target, points, run.proposal, seed)
        except WhichklError as error:  # the samples give a fit without the density
            return _of_samples_alone(first, f"log p couldn't be used ({error})".replace(".)", ")"))
        found = run.solution(is_last=not engine.refits)
        return replace(found, notes=(*found.notes, run.note), value=value, log_z=log_z, family=run.family)

    def _improve(self, run: Rounds, rounds: int, seed: int, work: Work) -> None:
        """Draw, weight and fit until the ESS gains next to nothing; stop at weights that samples are better than."""
        for i in range(rounds):
            count = self._draws(run.family, run.target)
            if count < _MIN_DRAWS_UNDER_BUDGET:
                break
            work.tell(f"round {i + 1}: draws of the model are weighted", math.nan)
            gain = run.draw(count, seed + _SEEDS_APART * (i + 1))
            if run.target.samples is not None and not run.is_trusted:
                break
            run.fit(seed)
            if gain < _MIN_GAIN:
                run.settled = True
                break

    def _value(self, target: Target, held: Points, proposal: Proposal, seed: int) -> tuple[Estimate | None, Estimate | None]:
        """Measure forward KL on points that weren't fitted and on fresh draws; a sampler gives better ones, later."""
        if Access.ENUMERABLE in target.access:
            return enumerated(target, proposal.model), None
        left = target.evaluations.most - target.evaluations.total
        count = int(min(self.draws or _DRAWS_FOR_VALUE, left))
        if target.sampler is not None or count < _MIN_DRAWS_UNDER_BUDGET:
            return None, None
        return measured(held, proposal, target, count, seed + _SEEDS_APART * (self.rounds + 1))

    def _points(self, target: Target, seed: int) -> tuple[Points, Points, tuple[str, ...], tuple[str, ...]]:
        """Return points of p to fit to, points for the value, doubts about them and notes, in the coordinates of the target."""
        if target.sampler is not None:
            x = target.draws(self.particles, seed).to("cpu", torch.float64)
            return (points := Points.even(x, log_prob_at_points(target, x))), points, (), ()
        if Access.ENUMERABLE in target.access:
            x, log_p = (one.to("cpu", torch.float64) for one in target.atoms)
            points = replace(Points.even(x, log_p), weights=log_p.softmax(0))
            return points, points, (), ()
        if target.bijection.is_discrete:
            because = "it is discrete, and its states are too many to be listed"
            raise TargetError(cannot("find points of this target", because, "Give `samples=` of it, or minimise reverse KL"))
        free = target.unconstrained()
        refuse_unusable(free, seed)
        found = located_particles(free, self.particles, seed)
        points, note = with_lost_modes(free, Points.of_particles(found), found.log_z, seed)
        if not target.bijection.is_real:
            x = target.bijection.forward(points.x)
            points = replace(points, x=x, log_p=points.log_p - target.bijection.log_jacobian(points.x, x))
        doubts = []
        if found.log_z_stderr > _MAX_STDERR_OF_LOG_Z:
            doubts.append(f"independent groups of particles disagree on log Z by {found.log_z_stderr:.1f}")
        if found.acceptance < _MIN_ACCEPTANCE:
            doubts.append(f"only {found.acceptance:.0%} of the particles' moves were accepted")
        is_held = points.groups % _HELD_ISLANDS == 0
        return points.take(~is_held), points.take(is_held), tuple(doubts), (note,) * bool(note)

    def _draws(self, family: Family, target: Target) -> int:
        """Return the number of draws of the next round."""
        least = _MIN_DRAWS if target.samples is None else _MIN_DRAWS_WITH_SAMPLES
        count = self.draws or min(FRESH, max(least, _rows_to_determine(family, target.dim)))
        left = target.evaluations.most - target.evaluations.total
        return count if left == math.inf else min(count, int(_SHARE_OF_BUDGET * left))


def is_worth_its_density(target: Target, family: Family) -> bool:
    """Return whether samples are so few for the family that the density adds to them: fewer than 100 rows per parameter.

    The density of a converted target is itself an estimate, which adds nothing to its samples; and in more than 200 dimensions
    weights can hardly ever be trusted.
    """
    x, w = target.samples, target.weights
    is_plain = x is not None and target.sampler is None and target.context is None and not isinstance(target.origin, Origin)
    if x is None or not is_plain or target.dim > _MAX_DIM or not Population.covers(family, target.access):
        return False
    engine = _row_solver(family)
    count = len(x) if w is None else effective_sample_size(w.log())
    return engine.refits and count < _rows_to_determine(family, target.dim)


def _rows_to_determine(family: Family, dim: int) -> int:
    """Return 100 rows per parameter, of which there are about as many as numbers in the fewest rows that determine a model."""
    return _ROWS_PER_PARAMETER * family.minimum_rows(dim) * dim


def _of_samples_alone(first: Solution, why: str) -> Solution:
    """Return the fit to the samples, with a note on why the density wasn't used."""
    without = "`Target(log_prob=…)` without the samples is fitted by particles"
    return replace(first, notes=(*first.notes, f"{why}, so that this is the fit to the samples alone; {without}"))


def _samples(target: Target) -> Points:
    """Return the samples of a target with their weights, those of chains thinned."""
    p = target.thinned()[0]
    if p.samples is None:
        raise TypeError(target)
    x = p.samples.to("cpu", torch.float64)
    points = Points.even(x, log_prob_at_points(target, x))
    if p.weights is None:
        return points
    w = p.weights.to("cpu", torch.float64)
    return replace(points, weights=w / w.sum(), effective=effective_sample_size(w.log()))


def _minimises_on_states(family: Family, access: Access) -> bool:
    """Return whether a family has probabilities of states rather than a density: a solver of reverse KL on states takes it."""
    from whichkl.solvers import SOLVERS

    return any(kind.solves(ReverseKL(), family, access) for kind in SOLVERS)


def _row_solver(family: Family) -> Solver:
    """Return the first solver that fits a family to samples."""
    from whichkl.solvers import solver_for  # the registry, which holds this solver too

    return solver_for(ForwardKL(), family, Access.SAMPLES)


def _fits_rows(family: Family) -> bool:
    """Return whether a solver fits a family to samples."""
    from whichkl.solvers import SOLVERS

    return any(kind.solves(ForwardKL(), family, Access.SAMPLES) for kind in SOLVERS)
