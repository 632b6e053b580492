"""Dispatch: `estimate` chooses the method by what can be done with p and q, names it in its answer, and checks the answer."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from whichkl._arguments import typed
from whichkl._checks import InputError, TargetError, as_int, as_number, cannot, check_seed
from whichkl.access import Access
from whichkl.arrays import or_transposed
from whichkl.chains import disagreement
from whichkl.divergences.draws import bridge
from whichkl.divergences.equal_rows import doubts_of_masses, infinite_by_masses, row_tuples, shared_rows
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact import discrete
from whichkl.divergences.kinds import KINDS, IntegralDivergence, divergence_named
from whichkl.divergences.methods import METHODS, TABLE, Method
from whichkl.divergences.question import Question, Side, on_one_ground
from whichkl.process.threads import threads_for
from whichkl.process.torch_modes import plain_modes
from whichkl.progress import with_progress

Form = Literal["samples", "probabilities", "logits"]

_DISTANCES = ("energy", "mmd", "sliced_wasserstein")
_METHODS_WITH_FALLBACK = ("bridge", "knn", "classifier")
"""Methods that detect their own failures: where one reports that it is unreliable, the next one runs."""
_EXACT = ("closed_form", "enumeration", "quadrature")
"""Methods that may have no answer although their conditions are met; each takes little time."""
_CHANGED_JEFFREYS = "½ KL(p‖q) + ½ KL(q‖p) by default; until version 0.1 this was their sum, twice this value: now `jeffreys_sum`"

_FEATURES = 64
"""Numbers that a classifier or a search of neighbours computes for each number of the samples."""


@typed
@with_progress("estimating")
@plain_modes()
def estimate(
    *,
    p: Any,
    q: Any,
    divergence: str | IntegralDivergence = "forward_kl",
    method: str | None = None,
    form: Form = "samples",
    weight: float | None = None,
    weight_on_forward: float | None = None,
    order: float | None = None,
    n: int = 20_000,
    seed: int = 0,
) -> Estimate:
    """Estimate a divergence between p and q, and how far to trust the estimate.

    The method follows from what can be done with each: closed form, enumeration of atoms, quadrature of up to three
    variables, bridge sampling, Monte Carlo, self-normalised importance sampling, nearest neighbours, a cross-fitted
    classifier. The result is a value, never a loss: to minimise a divergence use an objective (`ForwardKL`, `ReverseKL`) with
    `fit`, since the gradient of an estimator of a value needn't be an estimator of the gradient.

    Args:
        p: a torch distribution, a `Target`, a `Fit`, or samples: (n, d) array, tensor, DataFrame, path; (n,) is read as (n, 1).
        q: the same; forward KL is KL(p‖q), the expectation under p.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jeffreys"``, ``"jeffreys_sum"``, ``"jensen_shannon"``,
            ``"skew_forward_kl"``, ``"skew_reverse_kl"``, ``"renyi"``, ``"total_variation"``, ``"hellinger"`` (squared),
            ``"chi_squared"``, ``"energy"``, ``"mmd"`` (squared) or ``"sliced_wasserstein"``; or an `IntegralDivergence`.
        method: one of `METHODS`, instead of the automatic choice.
        form: what arrays hold: ``"samples"``, or ``"probabilities"`` or ``"logits"`` over atoms on the last axis. Several rows
            give the mean of their divergences.
        weight: of p in the mixture of Jensen–Shannon and of the skew forward KL, of q in that of the skew reverse KL.
        weight_on_forward: w in ``"jeffreys"``, w KL(p‖q) + (1 − w) KL(q‖p); ½ by default. Until version 0.1 ``"jeffreys"``
            was the sum of both KLs, which ``"jeffreys_sum"`` is now.
        order: of Rényi's divergence.
        n: number of fresh draws per side, where a side has a sampler.
        seed: fixes every random choice.

    Returns:
        An `Estimate`, in nats; total variation, Hellinger, χ² and the distances between samples have no unit.

    Raises:
        InputError: an argument is bad, or p and q don't fit together.
        TargetError: the access doesn't allow the method, or any method.

    Source: the methods' own; see `docs/estimating.md`.

    >>> from torch.distributions import Normal
    >>> print(estimate(p=Normal(0.0, 1.0), q=Normal(1.0, 2.0)))
    forward_kl = 0.443147 nats (closed form)
    >>> print(estimate(p=[0.36, 0.48, 0.16], q=[1 / 3, 1 / 3, 1 / 3], form="probabilities"))
    forward_kl = 0.085300 nats (enumeration)
    """
    name, kind = _divergence(divergence, weight=weight, weight_on_forward=weight_on_forward, order=order)
    n, seed = _checked(n, method, form), check_seed(seed)
    if form != "samples":
        return _finished(_of_rows(p, q, name, kind, form, method), name, kind)
    question = Question(*on_one_ground(Side.of(p, "p"), Side.of(q, "q")), name, kind, n, seed)
    _check_pair(question)
    with threads_for(_FEATURES * (question.p.numbers + question.q.numbers)):
        found = _finished(_answer(question, method), name, kind)
    doubts = [note for side in (question.p, question.q) for note in side.doubts]
    found = replace(found, notes=(*found.notes, *doubts)) if doubts else found
    return found.resting_on(question.p.target.origin).resting_on(question.q.target.origin)


def _answer(question: Question, method: str | None) -> Estimate:
    if method is None and (infinite := infinite_by_masses(question)):
        return infinite
    possible = [one for one in TABLE if one.can(question)]
    return _automatic(question, possible) if method is None else _chosen(question, method, possible)


def _checked(n: Any, method: str | None, form: str) -> int:
    n = as_int(n)
    if isinstance(n, bool) or not isinstance(n, int) or n < 100:
        because = "error bars need at least 100 draws" if isinstance(n, int) else "it isn't a whole number of at least 100"
        raise InputError(cannot(f"use `n={n!r}`", because, "Use, say, n=20000"))
    if method is not None and method not in METHODS:
        raise InputError(cannot(f"use `method={method!r}`", "there is no such method", f"Choose among {', '.join(METHODS)}"))
    if not isinstance(form, str) or form not in ("samples", "probabilities", "logits"):
        raise InputError(cannot(f"use `form={form!r}`", "it is none of them", "Write samples, probabilities or logits"))
    return n


def _chosen(ask: Question, method: str, possible: list[Method]) -> Estimate:
    """Return the answer of this method."""
    result = next((one.answer(ask) for one in possible if one.name == method), None)
    if result is None:
        others = [one.name for one in possible if one.name != method and (one.name not in _EXACT or one.answer(ask))]
        raise TargetError(_refusal(ask, method, others))
    return _checked_for_sanity(result, ask, [])


def _automatic(question: Question, possible: list[Method]) -> Estimate:
    """Return the answer of the first method that trusts its own answer, with what the others found in its notes."""
    doubtful: tuple[Estimate, str] | None = None
    doubts: list[str] = []
    fatal: list[str] = []
    for one in (method for method in possible if method.automatic):
        try:
            result = one.answer(question)
        except InputError as error:
            if doubtful is None:
                raise
            # A second opinion may need more rows than the first: then the first stands, with its doubts.
            doubts.append(f"{one.name} was refused: {error}")
            continue
        except TargetError as error:
            known = question.p.distribution is not None and question.q.distribution is not None
            # A density that isn't normalised as claimed is the caller's mistake; others may be out of this method's reach alone.
            if one.name not in ("quadrature", "bridge", "counting") or ("normalized=True" in str(error) and not known):
                raise
            reason = f"{one.name} was refused: {str(error)[:300]}"
            if one.name == "quadrature" and (question.p.target.dim == 1 or "isn't finite" in reason):
                fatal.append(f"{reason} Other methods see even less of what makes it fail")
            else:
                doubts.append(reason)
            continue
        if result is None:
            continue
        result = _checked_for_sanity(result, question, fatal)
        if result.reliable or one.name not in _METHODS_WITH_FALLBACK:
            return replace(result, notes=(*result.notes, *doubts))
        if one.name == "bridge" and result.interval[1] < 0:
            fatal.append(f"bridge gives {result.number}, below 0: draws and a log density contradict each other")
        doubts.append(f"{one.name} gives {result.number} and reports that it isn't reliable here")
        doubtful = doubtful or (result, doubts[-1])
    if doubtful is None:
        raise TargetError(_refusal(question, None, [one.name for one in possible if not one.automatic]))
    result, own = doubtful
    return replace(result, notes=(*result.notes, *(one for one in doubts if one != own)))


def _divergence(divergence: str | IntegralDivergence, **given: float | None) -> tuple[str, IntegralDivergence | None]:
    parameters = {name: as_number(value) for name, value in given.items() if value is not None}
    for one, value in parameters.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(cannot(f"use `{one}={value!r}`", f"it is a `{type(value).__name__}`, not a number", "Give a number"))
    if isinstance(divergence, IntegralDivergence):
        if parameters:
            because, instead = "the divergence was given with its own", "Set it there, or name the divergence by a string"
            raise InputError(cannot(f"use `{', '.join(parameters)}`", because, instead))
        kind = divergence
    elif divergence in _DISTANCES:
        if parameters:
            because = f"`{divergence}` has no such parameter"
            raise InputError(cannot(f"use `{', '.join(sorted(parameters))}=`", because, "Leave it out"))
        return divergence, None
    elif divergence not in KINDS:
        known = ", ".join((*KINDS, *_DISTANCES))
        raise InputError(cannot(f"estimate `{divergence}`", "there is no such divergence", f"Choose among {known}"))
    else:
        kind = divergence_named(divergence, KINDS, **parameters)
    plain = kind.limit()
    kind = plain if isinstance(plain, IntegralDivergence) else kind
    return kind.name, kind


def _of_rows(p: Any, q: Any, name: str, kind: IntegralDivergence | None, form: Form, method: str | None) -> Estimate:
    """Estimate the mean divergence of rows of probabilities or logits."""
    if kind is None or method not in (None, "enumeration"):
        because = f"atoms given by their {form} have no coordinates and are summed over, nothing else"
        raise TargetError(cannot(f"estimate `{name}` by `{method}`" if method else f"estimate `{name}`", because, "Use a KL"))
    given = [getattr(side, "columns", getattr(side, "index", None)) for side in (p, q)]
    # A list has a method `index`, which is no label.
    labels = [[str(label) for label in one] for one in given if one is not None and not callable(one)]
    if len(labels) == 2 and labels[0] != labels[1]:
        because = f"the atoms of p are {', '.join(labels[0][:8])} and those of q {', '.join(labels[1][:8])}"
        raise InputError(cannot("compare these atoms", because, "Put them in one order, under the same labels"))
    a, b = _as_rows(p, "p"), _as_rows(q, "q")
    with threads_for(4 * a.numel()):
        values = discrete.rows(a, b, kind, "logits" if form == "logits" else "probabilities")
    notes, value = [], float(values.mean())
    if values.numel() > 1:
        notes.append(f"mean over {values.numel():,} rows, from {float(values.min()):.6g} to {float(values.max()):.6g}")
    if not math.isfinite(value):
        notes.append(_missed_atoms(a, b, form))
    return Estimate.settled(name, value, "enumeration", *notes)


def _as_rows(values: Any, name: str) -> Tensor:
    """Bring probabilities or logits to a floating tensor, atoms on the last axis."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        array = array if array.dtype.kind == "f" else array.astype(np.float64)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, ValueError) as error:
        because = f"{name} is a `{type(values).__name__}`"
        raise InputError(cannot("read atoms", because, "Give an array or tensor of floats, atoms on the last axis")) from error


def _missed_atoms(a: Any, b: Any, form: Form) -> str:
    zero = float("-inf") if form == "logits" else 0.0
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    for i, (one, other) in enumerate(zip(rows_a, rows_b, strict=True)):
        for here, there, who, whose in ((one, other, "p", "q"), (other, one, "q", "p")):
            missed = ((here > zero) & (there == zero)).nonzero().flatten()
            if len(missed):
                mass = float((here.softmax(-1) if form == "logits" else here)[missed].sum())
                shown = ", ".join(str(int(atom)) for atom in missed[:5]) + (", …" if len(missed) > 5 else "")
                return f"row {i}: {mass:.4g} of the mass of {who} lies on atoms without mass in {whose}: {shown}"
    return "it is infinite, and atoms of zero mass don't explain it"


def _check_pair(ask: Question) -> None:
    p, q = ask.targets
    if p.dim != q.dim:
        because = f"p has dimension {p.dim} and q has {q.dim}"
        turned = max((or_transposed(len(one.samples), one.dim) for one in (p, q) if one.samples is not None), default="")
        raise InputError(cannot("compare p and q", because, f"Give both the same columns, in the same order{turned}"))
    if ask.p.mass_on != ask.q.mass_on:
        words = {"density": "has a density", "atoms": "lives on atoms", "mixed": "has columns of both kinds"}
        because = f"p {words[ask.p.mass_on]}, and q {words[ask.q.mass_on]}"
        instead = "Give both as discrete distributions, both as continuous ones, or one as samples"
        raise InputError(cannot("compare p and q", because, instead))
    for fitted, other in ((ask.p, q), (ask.q, p)):
        if fitted.fitted_on is None or other.samples is None:
            continue
        if ask.continuous:
            known, rows = set(row_tuples(fitted.fitted_on)), row_tuples(other.samples)
            is_same = sum(row in known for row in rows) > len(rows) / 2
        else:  # rows of atoms repeat in any other sample
            is_same = torch.equal(fitted.fitted_on.to(other.samples), other.samples)
        if is_same:
            because = f"{fitted.name} was fitted on these very rows, and looks better on them than it is"
            instead = "Give rows held out of the fit, or read the fit's `value`, which is cross-fitted"
            raise InputError(cannot("estimate a divergence from these samples", because, instead))
    if p.bijection.free_dim != q.bijection.free_dim:
        flat, full = sorted((ask.p, ask.q), key=lambda side: side.target.bijection.free_dim)
        because = f"{flat.name} lives on {flat.target.bijection.describe()[0]}, a set without volume where {full.name} lives"
        raise InputError(cannot("compare their densities", because, "Give both the same `support=`"))
    if p.samples is not None and q.samples is not None and p.names != q.names:
        plain = tuple(f"x{i + 1}" for i in range(p.dim))
        if plain not in (p.names, q.names) and set(p.names) & set(q.names):
            because = f"the columns of p are {', '.join(p.names)} and those of q {', '.join(q.names)}"
            instead = "Put them in one order" if sorted(p.names) == sorted(q.names) else "Rename them where they are the same"
            raise InputError(cannot("compare p and q", because, instead))


def _refusal(ask: Question, method: str | None, possible: list[str]) -> str:
    have = f"p has {ask.p.access.label}, q has {ask.q.access.label}"
    instead = f"Use one of: {', '.join(possible)}" if possible else "Pass samples of both, or log densities with draws"
    if method is None:
        return cannot(f"estimate `{ask.name}`", f"no method takes this access ({have})", instead)
    needs = next(one.needs for one in TABLE if one.name == method)
    return cannot(f"use `{method}` for `{ask.name}` here", f"it requires {needs}, and {have}", instead)


def _finished(result: Estimate, name: str, kind: IntegralDivergence | None) -> Estimate:
    notes = (*result.notes, _CHANGED_JEFFREYS) if name == "jeffreys" else result.notes
    unit = "none" if name in _DISTANCES else result.unit if kind is None else kind.unit
    return replace(result, quantity=name, unit=unit, notes=notes)


def _checked_for_sanity(result: Estimate, ask: Question, fatal: list[str]) -> Estimate:
    """Mark an answer unreliable for `fatal` reasons, an interval below 0, draws that contradict a density, or shared rows.

    No method sees these contradictions in its own answer.
    """
    wrong = list(fatal)
    if ask.continuous:
        names = [", ".join(one.names) for one in ask.targets if one.samples is not None]
        if len(names) == 2 and names[0] != names[1]:
            note = f"the columns {names[0]} of p were compared with {names[1]} of q, in this order"
            result = replace(result, notes=(*result.notes, note))
    if not result.exact and result.up_to is None and ask.kind is not None and result.interval[1] < 0:
        because = "its inputs contradict each other, or its bias is larger"
        wrong.append(f"its whole interval is below 0, and no divergence is: {because}")
    for side in (ask.p, ask.q):
        if side.target.samples is not None and side.target.chains is not None:
            apart = disagreement(side.target.samples, side.target.chains, side.target.names)
            wrong += [f"{apart}, in {side.name}"] if apart else []
    if not result.method.startswith("counting"):
        wrong += doubts_of_masses(ask)
    if math.isfinite(result.value) and ask.continuous:
        wrong += _contradictions(ask) + shared_rows(ask, result)
    if not wrong:
        return result
    finite = result.finite if result.value == math.inf else "not certified"
    return replace(result, reliable=False, exact=False, finite=finite, notes=(*wrong, *result.notes))


def _contradictions(ask: Question) -> list[str]:
    """Reasons why draws and log densities that a user gave don't belong together."""
    p, q = ask.targets
    given = [side for side in (ask.p, ask.q) if side.distribution is None and Access.LOG_PROB in side.access]
    drawn = any(side.access.can_sample for side in given)
    if not (drawn and ask.evaluated and ask.sampled) or p.weights is not None or q.weights is not None:
        return []
    with contextlib.suppress(TargetError):
        if (found := bridge.contradiction(p, q, ask.n, ask.seed + 17)) is not None:
            return [found]
    return []
