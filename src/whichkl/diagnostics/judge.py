"""Judge: measure a fit with the available access, on draws that it hasn't seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.cluster import Threads
from whichkl.diagnostics.between import between_value
from whichkl.diagnostics.beyond import mass_beyond_draws
from whichkl.diagnostics.columns import beyond_the_ends, like_an_index
from whichkl.diagnostics.consistency import MAX_LINES, accesses_disagree, jumps
from whichkl.diagnostics.findings import MIN_SPREAD_RATIO, find, names_richer
from whichkl.diagnostics.held_out import forward_value, in_sample
from whichkl.diagnostics.judged_fit import JudgedFit
from whichkl.diagnostics.linear_response import spread_ratios
from whichkl.diagnostics.mode_search import missing_modes, particles_for
from whichkl.diagnostics.models import model_target
from whichkl.diagnostics.result import Diagnostics, Judgement, draws_in
from whichkl.diagnostics.suggestions import allowed
from whichkl.diagnostics.unseen_rows import stride_of, unseen
from whichkl.diagnostics.unvisited import unvisited_modes
from whichkl.diagnostics.weights import by_weights, reverse_value
from whichkl.divergences import Estimate
from whichkl.families import Gaussian
from whichkl.goodness import MAX_ROWS_COMPARED, MAX_ROWS_RANKED, transform_calibration, two_sample_test
from whichkl.objectives import UpTo
from whichkl.process.seeds import seeded
from whichkl.targets import Target

Draws = Float[Tensor, "n d"] | None
_ROWS_COMPARED, _ROWS_RANKED = 2_000, 5_000
"""Numbers of unseen rows for the two-sample test and for the calibration, unless everything is measured."""
_MIN_DRAWS, _MIN_PARTICLES = 1_000, 128
"""Least numbers of draws of the model and of particles, however costly the log density is."""
_EVALUATIONS_PER_PARTICLE = 40
"""About the number of gradients that a particle of the search for missing modes takes."""
_MAX_ERRORS_FROM_ZERO, _ROUNDING = 6, 1e-3
"""Standard errors, and nats, by which log Z of a normalised density may differ from 0."""
_UNSEEN_LABEL = (
    "a label of a held-out row is in no other row, so the value is infinite: use Product(smoothing=1.0), or drop such rows"
)
_NOTHING_UNSEEN = "everything but the value on what was fitted"


def judge(fit: JudgedFit, *, whole: bool = True) -> Judgement:
    """Measure a fit; if not `whole`, only on the rows that were fitted.

    A diagnostic that fails becomes a note and the finding `not_measured`; the fit is kept.

    Raises:
        TargetError: the target was given as normalised, and the KL would be negative.
    """
    target, objective, solution, measured = fit.target, fit.objective, fit.solution, fit.measured
    d = Diagnostics(solution.optima, solution.iterations, solution.residual, solution.nodes, solution.node_error)
    d = replace(d, history=solution.history, notes=_notes(fit, whole))
    value: Estimate | None
    said = ""
    if objective.direction == "forward" and not whole and target.samples is not None:
        value = measured("the value on the fitted rows", lambda: in_sample(target, fit.model), None)
    else:
        d, draws = _with_weights(fit, d)
        value, d = _value(fit, d)
        unvisited, said = _unvisited(fit, draws) if whole else (None, "")
        d = _with_landscape(fit, d, draws, unvisited, whole)
    is_measured = value is not None
    value = _substitute(fit) if value is None else value
    if solution.doubts:
        value = replace(value, reliable=False, notes=(*value.notes, *solution.doubts))
    if fit.chains_apart:
        value = replace(value, reliable=False, notes=(*value.notes, fit.chains_apart))
    if said:
        d = replace(d, notes=(*d.notes, said))
        value = replace(value, reliable=False, notes=(*value.notes, said)) if objective.reads_p else value
    if fit.masses:
        value = replace(value, reliable=False, notes=(*value.notes, f"{fit.masses}, where no density has mass"))
    if origin := fit.doubted_origin:
        value = replace(value, reliable=False, notes=(*value.notes, origin.trust))
    if objective.direction == "forward" and getattr(solution.best.model, "is_bound", False):
        note = "only a lower bound of the model's log density is known, so this is an upper bound of the cross-entropy"
        value = replace(value, method=f"{value.method}, a bound", notes=(*value.notes, note))
    if is_measured and value.up_to is None and value.value + 6 * value.stderr < -1e-6:
        because = f"`normalized=True` was given, and the KL would be {value.number} nats, below 0: its integral isn't one"
        raise TargetError(cannot("use this target", because, "Normalise it, or pass `normalized=False`"))
    _refuse_unnormalized(target, d.log_z)
    disagree = measured("the agreement of draws and log density", lambda: accesses_disagree(target, fit.seed), False)
    findings = find(fit, value, d, disagree=disagree or bool(said))
    if names_richer(findings):
        d = replace(d, richer=measured("which richer family the rows allow", lambda: allowed(fit, d), None))
    unseen_label = [_UNSEEN_LABEL] * (value.value == math.inf and bool(target.reading.categories))
    left_out = tuple(fit.left_out) if whole else (_NOTHING_UNSEEN,)
    budget = f"to cost no more than the fit, judging took {', '.join(left_out)}; `fit.check()` takes all"
    notes = (*target.notes, *fit.notes, *d.notes, *unseen_label, *measured.notes, *([budget] if fit.left_out and whole else []))
    d = replace(d, evaluations=dict(target.evaluations), notes=notes, curve=fit.curve, left_out=left_out)
    value, d = _resting_on(target.origin, value, d)  # last: the findings are about the target as it was converted
    return Judgement(value, d, "converged" if solution.best.converged else "stopped", findings)


def _resting_on(origin: Any, value: Estimate, d: Diagnostics) -> tuple[Estimate, Diagnostics]:
    """Name the constant that the target is known up to in every estimate about it."""
    measured = {name: getattr(d, name) for name in ("elbo", "log_z", "held_out")}
    found = {name: one.resting_on(origin) for name, one in measured.items() if one is not None}
    return value.resting_on(origin), replace(d, **found)


def _refuse_unnormalized(target: Target, log_z: Estimate | None) -> None:
    """Refuse a density that was given as normalised if log Z, where it can be relied on, isn't 0."""
    if not target.normalized or log_z is None or not log_z.reliable:
        return
    if abs(log_z.value) > _MAX_ERRORS_FROM_ZERO * log_z.stderr + _ROUNDING:
        because = f"`normalized=True` was given, and the log of its integral is {log_z.number}"
        raise TargetError(cannot("use this target", because, "Normalise it, or pass `normalized=False`"))


def _notes(fit: JudgedFit, whole: bool) -> tuple[str, ...]:
    """What the solver, the columns' ends and repeated rows have to be reported for."""
    ends: tuple[str, ...] = ()
    if fit.objective.direction == "forward" and whole and fit.family.carried:
        what = "mass beyond the ends of the columns"
        ends = fit.measured(what, lambda: beyond_the_ends(fit.target, fit.model, fit.seed), ())
    density = fit.target.density
    said = "" if density is None else density.raising.said
    raised = [f"at some points the log density couldn't be evaluated: {said}"] if said else []
    repeats = [] if fit.target.repeats is None else [fit.target.repeats.note]
    return (*fit.solution.notes, *ends, *like_an_index(fit.target), *repeats, *raised)


def _with_weights(fit: JudgedFit, d: Diagnostics) -> tuple[Diagnostics, Draws]:
    """Add the ELBO and importance weights, where log p can be evaluated; return the draws if they are in free coordinates."""
    if not fit.target.access.can_evaluate:
        return d, None

    def drawn() -> tuple[Target, Float[Tensor, "n d"]]:
        q = model_target(fit.model, fit.target)
        count = fit.at_most("draws of the model for the ELBO", draws_in(q.dim), max(_MIN_DRAWS, fit.affordable // 3))
        return q, q.draws(count, fit.seed + 1)  # another seed than that of draws which the solver has used

    found = fit.measured("a sample of the model", drawn, None)
    if found is None:
        return d, None
    (q, draws), separate = found, fit.objective.direction == "reverse"
    d = fit.measured("the ELBO", lambda: by_weights(fit.target, fit.family, q, draws, d, separate=separate), d)
    if fit.objective.reads_p and d.log_weights is not None:
        largest, most = float(d.log_weights.max()), len(d.log_weights)  # a costly density allowed no more
        beyond = lambda: mass_beyond_draws(fit.target, q, largest, fit.seed + 12, most)  # noqa: E731
        d = replace(d, beyond=fit.measured("the mass that weights miss", beyond, None))
    return d, draws.to(torch.float64) if fit.target.bijection.is_real else None


def _value(fit: JudgedFit, d: Diagnostics) -> tuple[Estimate | None, Diagnostics]:
    """Estimate the objective on unseen draws, and test unseen rows against the model."""
    target, objective, solution = fit.target, fit.objective, fit.solution
    if objective.direction == "reverse":
        return fit.measured("reverse KL", lambda: reverse_value(target, model_target(fit.model, target), d), None), d
    what = "unseen draws" if objective.is_between else "unseen rows"
    fit.work.tell(f"judging the fit on {what}", float("nan"))
    value: Estimate | None
    if objective.direction == "forward":
        value, d = fit.measured(f"the value on {what}", lambda: forward_value(fit, d), (None, d))
        return value, _with_tests(fit, d)
    args = (target, objective, fit.model, solution, stride_of(target, fit.solver), fit.seed)
    value = fit.measured(f"the value on {what}", lambda: between_value(*args), None)
    return value, d if solution.held is None else _with_tests(fit, d)


def _with_tests(fit: JudgedFit, d: Diagnostics) -> Diagnostics:
    """Add the classifier two-sample test and the calibration of the probability integral transform, on unseen rows.

    Draws of chains are left out: they aren't independent, and a test would reject for that alone.
    """
    target, measured = fit.target, fit.measured
    if target.chains is not None or target.sampler is not None or fit.solution.value is not None:
        return d
    what = "a model without the unseen rows"
    found = measured(what, lambda: unseen(target, fit.family, fit.solver, fit.solution, fit.seed), None)
    if found is None:
        return d
    block, model = found
    are_weighted = target.weights is not None or target.repeats is not None
    rows = (block.x, block.w if are_weighted else None, block.context, model)
    compared = fit.at_most("rows for the two-sample test", min(len(block.x), MAX_ROWS_COMPARED), _ROWS_COMPARED)
    ranked = fit.at_most("rows for the calibration", min(len(block.x), MAX_ROWS_RANKED), _ROWS_RANKED)
    tests: list[Callable[[], Any]] = [
        lambda: measured("the two-sample test", lambda: two_sample_test(*rows, fit.seed, compared), None),
        lambda: measured("the calibration", lambda: transform_calibration(*rows, target.names, fit.seed, ranked), None),
    ]
    # Side by side where they are long, and run no code of the user's, which may belong to this thread.
    beside = fit.solver.refits and compared >= _ROWS_COMPARED
    two_sample, calibration = Threads().map(lambda test: test(), tests) if beside else (test() for test in tests)
    return replace(d, held=block, two_sample=two_sample, calibration=calibration)


def _unvisited(fit: JudgedFit, draws: Draws) -> tuple[Float[Tensor, "k d"] | None, str]:
    """Return modes of the log density that the samples don't reach, and the heaviest in words; None where there are none."""
    search = lambda: unvisited_modes(fit.target, draws, fit.seed)  # noqa: E731
    modes, said = fit.measured("whether the samples reach the log density's modes", search, (None, ""))
    return modes if said else None, said


def _with_landscape(
    fit: JudgedFit, d: Diagnostics, draws: Draws, unvisited: Float[Tensor, "k d"] | None, whole: bool
) -> Diagnostics:
    """Add what log p is like where the fit is and where it isn't, for objectives whose draws are q's alone."""
    if fit.objective.direction == "reverse":
        d = fit.measured("the spread by linear response", lambda: _with_spreads(fit, d), d)
        d = replace(d, jump=fit.measured("the jump of log p", lambda: _jump(fit, draws), None))
    if not whole or fit.objective.reads_p:
        return d
    fit.work.tell("looking for modes that the fit misses", float("nan"))
    most = particles_for(fit.target)
    few = max(_MIN_PARTICLES, 1 << (max(1, fit.affordable // _EVALUATIONS_PER_PARTICLE).bit_length() - 1))
    count = most if most is None else fit.at_most("particles in the search for missing modes", most, few)
    largest = None if d.log_weights is None else float(d.log_weights.max())
    p = fit.target if unvisited is None else fit.target.starting_at(unvisited)
    search = lambda: missing_modes(p, fit.solution, fit.seed, draws, count, largest)  # noqa: E731
    found = fit.measured("the mass at missing modes", search, None)
    if found is None:
        return d
    least = max(d.least_kl or 0.0, found.least_kl) if found.found else d.least_kl
    return replace(d, missing_modes=found, beyond=found.beyond, least_kl=least)


def _with_spreads(fit: JudgedFit, d: Diagnostics) -> Diagnostics:
    """Add by how much mean field understates spreads, and a note that names the column where it does so most."""
    if not (isinstance(fit.family, Gaussian) and fit.family.covariance == "diagonal" and fit.solution.best.converged):
        return d
    free = fit.target.unconstrained()
    ratios = spread_ratios(free, fit.solution.best.model, fit.seed)
    if ratios is None:
        return d
    ratio, worst = float(ratios.max()), free.names[int(ratios.argmax())]
    where = "" if fit.target.bijection.is_real else " (in free coordinates)"
    note = f"by linear response `{worst}` is {ratio:.3g} times as wide as in the model{where}, more than any other"
    return replace(d, understated=ratio, notes=(*d.notes, note) if ratio >= MIN_SPREAD_RATIO else d.notes)


def _jump(fit: JudgedFit, draws: Draws) -> float | None:
    if fit.target.bijection.is_discrete or fit.target.line_integral is not None:  # that is the integral of the gradient
        return None
    count = 2 * MAX_LINES
    if draws is None:
        with seeded(fit.seed + 4), torch.no_grad():
            draws = fit.solution.best.model.sample((count,)).reshape(count, -1).to(torch.float64)
    return jumps(fit.target.unconstrained(), draws[:count])


def _substitute(fit: JudgedFit) -> Estimate:
    """The mean over the fitted rows, or the solver's loss, in place of a value that couldn't be measured; not reliable."""
    is_forward = fit.objective.direction == "forward"
    if is_forward and fit.target.samples is not None:
        value = fit.measured("the value on the fitted rows", lambda: in_sample(fit.target, fit.model), None)
        if value is not None:
            return value
    note = "it couldn't be measured on draws that the fit hasn't seen, and this is the loss that the solver minimised"
    up_to: UpTo = "entropy_p" if is_forward else None if fit.target.normalized else "log_z"
    loss = fit.solution.best.loss
    return Estimate(fit.objective.quantity, loss, up_to=up_to, method="loss of the solver", reliable=False, notes=(note,))
