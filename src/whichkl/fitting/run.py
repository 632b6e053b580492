"""fit: target, family, objective → the model, how well it does, and what to do next."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from whichkl._checks import InputError, cannot
from whichkl.advice import default_family
from whichkl.cluster import Workers, workers_of
from whichkl.diagnostics import Judgement
from whichkl.diagnostics import judge as judge_fit
from whichkl.families import Family, Gaussian, Mixture, family_of
from whichkl.families.named import conditional_families
from whichkl.files.journal import Journal
from whichkl.fitting.result import Fit
from whichkl.fitting.solve import Solved, solve
from whichkl.objectives import Objective
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers import Solver
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.fingerprint import code_version, target_fingerprint

_MAX_SEED = 2**31
"""Seeds of parts of a fit are computed from its seed, and torch takes 64 bits."""
_MAX_RESTARTS = 2
"""How often a fit starts again from modes that it misses."""
_MAX_HELD_MODES = 20
"""How many modes a model that is no Gaussian and no mixture may hold: as many as a mode search names."""

_CLUSTER_UNUSED = "the cluster wasn't used: only passes over samples are spread over it, and this objective reads none"


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
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(cannot(f"use `seed={seed!r}`", "it isn't a whole number of at least 0", "Give, say, seed=0"))
    if seed >= _MAX_SEED:
        raise InputError(cannot(f"use `seed={seed}`", f"seeds are below {_MAX_SEED:,}", "Give, say, seed=0"))
    p = Target.of(target)
    given = p
    said = None if family is None else family_of(family)
    _check_pairs(p, said)
    family = default_family(p) if said is None else said
    log = None if journal is None else Journal.of(journal, _identity(p, family, objective, solver, seed), p.evaluations)
    work = Work(workers_of(cluster), tell or QUIET.tell, log, p.evaluations)
    p = p.noting_repeats() if judge else p
    done = solve(p, family, objective, solver, seed, work, judged=judge)
    if cluster is not None and done.objective.direction == "reverse":
        done = replace(done, notes=(*done.notes, _CLUSTER_UNUSED))
    judgement = judge_fit(p, done.family, done.objective, done.solver, done.solution, done.model, seed, work, whole=judge)
    done, judgement = _from_missing_modes(p, done, judgement, seed, work)
    if log is not None:
        log.clear()
    return done.judged(given, judgement, seed)


def _from_missing_modes(p: Target, done: Solved, judgement: Judgement, seed: int, work: Work) -> tuple[Solved, Judgement]:
    """Solve again from the modes that a fit misses if they outweigh those that it holds, and keep the better fit."""
    start = p
    for attempt in range(_MAX_RESTARTS):
        missing = judgement.diagnostics.missing_modes
        held = (
            done.family.count if isinstance(done.family, Mixture) else 1 if isinstance(done.family, Gaussian) else _MAX_HELD_MODES
        )
        if missing is None or not missing.outweigh(held) or not done.solver.starts_from_modes(done.family) or work.is_spent:
            break
        work.tell("starting again from modes that the fit misses", float("nan"))
        modes = torch.tensor(missing.modes, dtype=torch.float64, device="cpu")
        start, part = start.starting_at(modes), work.under(f"again-{attempt}")
        before = done.solution.best.loss
        try:
            again = solve(start, done.family, done.objective, done.solver, seed, part, judged=True)
        except Exception as error:  # whatever it is, there is a fit already
            note = f"solving again from the missing modes failed ({error})".rstrip(".")
            return replace(done, notes=(*done.notes, note)), judgement
        loss = again.solution.best.loss
        if not loss < before:
            break
        note = f"modes with {missing.mass:.1%} of the mass were missed at first; solving again from them, the loss fell from "
        done = replace(again, curve=done.curve, notes=(*done.notes, f"{note}{before:.4f} to {loss:.4f}"))
        judgement = judge_fit(start, done.family, done.objective, done.solver, done.solution, done.model, seed, part)
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
