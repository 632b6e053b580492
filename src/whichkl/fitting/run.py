"""fit: target, family, objective → the model, how well it does, and what to do next."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from whichkl._arguments import typed
from whichkl._checks import LARGEST, InputError, RowError, TargetError, cannot, check_scales, check_seed
from whichkl.advice import Advice, advise, default_family
from whichkl.cluster import Workers, workers_of
from whichkl.diagnostics import JudgedFit, Judgement, carried, stride_of
from whichkl.diagnostics import judge as judge_fit
from whichkl.families import Family, Gaussian, Mixture, NetworkFamily, family_of
from whichkl.families.family import cast
from whichkl.families.named import conditional_families
from whichkl.files.journal import Journal
from whichkl.fitting.checking import STEP_NUMBERS
from whichkl.fitting.result import Fit
from whichkl.objectives import OBJECTIVES, Objective, objective_of
from whichkl.process.memory import LOG_DENSITY_BYTES, check_memory, keep_memory
from whichkl.process.threads import threads_for
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import with_progress
from whichkl.samples.table import places_of_rows
from whichkl.solvers import Population, Solver, solver_for
from whichkl.solvers.particles.population import is_worth_its_density
from whichkl.solvers.resolve import resolve
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.fingerprint import code_version, target_fingerprint
from whichkl.targets.supports import Bijection

_MAX_SEED = 2**31
"""Seeds of parts of a fit are computed from its seed, and torch takes 64 bits."""
_MAX_RESTARTS = 2
"""How often a fit starts again from modes that it misses."""
_MAX_HELD_MODES = 20
"""How many modes a model that is no Gaussian and no mixture may hold: as many as a mode search names."""

_CLUSTER_UNUSED = "the cluster wasn't used: only passes over samples are spread over it, and this objective reads none"
_SMALLER = "Use Gaussian('diagonal'), whose memory grows in proportion to the dimensions, or a machine with more of it"


@typed
@with_progress("fitting")
@plain_modes()
def fit(
    target: Any,
    family: Family | nn.Module | str | None = None,
    *,
    objective: Objective | str | None = None,
    solver: Solver | str | None = None,
    seed: int = 0,
    cluster: Workers | str | None = None,
    judge: bool = True,
    journal: str | os.PathLike[str] | None = None,
    tell: Callable[[str, float], None] | None = None,
) -> Fit:
    """Fit a family to a target by the objective that its access allows.

    Args:
        target: a `Target`, or anything that `Target.of` takes. Pairs (x, y) make a conditional fit, q(y|x): its loss is
            the cross-entropy, KL(p‖q) + H(p), as in supervised learning.
        family: which models are allowed, or their name, such as ``"mixture:auto"``; by default a full Gaussian, or independent
            columns of categories for a discrete target. A `torch.nn.Module` whose `forward()`, or `forward(x)` for pairs,
            returns a `Distribution` is copied and trained.
        objective: an objective or its name, with its parameter as in ``"jeffreys:0.3"``; by default the only possible one, or
            forward KL if both directions are possible.
        solver: a solver or its name; by default the best for the job.
        seed: fixes every random choice; the same seed gives the same fit.
        cluster: ``"auto"`` or the address of a Ray cluster, on whose machines passes over the samples run; the answer is
            the same to the last bit.
        judge: whether to hold rows out for diagnostics; otherwise the value is the in-sample mean, which its method reports.
        journal: a folder for the state of the fit; if the fit is interrupted, the same call resumes it. `fit` deletes the
            state at its end.
        tell: called with the current step and the fraction of it that is done, for a progress bar.

    Raises:
        InputError: samples or arguments can't be used.
        TargetError: the target can't do what the objective requires, or its log density is broken.
        ResourceError: the cluster can't be reached, or the journal can't be written.

    >>> result = fit(Target(log_prob=lambda x: -(x - 1).square().sum(-1), dim=2))
    >>> result.objective.name, result.status
    ('reverse_kl', 'converged')
    >>> [round(m, 6) for m in result.model.mean.tolist()]
    [1.0, 1.0]
    """
    seed = check_seed(seed, _MAX_SEED)
    given = Target.of(target)
    named = None if family is None else family_of(family)
    _check_pairs(given, named)
    family = with_categories(given, default_family(given) if named is None else named)
    log = None if journal is None else Journal.of(journal, _identity(given, family, objective, solver, seed), given.evaluations)
    work = Work(workers_of(cluster), tell or QUIET.tell, log, given.evaluations)
    p = given.noting_repeats() if judge else given
    with threads_for(STEP_NUMBERS * given.dim**2):
        done = solve(p, family, objective, solver, seed, work, judged=judge)
        if cluster is not None and done.objective.direction == "reverse":
            done = replace(done, notes=(*done.notes, _CLUSTER_UNUSED))
        done, judgement = _from_missing_modes(done, judge_fit(done, whole=judge))
    if log is not None:
        log.clear()
    return fit_of(done, judgement, given)


def with_categories(target: Target, family: Family) -> Family:
    """Have a family model the categories of a target, and refuse categories in x, which families take as numbers."""
    labels = target.reading.categories
    if in_x := [name for name in target.context_names if name in labels]:
        because = f"column `{in_x[0]}` of x holds categories, whose codes aren't numbers"
        raise InputError(cannot(f"fit `{family}`", because, "Drop that column, or give a column of 0 and 1 per label"))
    counts = [len(labels[name]) if name in labels else None for name in target.names]
    return family.with_categories(counts, target.names) if labels else family


def _from_missing_modes(done: JudgedFit, judgement: Judgement) -> tuple[JudgedFit, Judgement]:
    """Solve again from the modes that a fit misses if they outweigh those that it holds, and keep the better fit."""
    start, work = done.target, done.work
    for attempt in range(_MAX_RESTARTS):
        missing = judgement.diagnostics.missing_modes
        held = 1 if isinstance(done.family, Gaussian) else _MAX_HELD_MODES
        held = done.family.count if isinstance(done.family, Mixture) else held
        if missing is None or not missing.outweigh(held) or not done.solver.starts_from_modes(done.family) or work.is_spent:
            break
        work.tell("starting again from modes that the fit misses", float("nan"))
        modes = torch.tensor(missing.modes, dtype=torch.float64, device="cpu")
        start, part = start.starting_at(modes), work.under(f"again-{attempt}")
        before = done.solution.best.loss
        try:
            again = solve(start, done.family, done.objective, done.solver, done.seed, part, judged=True)
        except Exception as error:  # whatever it is, there is a fit already
            note = f"solving again from the missing modes failed ({error})".rstrip(".")
            d = replace(judgement.diagnostics, notes=(*judgement.diagnostics.notes, note))
            return replace(done, notes=(*done.notes, note)), replace(judgement, diagnostics=d)
        loss = again.solution.best.loss
        if not loss < before:  # also where the new loss isn't a number
            break
        note = f"modes with {missing.mass:.1%} of the mass were missed at first; solving again from them, the loss fell from "
        done = replace(again, curve=done.curve, notes=(*done.notes, f"{note}{before:.4f} to {loss:.4f}"))
        judgement = judge_fit(done)
    return done, judgement


def _identity(target: Target, family: Family, objective: Any, solver: Any, seed: int) -> dict[str, Any]:
    """Describe the fit that a journal belongs to: target, family, how it is fitted, and the version of the code."""
    stream = None if target.stream is None else target.stream.identity
    how = {"objective": str(objective), "solver": str(solver), "seed": seed, "family": family.config(), "code": code_version()}
    return {"target": target_fingerprint(target), "stream": stream, **how}


def _check_pairs(target: Target, family: Family | None) -> None:
    """Refuse pairs (x, y) for an unconditional family, and rows without x for a conditional one; None is the default family."""
    y = target.samples if target.stream is None else target.stream.first.x if target.stream.context_names else None
    if target.context_names and y is not None and (family is None or not family.conditional):
        do, because = f"fit `{family}` to this conditional target", "and this family is one distribution, not q(y|x)"
        if family is None:
            do, because = "fit this conditional target", "and no `family=` of y given x was named"
        kind, names = conditional_families(y)
        instead = f"Use {', '.join(f'`{name}`' for name in names)} of whichkl.families, or pass y alone"
        raise InputError(cannot(do, f"its samples are pairs (x, y), y holds {kind}, {because}", instead))
    if not target.context_names and family is not None and family.conditional and not family.optional_context:
        because = "it models y given x, and the samples aren't pairs"
        raise InputError(cannot(f"fit `{family}` to this target", because, "Pass `samples=(x, y)`"))


def fit_of(done: JudgedFit, judgement: Judgement, target: Target) -> Fit:
    """Return the fit of a target with its judgement."""
    return Fit(
        model=done.model,
        family=done.family,
        objective=done.objective,
        solver=done.solver.name,
        advice=done.advice,
        value=judgement.value,
        status=judgement.status,
        findings=judgement.findings,
        diagnostics=judgement.diagnostics,
        names=target.names,
        context_names=target.context_names,
        reading=target.reading,
        bijection=target.bijection if done.family.carried else Bijection(None, target.dim),
        seed=done.seed,
        target=target,
        parts=replace(done, target=target, work=QUIET),
    )


def solve(
    p: Target,
    family: Family,
    objective: Objective | str | None,
    solver: Solver | str | None,
    seed: int,
    work: Work,
    *,
    judged: bool,
) -> JudgedFit:
    """Choose objective and solver, and minimise; rows may be held out if the result will be `judged`.

    Raises:
        InputError: samples or arguments can't be used.
        TargetError: the target can't do what the objective requires, or its log density is broken.
    """
    free, before = p.unconstrained() if family.carried else p, work.evaluations.total
    _check_scales(free)
    is_left_to_solver = objective is not None and not p.access.can_sample and objective_of(objective).direction == "forward"
    family, curve, notes = (family, None, ()) if is_left_to_solver else resolve(p, family, seed, work)
    if p.access.can_evaluate:
        keep_memory(LOG_DENSITY_BYTES)
    advice = advise(p, family)
    chosen = _choose(objective, advice)
    engine = solver_for(chosen, family, p.access, solver)
    if solver is None and chosen.direction == "forward" and is_worth_its_density(p, family):
        engine = solver_for(chosen, family, p.access, Population.name)
    if free.samples is not None:
        try:
            family.check_samples(free.samples, p.names)
        except RowError as error:
            raise error.at(places_of_rows(p.table, [error.row])) from error
    if p.device.type == "cpu":
        check_memory(engine.least_memory(family, free.dim), f"fit `{family}` in {free.dim:,} dimensions", _SMALLER)
    is_judged = judged and chosen.direction != "reverse"
    solution = engine.solve(free, family, seed, work, stride_of(p, engine) if is_judged or p.stream is not None else 0)
    if math.isnan(solution.best.loss):
        because = f"the loss of `{family}` isn't a number: squares of some rows, or of their x, leave float64"
        raise InputError(cannot("use this target", because, f"Divide columns so that their numbers stay below {LARGEST:g}"))
    if p.dim == 1 and not p.scalar and hasattr(solution.best.model, "column"):  # y came as (n, 1), and events have its shape
        solution = replace(solution, optima=tuple(replace(o, model=replace(o.model, column=True)) for o in solution.optima))
    family, curve = solution.family or family, curve or solution.curve
    model = solution.best.model
    if isinstance(model, Distribution) and family.carried:
        model = cast(family, model, p.dtype, p.device)
    elif p.device.type != "cpu" and not isinstance(family, NetworkFamily):
        model = cast(family, model, torch.float64, p.device)
    model = carried(model, p.bijection) if family.carried else model
    spent = work.evaluations.total - before
    return JudgedFit(p, family, chosen, engine, solution, model, seed, work, advice, notes, curve, spent)


def _check_scales(free: Target) -> None:
    """Refuse rows in free coordinates whose squares leave float64; of a stream, the first block is checked."""
    x, context = free.samples, free.context
    if free.stream is not None:
        first = free.stream.first
        x, context = first.x if free.carrier is None else free.carrier.inverse(first.x), first.context
    if x is not None:
        check_scales(x, free.names)
    if context is not None:
        check_scales(context, free.context_names, "x")


def _choose(objective: Objective | str | None, advice: Advice) -> Objective:
    """Return the requested objective if the access allows it; without a request, the advised one."""
    if objective is None:
        if advice.best is None:
            apart = [why for name, why in advice.missing.items() if OBJECTIVES[name].requires.met_by(advice.access)]
            because = apart[0] if apart else f"{advice.situation[0].lower()}{advice.situation[1:-1]}"
            raise TargetError(cannot("fit this target", because, "See `whichkl.advise(target)` for what could be converted"))
        best: Objective = advice.best.objective
        return best
    wanted = objective_of(objective)
    if not wanted.requires.met_by(advice.access):
        because = f"it requires {wanted.requires.label}, but the target only has {advice.access.label}"
        able = f"Use `{type(advice.best.objective).__name__}`, or pass" if advice.best else "Pass"
        instead = f"{able} {' or '.join(sorted(wanted.requires.lacking(advice.access)))}"
        raise TargetError(cannot(f"use `{type(wanted).__name__}` with this target", because, instead))
    return wanted
