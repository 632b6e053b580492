"""fit: target, family, objective → the model, how well it does, and what to do next."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution

from whichkl._checks import LARGEST, InputError, IntegrityError, TargetError, WhichklError, cannot, check_scales
from whichkl.advice import Advice, advise, default_family
from whichkl.cluster import Workers, workers_of
from whichkl.diagnostics import Diagnostics, Judgement, carried, explain, shown_weights, stride_of
from whichkl.diagnostics import judge as judge_fit
from whichkl.diagnostics import linear_response as responses
from whichkl.divergences import Estimate
from whichkl.families import Family, Gaussian, Mixture, NetworkFamily, family_from_config, family_of
from whichkl.families.conditional import conditional_families
from whichkl.families.family import cast
from whichkl.files.journal import Journal
from whichkl.fitting.correction import Expectation, Weighted, check_draws, draw, expectation
from whichkl.fitting.correction import corrected as corrected_points
from whichkl.fitting.fit_file import FIT, FitFields, described, rebuilt_fit, tensors_of
from whichkl.objectives import OBJECTIVES, Between, ForwardKL, Objective, objective_of
from whichkl.process.memory import LOG_DENSITY_BYTES, check_memory, keep_memory
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers import Solution, Solver, solver_for
from whichkl.solvers.resolve import Curve, resolve
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target
from whichkl.targets.fingerprint import code_version, target_fingerprint
from whichkl.targets.supports import Bijection

_CORRECTED = 10_000
_SMALLER = "Use Gaussian('diagonal'), whose memory grows in proportion to the dimensions, or a machine with more of it"
_MAX_RESTARTS = 2
"""How often a fit starts again from modes that it misses."""
_HELD = 20
"""How many modes a model other than a Gaussian or a mixture may hold: as many as a search names."""


@dataclass(frozen=True)
class Fit:
    """The result of `fit`."""

    model: Any
    """The fitted q, a `Distribution`: `log_prob`, `sample`, and `rsample` where it exists. Conditional: x ↦ `Distribution`."""
    family: Family
    objective: Objective
    solver: str
    advice: Advice
    value: Estimate
    """What was minimised, on draws that the fit hasn't seen, or exactly."""
    status: str
    """`converged` or `stopped`."""
    findings: frozenset[str]
    """Names from `diagnostics.FINDINGS`; `explanations` has the sentences, in the order of `sorted(findings)`."""
    diagnostics: Diagnostics
    names: tuple[str, ...]
    bijection: Bijection
    seed: int
    target: Target | None = None
    """What was fitted; None after `Fit.load`."""

    @property
    def explanations(self) -> tuple[str, ...]:
        """A sentence with the next step for each of `sorted(findings)`."""
        return explain(self.findings, self.family, self.diagnostics)

    def __str__(self) -> str:
        """A few lines: what was minimised, how it ended, the value, the findings."""
        d = self.diagnostics
        lines = [f"{self.objective.spec} over {self.family} by {self.solver}: {self.status}", f"  {self.value}"]
        if d.elbo is not None:
            weights = ""
            if d.ess is not None and d.elbo.n is not None:
                tail = shown_weights(d.ess, d.khat, d.elbo.n)
                weights = f", importance ESS {d.ess:,.0f} of {d.elbo.n:,}, PSIS k̂ {tail}"
            lines.append(f"  ELBO {d.elbo.number} nats{weights}")
        if len(d.optima) > 1:
            lines.append(f"  {len(d.optima)} distinct optima, losses " + ", ".join(f"{one.loss:.4f}" for one in d.optima))
        lines += [f"  {one}" for one in (d.two_sample, d.calibration) if one is not None and one.p_value is not None]
        lines += [f"  {one}" for one in (d.missing_modes,) if one is not None and (one.found or one.reason)]
        lines += [f"  {note}" for note in d.notes]
        return "\n".join(
            lines + [f"  {name}: {text}" for name, text in zip(sorted(self.findings), self.explanations, strict=True)]
        )

    @plain_modes()
    def draws(
        self, n: int = 1_000, *, corrected: bool = False, seed: int = 0, target: Target | None = None
    ) -> Float[Tensor, "n d"]:
        """Draw n points in the coordinates of the target: of q, or, corrected, of p as far as q leads to it.

        Args:
            n: how many.
            corrected: whether to resample draws of q by Pareto-smoothed importance weights, or, where k̂ forbids it, to move
                particles from q to p (`whichkl.fitting.correction.corrected` has the rules). Corrected points can repeat.
            seed: fixes the draws.
            target: what was fitted, for a fit that was loaded.

        Raises:
            InputError: the fit is conditional, or n isn't a whole number of at least 1.
            TargetError: there is no log density to correct by, or neither weights nor particles can be trusted.

        Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024); Dai, Heng, Jacob & Whiteley (2022).

        >>> fit(Target(log_prob=lambda x: -x.square().sum(-1), dim=2)).draws(5, corrected=True).shape
        torch.Size([5, 2])
        """
        check_draws(self.model, self.names, n)
        return draw(self.model, self._weighted(max(_CORRECTED, n), seed, target) if corrected else None, n, seed)

    @plain_modes()
    def expect(
        self,
        f: Callable[[Tensor], Any],
        *,
        corrected: bool = True,
        n: int = _CORRECTED,
        seed: int = 0,
        target: Target | None = None,
    ) -> Expectation:
        """Return E f(x) with its standard error, under p as far as q leads to it, or under q itself.

        Args:
            f: (n, d) → (n,) or (n, k), of points in the coordinates of the target.
            corrected: whether under p, by importance weights or particles as in `draws`.
            n: draws of q to begin with.
            seed: fixes the draws.
            target: what was fitted, for a fit that was loaded.

        Raises:
            InputError: the fit is conditional, f returns something else, or n isn't a whole number of at least 1.
            TargetError: there is no log density to correct by, or neither weights nor particles can be trusted.

        >>> print(fit(Target(log_prob=lambda x: -(x - 1).square().sum(-1) / 2, dim=2)).expect(lambda x: x[:, 0]))
        0.999 ± 0.01 (importance weights, 10,000 of 10,000)
        """
        check_draws(self.model, self.names, n)
        weighted = self._weighted(n, seed, target) if corrected else None
        return expectation(f, draw(self.model, None, n, seed) if weighted is None else weighted.x, weighted)

    @plain_modes()
    def linear_response(
        self, columns: Sequence[int | str] | None = None, *, target: Target | None = None
    ) -> Float[Tensor, "k d"]:
        """Return rows of the covariance that a mean-field fit by reverse KL implies by how its means answer to a tilt of p.

        Mean field keeps columns independent, and too narrow where they aren't. Σ = [∇² (−ELBO)]⁻¹, in the rows and columns of
        the means, has their correlations and spreads: exactly on a Gaussian target, to first order elsewhere.

        Args:
            columns: names or numbers of the rows wanted; unless said, all, up to 500 dimensions.
            target: what was fitted, for a fit that was loaded.

        Returns:
            Rows of Σ in the order of `columns`, in the squared units of x; where the target has a support other than ℝᵈ, in free
            coordinates (those of `diagnostics.optima`), in which columns have numbers alone unless there are d of them.

        Raises:
            InputError: it's another fit, a column isn't known, or all of more than 500 are asked for.
            TargetError: there is no target, the fit isn't a minimum, or the equations can't be solved to nine digits.

        Source: Giordano, Broderick & Jordan (2018); Giordano, Ingram & Broderick (2024).

        >>> tilted = Target(log_prob=lambda x: -(x[:, 0] ** 2 + x[:, 1] ** 2 - 1.2 * x[:, 0] * x[:, 1]) / 1.28, dim=2)
        >>> mean_field = fit(tilted, "gaussian:diagonal")
        >>> mean_field.model.variance, mean_field.linear_response(["x1"])
        (tensor([0.6400, 0.6400], dtype=torch.float64), tensor([[1.0000, 0.6000]], dtype=torch.float64))
        """
        p = self.target if target is None else Target.of(target)
        return responses(p, self.family, self.objective, self.diagnostics, columns, self.seed)

    def _weighted(self, n: int, seed: int, target: Target | None) -> Weighted:
        p = self.target if target is None else Target.of(target)
        return corrected_points(p, self.model, n, seed, misses_modes="modes_missing" in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the parameters as JSON can hold it."""
        return described(self)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `fit.json` and the weights that it names (every optimum's parameters, in free coordinates).

        An earlier fit in that folder is replaced in one step, when the new `fit.json` gets its name. If the process is killed
        before, the earlier fit stays as it was. Several processes may save into one folder: they wait for each other.

        Raises:
            InputError: the folder holds something other than a fit.
            ResourceError: it can't be written.
        """
        FIT.write(Path(folder), self.files())

    @plain_modes()
    def files(self) -> dict[str, bytes]:
        """Return what `save` writes: the weights under a name of their own, and `fit.json`, which names them."""
        return FIT.files(self.to_dict(), tensors_of(self.family, self.diagnostics.optima))

    @classmethod
    @plain_modes()
    def load(cls, folder: str | os.PathLike[str], family: Family | nn.Module | None = None) -> Fit:
        """Read a saved fit.

        Args:
            folder: what `save` was given.
            family: the family, or the module, where it isn't one of this library's.

        Raises:
            InputError: there is no fit in that folder.
            IntegrityError: a file was changed, cut short, or written by a newer version, or holds what no fit can hold.
            ResourceError: a file can't be read.
        """
        path = Path(folder)
        fields, tensors = FIT.read(path, FitFields)
        is_given = family is not None or fields["family"].get("family") == "Module"
        try:
            chosen = family_from_config(fields["family"]) if family is None else family_of(family)
            return cls(**rebuilt_fit(fields, tensors, chosen))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, IntegrityError) or (is_given and isinstance(error, WhichklError)):
                raise
            raise FIT.damaged(path, " ".join(str(error).split())[:300]) from error


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
        family: which models are allowed, or their name, such as ``"mixture:auto"``; a full Gaussian unless said, independent
            columns of categories where the target is discrete. A `torch.nn.Module` whose `forward()`, or `forward(x)` for pairs,
            returns a `Distribution` is copied and trained.
        objective: an objective or its name, with its parameter as in ``"jeffreys:0.3"``; unless said, the only possible one, and
            forward KL where both are.
        solver: a solver or its name; the best for the job unless said.
        seed: fixes every random choice; the same seed gives the same fit.
        cluster: ``"auto"`` or the address of a Ray cluster, on whose machines passes over the samples run; the answer is
            the same to the last bit.
        judge: whether to hold rows out and compare; without, the value is the in-sample mean, and says so.
        journal: a folder where the fit writes down how far it is; called again with the same arguments, a killed fit
            goes on from there. `fit` deletes it at its end.
        tell: called with what is being done and which fraction of it is done, for a progress bar.

    Raises:
        InputError: samples or arguments are bad.
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
    p = Target.of(target)
    given = p
    said = None if family is None else family_of(family)
    _check_pairs(p, said)
    family = default_family(p) if said is None else said
    log = None if journal is None else Journal.of(journal, _identity(p, family, objective, solver, seed))
    work = Work(workers_of(cluster), tell or QUIET.tell, log, p.evaluations)
    p = p.noting_repeats() if judge else p
    done = solve(p, family, objective, solver, seed, work, judged=judge)
    judgement = judge_fit(p, done.family, done.objective, done.solver, done.solution, done.model, seed, work, whole=judge)
    done, judgement = _from_missing_modes(p, done, judgement, seed, work)
    if log is not None:
        log.clear()
    return done.judged(given, judgement, seed)


def _from_missing_modes(p: Target, done: Solved, judgement: Judgement, seed: int, work: Work) -> tuple[Solved, Judgement]:
    """Solve again from the modes that a fit misses, where they hold more of p's mass than it reaches, and keep what is better."""
    start = p
    for attempt in range(_MAX_RESTARTS):
        missing = judgement.diagnostics.missing_modes
        held = done.family.count if isinstance(done.family, Mixture) else 1 if isinstance(done.family, Gaussian) else _HELD
        if missing is None or not missing.outweigh(held) or not done.solver.starts_from_modes(done.family) or work.is_spent:
            break
        work.tell("starting again from modes that the fit misses", float("nan"))
        modes = torch.tensor(missing.modes, dtype=torch.float64, device="cpu")
        start, part = start.starting_at(modes), work.under(f"again-{attempt}")
        before = done.solution.best.loss
        try:
            again = solve(start, done.family, done.objective, done.solver, seed, part, judged=True)
        except Exception as error:  # whatever it is, there is a fit
            note = f"solving again from the missing modes failed ({error})".rstrip(".")
            return replace(done, notes=(*done.notes, note)), judgement
        loss = again.solution.best.loss
        if not loss < before:
            break
        note = f"modes with {missing.mass:.1%} of the mass were missed at first; solving again from them, the loss fell from "
        done = replace(again, curve=done.curve, notes=(*done.notes, f"{note}{before:.4f} to {loss:.4f}"))
        judgement = judge_fit(start, done.family, done.objective, done.solver, done.solution, done.model, seed, part)
    return done, judgement


@dataclass(frozen=True)
class Solved:
    """What a solver found, in the coordinates of the target, before it is judged."""

    model: Any
    family: Family
    objective: Objective
    solver: Solver
    solution: Solution
    advice: Advice
    curve: Curve | None
    notes: tuple[str, ...]

    def judged(self, target: Target, judgement: Judgement, seed: int) -> Fit:
        """Return the fit, with what was measured about it."""
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
    """Choose objective and solver, and minimise; where it's going to be `judged`, rows may be held out for that.

    Raises:
        InputError: samples or arguments are bad.
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
    is_judged = judged and isinstance(chosen, (ForwardKL, Between))
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


def _identity(target: Target, family: Family, objective: Any, solver: Any, seed: int) -> dict[str, Any]:
    """What a journal belongs to: the target, its rows and its functions, the family, how it is fitted, and the version."""
    stream = None if target.stream is None else target.stream.identity
    how = {"objective": str(objective), "solver": str(solver), "seed": seed, "family": family.config(), "code": code_version()}
    return {"target": target_fingerprint(target), "stream": stream, **how}


def _check_pairs(target: Target, family: Family | None) -> None:
    """Refuse pairs (x, y) for a family of one distribution, and single rows for a conditional one; None is the default."""
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


def _check_scales(free: Target) -> None:
    """Refuse rows, in the coordinates in which they are fitted, whose squares leave float64; of a stream the first ones tell.

    Raises:
        InputError: as said.
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
    """The wanted objective if the access allows it, else the advised one."""
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
