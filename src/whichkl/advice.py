"""Advice: access × what each objective requires → which can be minimised, in which order, and why."""

from __future__ import annotations

import re
import textwrap
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from whichkl._arguments import typed
from whichkl.access import Access
from whichkl.conversions.table import CONVERSIONS, Conversion
from whichkl.families import Family, Gaussian, Product, family_of
from whichkl.families.named import conditional_families
from whichkl.objectives import OBJECTIVES
from whichkl.printable import HTML, brief, shorten
from whichkl.process.torch_modes import plain_modes
from whichkl.solvers import SOLVERS, families_of
from whichkl.solvers.states.category_tables import not_counted_from_zero
from whichkl.targets import Target
from whichkl.targets.origin import Origin

_CELLS = {
    "samples": "You can sample the target, and not evaluate it.",
    "log_prob": "You can evaluate the target up to a constant, and not sample it.",
    "both": "You can sample the target and evaluate it.",
    "neither": "You can neither sample the target nor evaluate it.",
}

_VERDICTS = {
    "samples": "Minimise forward KL: no other direction is possible.",
    "log_prob": "Minimise reverse KL: no other direction is possible.",
    "log_prob, forward_kl": "Minimise forward KL, by particles: no solver minimises reverse KL over this family.",
    "log_prob, reverse_kl, forward_kl": (
        "Minimise reverse KL, which needs no more than log p at draws of the model. Forward KL is possible too, at a higher "
        "cost: minimise it if no mode may be dropped."
    ),
    "both": (
        "Either direction is possible, so let an experiment on your task decide. Start with forward KL, because it drops "
        "no mode; if you need every draw of the model to be plausible (precision) more than every draw of the target to "
        "be covered, fit reverse KL too and compare both divergences on draws that neither fit has seen. Compare also where the "
        "target has heavy tails and central intervals must hold what they say: they make a forward fit too wide."
    ),
    "neither": "Neither direction is possible yet: both KLs are expectations of log p or under p.",
}


@dataclass(frozen=True)
class Option:
    """An objective that can be minimised with an access."""

    __repr__ = brief

    objective: Any
    """An `Objective`, or one of language models."""
    reason: str
    solver: str
    """The solver that `fit` would use for this family; of a language model the line to type."""


@dataclass(frozen=True)
class Advice(HTML):
    """The possible objectives for a target, ranked, and the reasons against the others."""

    access: Access
    family: Family | None
    """None where students are modules."""
    dim: int | None
    options: tuple[Option, ...]
    """The possible objectives, best first."""
    missing: dict[str, str]
    """Name of each impossible objective → why; objectives between the directions only if both directions are possible."""
    conversions: tuple[Conversion, ...]
    """What could be converted; empty if an objective is possible."""
    origin: Origin | None = None
    """What the target was converted from, with what that assumes; None if it wasn't."""

    @property
    def best(self) -> Option | None:
        """The first option; None if nothing is possible."""
        return self.options[0] if self.options else None

    @property
    def access_label(self) -> str:
        """The access, as the page names it."""
        return self.access.label

    @property
    def situation(self) -> str:
        """One sentence on what can be done with the target."""
        said = _CELLS[self.access.cell]
        is_by_score = Access.SCORE in self.access and Access.LOG_PROB not in self.access
        return said.replace("evaluate the target", "evaluate the target by its score") if is_by_score else said

    @property
    def verdict(self) -> str:
        """What to do, in plain words."""
        if not self.options and self.access.cell != "neither":
            return f"Nothing can be minimised over {self.family}: the reasons are below."
        names = ", ".join([self.access.cell, *(option.objective.name for option in self.options)])
        return _VERDICTS.get(names, _VERDICTS[self.access.cell])

    @property
    def cheapest(self) -> str:
        """The cheapest access to acquire; empty if something is possible."""
        if self.options:
            return ""
        floor = ""
        if self.dim and self.family is not None:
            needed = f"{self.family.minimum_rows(self.dim)} draws, some hundreds to be useful"
            floor = f" ({self.family.label} in dimension {self.dim} needs at least {needed})"
        return (
            "If you can write the model down, a function that returns log p(x) up to a constant: it costs no data and no "
            f"normaliser, and opens reverse KL. Otherwise collect draws{floor}: they open forward KL."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as JSON can hold it."""
        return {
            "access": self.access_label,
            "situation": self.situation,
            "verdict": self.verdict,
            "best": self.best.objective.name if self.best else None,
            "options": [{"objective": o.objective.name, "reason": o.reason, "solver": o.solver} for o in self.options],
            "missing": self.missing,
            "conversions": [vars(conversion) for conversion in self.conversions],
            "cheapest": self.cheapest,
            **({"origin": self.origin.to_dict()} if self.origin else {}),
        }

    def __repr__(self) -> str:
        names = ", ".join(option.objective.name for option in self.options) or "nothing possible"
        over = "" if self.family is None else f"; over {shorten(repr(self.family), 120)}"
        return f"Advice({self.access_label}: {names}{over})"

    def __str__(self) -> str:
        """The advice as a page of plain text."""
        lines = [_wrap(f"{self.situation} (access: {self.access_label})"), "", _wrap(self.verdict)]
        for option in self.options:
            objective = option.objective
            head, character = f"{objective.name}   {objective.formula}", _wrap(objective.character, "  ")
            if objective.is_between:  # on a screen there is no room for their reasons, which are in `options`
                lines += ["", head, character]
                continue
            lines += ["", head, _wrap(f"possible: {option.reason}", "  "), character]
            lines.append(f"  {option.solver}" if self.family is None else f"  solver for {self.family}: {option.solver}")
        for need in dict.fromkeys(self.missing.values()):
            names = [name for name, reason in self.missing.items() if reason == need]
            heads = [f"{name}   {OBJECTIVES[name].formula}" if name in OBJECTIVES else name for name in names]
            lines += ["", *heads, _wrap(f"not possible: {need}", "  ")]
        if self.conversions:
            lines += ["", "What could still be converted, if you have it:"]
            for c in self.conversions:
                lines += [_wrap(f"{c.left} → {c.becomes} ({c.source})", "    ", "  - "), f"      {c.call}"]
                lines += [f"      {c.command}"] if c.command else []
            lines += ["", _wrap("Cheapest access to acquire: " + self.cheapest)]
        lines += ["", str(self.origin)] if self.origin else []
        return "\n".join(lines)


class Advised(ABC):
    """A target that knows itself what can be minimised, as one of language models does."""

    @abstractmethod
    def advice(self) -> Advice:
        """Return which objectives are possible, and why."""


@plain_modes()
@typed
def advise(target: Any, family: Family | str | None = None) -> Advice:
    """Return which objectives are possible for a target, and why.

    Args:
        target: a `Target`, an `Access`, or anything that `Target.of` takes; or a `whichkl.distillation.LanguageTarget`.
        family: the family that is to be fitted, or its name; by default `default_family` of the target.

    >>> import torch
    >>> advise(Target(samples=torch.randn(50, 2))).best.objective.name
    'forward_kl'
    >>> advise(Access.LOG_PROB).missing
    {}
    """
    if isinstance(target, Advised):
        return target.advice()
    p = None if isinstance(target, Access) else Target.of(target)
    if family is None:
        family = default_family(p) if p is None or not p.context_names else _family_of_pairs(p)
    family = family_of(family)
    access, dim = (target, None) if p is None else (p.access, p.dim)
    is_discrete = p is not None and p.bijection.is_discrete
    options, missing = [], {}
    for objective in OBJECTIVES.values():
        if objective.is_between and access.cell != "both":
            continue
        solver = next((kind.name for kind in SOLVERS if kind.solves(objective, family, access)), None)
        if not objective.requires.met_by(access):
            missing[objective.name] = f"it requires {objective.requires.label}, and the target has {access.label}"
        elif is_discrete and objective.direction == "forward" and not (access.can_sample or Access.ENUMERABLE in access):
            missing[objective.name] = (
                f"{objective.requires.label}: its states are too many to be listed, so that draws are needed"
            )
        elif p is not None and (refused := not_counted_from_zero(p)):
            missing[objective.name] = f"{refused[0]}. {refused[1]}"
        elif is_discrete and (family.carried or solver is None):
            why = f"{family} has a density on ℝᵈ" if family.carried else f"no solver minimises it over {family}"
            others = "" if objective.is_between else "Product('bernoulli'), Product('categorical') or "
            missing[objective.name] = f"the target is discrete, and {why}: use {others}Autoregressive()"
        elif p is not None and p.context_names and not family.conditional:
            missing[objective.name] = f"the samples are pairs (x, y), and {family} is one distribution, not q(y|x)"
        elif solver is None:
            others = f"; over {', '.join(families_of(objective))} one does" if objective.is_between else ""
            missing[objective.name] = f"no solver minimises it over {family}{others}"
        else:
            options.append(Option(objective, objective.reason(access), solver))
    if not access.can_sample:  # draws of q are at hand, those of p have to be made
        options.sort(key=lambda option: option.objective.reads_p)
    origin = None if p is None or not isinstance(p.origin, Origin) else p.origin
    return Advice(access, family, dim, tuple(options), missing, () if options else CONVERSIONS, origin)


def _family_of_pairs(target: Target) -> Family | str:
    """Return the simplest family of y given x that takes the values of y."""
    y = target.samples if target.stream is None else target.stream.first.x
    text = "" if y is None else conditional_families(y)[1][0]
    named = re.fullmatch(r'(\w+)\((?:"(\w+)")?\)', text)
    return Gaussian() if named is None else Family.kinds[named[1]](*filter(None, [named[2]]))


def default_family(target: Target | None) -> Family:
    """Return the default family: a full Gaussian, or independent columns for a discrete target or one with categories.

    >>> default_family(Target(log_prob=lambda x: x[:, 0], dim=1, support="boolean"))
    Product(margins='bernoulli')
    """
    if target is not None and target.reading.categories and not target.context_names:
        return Product()
    if target is None or target.bijection.levels is None:
        return Gaussian()
    return Product("bernoulli" if set(target.bijection.levels) == {(0, 1)} else "categorical")


def _wrap(text: str, indent: str = "", first: str | None = None) -> str:
    return textwrap.fill(text, 96, initial_indent=indent if first is None else first, subsequent_indent=indent)
