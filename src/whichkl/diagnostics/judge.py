"""Judge: measure a fit with the access that there is, on draws that it hasn't seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.diagnostics.between import between_value
from whichkl.diagnostics.ends import beyond_the_ends
from whichkl.diagnostics.findings import NARROW, accesses_disagree, find
from whichkl.diagnostics.held_out import forward_value, in_sample, stride_of, unseen
from whichkl.diagnostics.jumps import LINES, jumps
from whichkl.diagnostics.linear_response import spread_ratios
from whichkl.diagnostics.measured import Measured
from whichkl.diagnostics.mode_search import missing_modes
from whichkl.diagnostics.models import model_target
from whichkl.diagnostics.result import Diagnostics, Judgement, draws_in
from whichkl.diagnostics.weights import by_weights, reverse_value
from whichkl.divergences import Estimate
from whichkl.families import Family, Gaussian
from whichkl.goodness import transform_calibration, two_sample_test
from whichkl.objectives import Objective
from whichkl.process.seeds import seeded
from whichkl.solvers import Solution, Solver
from whichkl.solvers.work import Work
from whichkl.targets import Target


def judge(
    target: Target,
    family: Family,
    objective: Objective,
    solver: Solver,
    solution: Solution,
    model: Any,
    seed: int,
    work: Work,
    *,
    whole: bool = True,
) -> Judgement:
    """Measure a fit; with `whole=False` only by the rows that were fitted.

    A diagnostic that fails is a note and the finding `not_measured`: the fit is there, whatever is known of it.

    Raises:
        TargetError: the target was said to be normalised, and the KL would be negative.
    """
    measured = Measured()
    d = Diagnostics(solution.optima, solution.iterations, solution.residual, solution.nodes, solution.node_error)
    is_forward, is_between = objective.direction == "forward", objective.is_between
    ends: tuple[str, ...] = ()
    if is_forward and whole and family.carried:
        ends = measured("mass beyond the ends of the columns", lambda: beyond_the_ends(target, model, seed), ())
    repeats = () if target.repeats is None else (target.repeats.note,)
    d = replace(d, history=solution.history, notes=(*solution.notes, *ends, *repeats))
    value: Estimate | None
    if is_forward and not whole and target.samples is not None:
        value = measured("the value on the fitted rows", lambda: in_sample(target, model), None)
    else:
        free = None
        if target.access.can_evaluate:
            drawn = measured("a sample of the model", lambda: _drawn(model, target, seed), None)
            if drawn is not None:
                q, draws = drawn
                free = draws.to(torch.float64) if target.bijection.is_real else None
                separate = not (is_forward or is_between)
                d = measured("the ELBO", lambda: by_weights(target, family, q, draws, d, separate=separate), d)
        if is_forward:
            work.tell("judging the fit on unseen rows", float("nan"))
            what = "the value on unseen rows"
            value, d = measured(
                what, lambda: forward_value(target, family, solver, model, solution, d, seed, work, measured), (None, d)
            )
            d = _checked(target, family, solver, solution, d, seed, measured)
        elif objective.is_between:
            work.tell("judging the fit on unseen draws", float("nan"))
            stride = stride_of(target, solver)
            value = measured(
                "the value on unseen draws", lambda: between_value(target, objective, model, solution, stride, seed), None
            )
            if solution.held is not None:
                d = _checked(target, family, solver, solution, d, seed, measured)
            if whole and not objective.reads_p:
                work.tell("looking for modes that the fit misses", float("nan"))
                d = measured("the mass at missing modes", lambda: _searched(target, solution, free, d, seed), d)
        else:
            value = measured("reverse KL", lambda: reverse_value(target, model_target(model, target), d), None)
            d = measured("the spread by linear response", lambda: _with_spreads(target, family, solution, d, seed), d)
            d = replace(d, jump=measured("the jump of log p", lambda: _jump(target, solution, free, seed), None))
            if whole:
                work.tell("looking for modes that the fit misses", float("nan"))
                d = measured("the mass at missing modes", lambda: _searched(target, solution, free, d, seed), d)
    is_measured = value is not None
    value = _substitute(target, objective, model, solution, measured) if value is None else value
    if getattr(solution.best.model, "is_bound", False) and is_forward:
        note = "the model's log density is known by a lower bound alone, so that this is an upper bound of the cross-entropy"
        value = replace(value, method=f"{value.method}, a bound", notes=(*value.notes, note))
    if is_measured and value.up_to is None and value.value + 6 * value.stderr < -1e-6:
        because = f"`normalized=True` was said, and the KL would be {value.number} nats, below 0: its integral isn't one"
        raise TargetError(cannot("use this target", because, "Normalise it, or say `normalized=False`"))
    disagree = measured("the agreement of draws and log density", lambda: accesses_disagree(target, seed), False)
    findings = find(target, family, value, d, solution, objective, measured, disagree=disagree)
    d = replace(d, evaluations=dict(target.evaluations), notes=(*d.notes, *measured.notes))
    return Judgement(value, d, "converged" if solution.best.converged else "stopped", findings)


def _drawn(model: Any, target: Target, seed: int) -> tuple[Target, Float[Tensor, "n d"]]:
    """The model as a target, and draws of it."""
    q = model_target(model, target)
    return q, q.draws(draws_in(q.dim), seed + 1)


def _substitute(target: Target, objective: Objective, model: Any, solution: Solution, measured: Measured) -> Estimate:
    """The mean over the fitted rows, or the solver's loss, in place of a value that couldn't be measured; not reliable."""
    if objective.direction == "forward" and target.samples is not None:
        value = measured("the value on the fitted rows", lambda: in_sample(target, model), None)
        if value is not None:
            return value
    note = "it couldn't be measured on draws that the fit hasn't seen, and this is what the solver minimised"
    up_to: Literal["entropy_p", "log_z"] | None = "entropy_p" if objective.direction == "forward" else "log_z"
    up_to = None if target.normalized and not objective.direction == "forward" else up_to
    name = objective.quantity
    return Estimate(name, solution.best.loss, up_to=up_to, method="loss of the solver", reliable=False, notes=(note,))


def _with_spreads(target: Target, family: Family, solution: Solution, d: Diagnostics, seed: int) -> Diagnostics:
    """Add by how much mean field understates spreads, and a note that names the column where it does so most."""
    if not (isinstance(family, Gaussian) and family.covariance == "diagonal" and solution.best.converged):
        return d
    free = target.unconstrained()
    ratios = spread_ratios(free, solution.best.model, seed)
    if ratios is None:
        return d
    worst, ratio = int(ratios.argmax()), float(ratios.max())
    if ratio < NARROW:
        return replace(d, understated=ratio)
    where = "" if target.bijection.is_real else " (in free coordinates)"
    note = f"by linear response `{free.names[worst]}` is {ratio:.3g} times as wide as in the model{where}, more than any other"
    return replace(d, understated=ratio, notes=(*d.notes, note))


def _jump(target: Target, solution: Solution, draws: Float[Tensor, "n d"] | None, seed: int) -> float | None:
    if target.bijection.is_discrete or target.line_integral is not None:  # that is the integral of the gradient
        return None
    if draws is None:
        with seeded(seed + 4), torch.no_grad():
            draws = solution.best.model.sample((LINES * 2,)).reshape(LINES * 2, -1).to(torch.float64)
    return jumps(target.unconstrained(), draws[: LINES * 2])


def _searched(target: Target, solution: Solution, draws: Float[Tensor, "n d"] | None, d: Diagnostics, seed: int) -> Diagnostics:
    """Add the search for modes of p where the model never goes, and what they cost."""
    found = missing_modes(target, solution, seed, draws)
    least = max(d.least_kl or 0.0, found.least_kl) if found.found else d.least_kl
    return replace(d, missing_modes=found, least_kl=least)


def _checked(
    target: Target, family: Family, solver: Solver, solution: Solution, d: Diagnostics, seed: int, measured: Measured
) -> Diagnostics:
    """Add the classifier two-sample test and the calibration of the probability integral transform, on unseen rows.

    Draws of chains aren't independent, and a test would reject for that alone: they are left out.
    """
    if target.chains is not None or target.sampler is not None:
        return d
    found = measured("a model without the unseen rows", lambda: unseen(target, family, solver, solution, seed), None)
    if found is None:
        return d
    block, model = found
    are_weighted = target.weights is not None or target.repeats is not None
    rows = (block.x, block.w if are_weighted else None, block.context, model)
    return replace(
        d,
        held=block,
        two_sample=measured("the two-sample test", lambda: two_sample_test(*rows, seed), None),
        calibration=measured("the calibration", lambda: transform_calibration(*rows, target.names, seed), None),
    )
