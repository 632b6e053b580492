"""Population: forward KL where log p can be evaluated: points of p, then rounds of draws of q that are reweighted to p."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, TargetError, cannot
from whichkl.access import Access
from whichkl.divergences import Estimate
from whichkl.families import BlockMixture, Family
from whichkl.families.family import log_likelihood
from whichkl.importance import effective_sample_size
from whichkl.objectives import ForwardKL, ReverseKL
from whichkl.particles.located import ISLANDS, located_particles
from whichkl.particles.pool import Points, Pool
from whichkl.solvers.particles.separable import separated, solve_blocks
from whichkl.solvers.particles.value import Proposal, are_trusted, enumerated, measured, tail
from whichkl.solvers.resolve import resolve
from whichkl.solvers.rows.rows import FRESH, log_prob_at_points
from whichkl.solvers.solver import Optimum, Solution, Solver, check_counts
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
        return is_taken and _row_solver(family) is not None

    def solve(self, target: Target, family: Family, seed: int, work: Work = QUIET, stride: int = 0) -> Solution:
        """Find points of p, fit, and improve the fit by its own draws."""
        work.tell("moving particles to the target", math.nan)
        has_samples, has_states = target.samples is not None, Access.ENUMERABLE in target.access
        if isinstance(family, BlockMixture) and not target.access.can_sample:
            family, point = separated(target, family, seed)
            if point is not None and len(family.columns(target.dim)) > 1:
                least = max(_MIN_PARTICLES_OF_BLOCK, self.particles // len(family.columns(target.dim)) // ISLANDS * ISLANDS)
                each = replace(self, particles=least, draws=self.draws or _DRAWS_OF_BLOCK)
                return solve_blocks(each, target, family, point, seed, work)
        points, held, doubts = self._points(target, seed)
        rows = target if has_samples else _rows(target, points.x, points.weights)
        fitted, curve, notes = (family, None, ()) if has_samples else resolve(rows, family, seed, work.quiet())
        engine = _row_solver(fitted)
        if engine is None or rows.samples is None:
            raise TypeError(family)
        work.tell("fitting the points", math.nan)
        fitted.check_samples(rows.samples, target.names)
        first = engine.solve(rows, fitted, seed, work.quiet(), stride if has_samples else 0)
        run = _Rounds(target, fitted, engine, points, first)
        rounds = 0 if has_states else self.rounds if engine.refits else min(1, self.rounds)
        for i in range(rounds):
            count = self._draws(fitted, target)
            if count < _MIN_DRAWS_UNDER_BUDGET:
                break
            work.tell(f"round {i + 1}: draws of the model are weighted", math.nan)
            gain = run.draw(count, seed + _SEEDS_APART * (i + 1))
            khat = tail(run.ratio)
            if has_samples and not are_trusted(run.ratio, khat):
                note = f"k̂ of p/q is {khat:.2f}, too large for weights, so that this is the fit to the samples alone"
                return replace(first, notes=(*first.notes, note))
            run.fit(seed)
            if gain < _MIN_GAIN:
                run.settled = True
                break
        drawn = f"{sum(run.counts):,} draws of {len(run.proposals)} models were weighted to p"
        told = (f"{drawn}; those of the last model had an ESS of {run.ess:.1%}",) if run.proposals else ()
        found = run.solution(is_last=len(run.proposals) == rounds <= 1)
        value, log_z = self._value(target, held, run.proposal, seed)
        # What the fit of rows doubts is its value on them; here the value is measured by log p on other points.
        doubts = doubts if run.ess < _MIN_ESS and not has_states else ()
        notes = (*found.notes, *notes, *told)
        return replace(found, notes=notes, doubts=doubts, value=value, log_z=log_z, family=fitted, curve=curve)

    def _value(self, target: Target, held: Points, proposal: Proposal, seed: int) -> tuple[Estimate | None, Estimate | None]:
        """Measure forward KL on points that weren't fitted and on fresh draws; a sampler gives better ones, later."""
        if Access.ENUMERABLE in target.access:
            return enumerated(target, proposal.model), None
        left = target.evaluations.most - target.evaluations.total
        count = int(min(self.draws or _DRAWS_FOR_VALUE, left))
        if target.sampler is not None or count < _MIN_DRAWS_UNDER_BUDGET:
            return None, None
        return measured(held, proposal, target, count, seed + _SEEDS_APART * (self.rounds + 1))

    def _points(self, target: Target, seed: int) -> tuple[Points, Points, tuple[str, ...]]:
        """Return points of p to fit to, points for the value, and doubts about them, in the coordinates of the target."""
        if target.access.can_sample:
            p = target.thinned()[0]
            x = (p.draws(self.particles, seed) if p.samples is None else p.samples).to("cpu", torch.float64)
            w = torch.ones_like(x[:, 0]) if p.weights is None else p.weights.to("cpu", torch.float64)
            own = torch.arange(len(x), device="cpu")
            points = Points(x, log_prob_at_points(target, x), w / w.sum(), own, effective_sample_size(w.log()))
            return points, points, ()
        if Access.ENUMERABLE in target.access:
            x, log_p = (one.to("cpu", torch.float64) for one in target.atoms)
            points = Points(x, log_p, log_p.softmax(0), torch.arange(len(x), device="cpu"), float(len(x)))
            return points, points, ()
        if target.bijection.is_discrete:
            because = "it is discrete, and its states are too many to be listed"
            raise TargetError(cannot("find points of this target", because, "Give `samples=` of it, or minimise reverse KL"))
        free = target.unconstrained()
        found = located_particles(free, self.particles, seed)
        points = Points.of_particles(found)
        if not target.bijection.is_real:
            x = target.bijection.forward(points.x)
            points = replace(points, x=x, log_p=points.log_p - target.bijection.log_jacobian(points.x, x))
        doubts = []
        if found.log_z_stderr > _MAX_STDERR_OF_LOG_Z:
            doubts.append(f"independent groups of particles disagree on log Z by {found.log_z_stderr:.1f}")
        if found.acceptance < _MIN_ACCEPTANCE:
            doubts.append(f"only {found.acceptance:.0%} of the particles' moves were accepted")
        is_held = points.groups % _HELD_ISLANDS == 0
        return points.take(~is_held), points.take(is_held), tuple(doubts)

    def _draws(self, family: Family, target: Target) -> int:
        """Return the number of draws of the next round."""
        least = _MIN_DRAWS if target.samples is None else _MIN_DRAWS_WITH_SAMPLES
        count = self.draws or min(FRESH, max(least, _rows_to_determine(family, target.dim)))
        left = target.evaluations.most - target.evaluations.total
        return count if left == math.inf else min(count, int(_SHARE_OF_BUDGET * left))


class _Rounds:
    """The points and all draws so far, log p there, and the log density of every model that was drawn from."""

    def __init__(self, target: Target, family: Family, engine: Solver, points: Points, first: Solution) -> None:
        self.target, self.family, self.engine, self.points = target, family, engine, points
        self.last, self.model, self.iterations, self.settled = first, first.best.model, first.iterations, False
        self.x, self.log_p, self.weights = points.x, points.log_p, points.weights
        self.log_q = points.log_p.new_zeros(0, len(points.x))
        """Of each proposal at each point and draw."""
        self.proposals: list[Proposal] = []
        self.counts: list[int] = []
        self.ess, self.ratio = 0.0, points.log_p[:0]
        """The ESS of the last model's draws, as a share, and the logarithms of the last draws' weights."""

    @property
    def proposal(self) -> Proposal:
        """The model, and a wider law around the points as they are weighted."""
        return Proposal.around(self.model, self.x, self.weights)

    def draw(self, count: int, seed: int) -> float:
        """Draw from the model, weight all points and draws, and return the gain of the ESS since the last round, as a share."""
        before, proposal = self.ess if self.proposals else -math.inf, self.proposal
        x, log_p = proposal.draw(self.target, count, seed)
        by_others = [one.log_prob(x, log_likelihood(one.model, x).detach()) for one in self.proposals]
        self.proposals.append(proposal)
        self.counts.append(count)
        self.x, self.log_p = torch.cat([self.x, x]), torch.cat([self.log_p, log_p])
        log_q = log_likelihood(self.model, self.x).detach()
        mine = proposal.log_prob(self.x, log_q)
        earlier = torch.cat([self.log_q, torch.stack(by_others)], 1) if by_others else mine.new_zeros(0, len(mine))
        self.log_q = torch.cat([earlier, mine[None]])
        own = (log_p - log_q[-count:])[: proposal.own(count)]
        self.ess, self.ratio = effective_sample_size(own) / len(own), log_p - mine[-count:]
        shares = torch.tensor(self.counts, dtype=torch.float64, device="cpu").log() - math.log(sum(self.counts))
        log_m = torch.logsumexp(self.log_q + shares[:, None], 0)
        self.weights = Pool.of(self.points, self.log_p[len(self.points.x) :], log_m).weights
        return self.ess - before

    def fit(self, seed: int) -> None:
        """Fit to all points and draws, from the model as it is."""
        used = self.weights > 0
        rows = _rows(self.target, self.x[used], self.weights[used])
        self.last = self.engine.near(self.model, 0.0).solve(rows, self.family, seed)
        self.model, self.iterations = self.last.best.model, self.iterations + self.last.iterations

    def solution(self, *, is_last: bool) -> Solution:
        """Return the model, with its cross-entropy on the weighted points and draws."""
        log_q = log_likelihood(self.model, self.x).detach()
        loss = -float(torch.where(self.weights > 0, self.weights * log_q, 0.0).sum())
        best = Optimum(self.model, loss, self.last.best.converged and (self.settled or is_last), is_global=True)
        return Solution((best,), self.iterations, self.last.residual, notes=self.last.notes, history=self.last.history)


def is_worth_its_density(target: Target, family: Family) -> bool:
    """Return whether samples are so few for the family that the density adds to them: fewer than 100 rows per parameter.

    The density of a converted target is itself an estimate, which adds nothing to its samples.
    """
    x, w = target.samples, target.weights
    is_plain = x is not None and target.sampler is None and target.context is None and not isinstance(target.origin, Origin)
    if x is None or not is_plain or not Population.covers(family, target.access):
        return False
    engine = _row_solver(family)
    count = len(x) if w is None else effective_sample_size(w.log())
    return engine is not None and engine.refits and count < _rows_to_determine(family, target.dim)


def _rows_to_determine(family: Family, dim: int) -> int:
    """Return 100 rows per parameter, of which there are about as many as numbers in the fewest rows that determine a model."""
    return _ROWS_PER_PARAMETER * family.minimum_rows(dim) * dim


def _rows(target: Target, x: Float[Tensor, "n d"], w: Float[Tensor, " n"]) -> Target:
    """Return a target that has weighted rows alone."""
    return Target(samples=x, weights=w, names=target.names, support=target.bijection.constraints)


def _minimises_on_states(family: Family, access: Access) -> bool:
    """Return whether a family has probabilities of states rather than a density: a solver of reverse KL on states takes it."""
    from whichkl.solvers import SOLVERS

    return any(kind.solves(ReverseKL(), family, access) for kind in SOLVERS)


def _row_solver(family: Family) -> Solver | None:
    """Return the first solver that fits a family to samples."""
    from whichkl.solvers import SOLVERS  # the registry, which holds this solver too

    able = (kind() for kind in SOLVERS if kind.solves(ForwardKL(), family, Access.SAMPLES))
    return next(able, None)
