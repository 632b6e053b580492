"""Solve: choose an objective and a solver, and minimise; the result isn't judged yet."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributions import Distribution

from whichkl._checks import LARGEST, InputError, TargetError, cannot, check_scales
from whichkl.advice import Advice, advise
from whichkl.diagnostics import Judgement, carried, stride_of
from whichkl.families import Family, NetworkFamily
from whichkl.families.family import cast
from whichkl.fitting.result import Fit
from whichkl.objectives import OBJECTIVES, Objective, objective_of
from whichkl.process.memory import LOG_DENSITY_BYTES, check_memory, keep_memory
from whichkl.solvers import Solution, Solver, solver_for
from whichkl.solvers.resolve import Curve, resolve
from whichkl.solvers.work import Work
from whichkl.targets import Target
from whichkl.targets.supports import Bijection

_SMALLER = "Use Gaussian('diagonal'), whose memory grows in proportion to the dimensions, or a machine with more of it"


@dataclass(frozen=True)
class Solved:
    """The result of a solver in the coordinates of the target, before it is judged."""

    model: Any
    family: Family
    objective: Objective
    solver: Solver
    solution: Solution
    advice: Advice
    curve: Curve | None
    notes: tuple[str, ...]

    def judged(self, target: Target, judgement: Judgement, seed: int) -> Fit:
        """Return the fit with its judgement."""
        d = judgement.diagnostics
        return Fit(
            model=self.model,
            family=self.family,
            objective=self.objective,
            solver=self.solver.name,
            advice=self.advice,
            value=judgement.value,
            status=judgement.status,
            findings=judgement.findings,
            diagnostics=replace(d, curve=self.curve, notes=(*self.notes, *d.notes)),
            names=target.names,
            bijection=target.bijection if self.family.carried else Bijection(None, target.dim),
            seed=seed,
            target=target,
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
) -> Solved:
    """Choose objective and solver, and minimise; rows may be held out if the result will be `judged`.

    Raises:
        InputError: samples or arguments can't be used.
        TargetError: the target can't do what the objective requires, or its log density is broken.
    """
    free = p.unconstrained() if family.carried else p
    _check_scales(free)
    family, curve, notes = resolve(p, family, seed, work)
    if p.access.can_evaluate:
        keep_memory(LOG_DENSITY_BYTES)
    advice = advise(p, family)
    chosen = _choose(objective, advice)
    engine = solver_for(chosen, family, p.access, solver)
    if free.samples is not None:
        family.check_samples(free.samples, p.names)
    if p.device.type == "cpu":
        check_memory(engine.least_memory(family, free.dim), f"fit `{family}` in {free.dim:,} dimensions", _SMALLER)
    is_judged = judged and chosen.direction != "reverse"
    solution = engine.solve(free, family, seed, work, stride_of(p, engine) if is_judged or p.stream is not None else 0)
    if math.isnan(solution.best.loss):
        because = f"the loss of `{family}` isn't a number: squares of some rows, or of their x, leave float64"
        raise InputError(cannot("use this target", because, f"Divide columns so that their numbers stay below {LARGEST:g}"))
    if p.dim == 1 and not p.scalar and hasattr(solution.best.model, "column"):  # y came as (n, 1), and events have its shape
        solution = replace(solution, optima=tuple(replace(o, model=replace(o.model, column=True)) for o in solution.optima))
    model = solution.best.model
    if isinstance(model, Distribution) and family.carried:
        model = cast(family, model, p.dtype, p.device)
    elif p.device.type != "cpu" and not isinstance(family, NetworkFamily):
        model = cast(family, model, torch.float64, p.device)
    model = carried(model, p.bijection) if family.carried else model
    return Solved(model, family, chosen, engine, solution, advice, curve, notes)


def _check_scales(free: Target) -> None:
    """Check the scales of rows in free coordinates; for a stream, of its first block.

    Raises:
        InputError: squares of some rows leave float64.
    """
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
            do, because = "fit this target", apart[0] if apart else f"{advice.situation[0].lower()}{advice.situation[1:-1]}"
            raise TargetError(cannot(do, because, "See `whichkl.advise(target)` for what could be converted"))
        return advice.best.objective
    wanted = objective_of(objective)
    if not wanted.requires.met_by(advice.access):
        because = f"it requires {wanted.requires.label}, but the target only has {advice.access.label}"
        able = f"Use `{type(advice.best.objective).__name__}`, or pass" if advice.best else "Pass"
        instead = f"{able} {' or '.join(sorted(wanted.requires.lacking(advice.access)))}"
        raise TargetError(cannot(f"use `{type(wanted).__name__}` with this target", because, instead))
    return wanted
