"""Question: a divergence between two sides, p and q as the caller gave them, and what the sides can do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, cannot, quoted
from whichkl.access import Access
from whichkl.distributions import widened
from whichkl.divergences.estimate import Estimate
from whichkl.divergences.exact.atoms import Atoms, MassOn, normalised_target, target_of_law, where_mass_is
from whichkl.divergences.exact.quadrature import coordinates
from whichkl.divergences.kinds import KINDS, IntegralDivergence
from whichkl.importance import stays_by_weight
from whichkl.process.memory import check_memory
from whichkl.samples.point_masses import Masses, point_masses
from whichkl.samples.reading import UNKNOWN, in_order
from whichkl.targets import Target
from whichkl.targets.row_weights import doubtful_columns

_MAX_FRESH_DRAWS = 10_000
"""Largest number of draws for methods that compare all rows with each other."""
_MIN_REPEATS_OF_ATOMS = 10
"""Rows per distinct row from which whole numbers are counted as atoms, not spread as rounded numbers."""


@dataclass(frozen=True)
class Side:
    """One of the two distributions: its target, its torch distribution if it has one, and where its mass is."""

    name: str
    target: Target
    distribution: Distribution | None = None
    fitted_on: Tensor | None = None
    mass_on: MassOn = "density"
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The labels of columns of categories, in the order of their codes."""
    masses: Masses = field(default_factory=dict)
    """Values with mass in columns that are continuous elsewhere."""

    @property
    def is_atomic(self) -> list[bool]:
        """Per column, whether it lives on atoms."""
        columns = getattr(getattr(self.distribution, "support", None), "columns", None)
        if columns is not None:
            return [one.is_discrete for one in columns]
        return [self.mass_on == "atoms" or name in self.labels for name in self.target.names]

    @property
    def atoms(self) -> Atoms | None:
        """Its probabilities, if it lives on atoms and has any."""
        if self.mass_on != "atoms" or not self.density:
            return None
        return Atoms(self.distribution or self.target)

    @property
    def access(self) -> Access:
        """What can be done with it."""
        return self.target.access | (Access.ENUMERABLE if self.atoms is not None else Access(0))

    @property
    def is_counted(self) -> bool:
        """Whether its rows are counted, since it has no probabilities."""
        return self.target.samples is not None and self.target.density is None

    @property
    def is_bare(self) -> bool:
        """Whether it is rows of numbers, without a density or a stated support."""
        return self.target.samples is not None and self.target.density is None and self.target.bijection.is_real

    @property
    def numbers(self) -> int:
        """How many numbers its samples have."""
        return 0 if self.target.samples is None else self.target.samples.numel()

    @property
    def density(self) -> bool:
        """Whether it has a normalised log density."""
        return Access.NORMALIZED in self.target.access

    @property
    def doubts(self) -> list[str]:
        """Columns of its rows that may hold their weights, in words."""
        notes = () if self.target.samples is None or self.distribution is not None else doubtful_columns(self.target.names)
        return [note.replace("is data here", f"of {self.name} is data here") for note in notes]

    def thinned(self) -> tuple[Side, list[str]]:
        """Return the side with its chains thinned to nearly independent rows, and a note where there was anything to thin."""
        target = self.target
        if target.samples is None or target.chains is None:
            return self, []
        few, step = target.thinned()
        rows = 0 if few.samples is None else len(few.samples)
        note = f"the chains of {self.name} were thinned to every {step}. row, {rows:,} of {len(target.samples):,}"
        return replace(self, target=few), [note]

    def of_equal_weight(self, seed: int) -> tuple[Side, list[str]]:
        """Return the side with fewer rows of equal weight in place of weighted ones, and a note on them.

        Raises:
            InputError: fewer than two rows are left.
        """
        target = self.target
        if target.samples is None or target.weights is None:
            return self, []
        few = copy.copy(target)
        stays = stays_by_weight(target.weights, torch.Generator().manual_seed(seed)).to(target.samples.device)
        few.samples, few.weights, few.repeats = target.samples[stays], None, None
        count = f"{len(few.samples):,} of the {len(target.samples):,} weighted rows of {self.name}"
        if len(few.samples) < 2:
            because = f"a row stays with chance w / max w, and {count} are left"
            raise InputError(cannot(f"use the weights of {self.name}", because, "Give more rows of similar weight"))
        return replace(self, target=few), [f"{count} were used: a row stays with chance w / max w"]

    @classmethod
    def of(cls, obj: Any, name: str) -> Side:
        """Read a torch distribution, a `Target`, samples (array, DataFrame, path) or the `model` of a fit."""
        model, fitted_on = getattr(obj, "model", None), None
        if isinstance(model, Distribution):
            if getattr(getattr(obj, "objective", None), "name", "") == "forward_kl":  # the others don't see the rows
                fitted_on = getattr(getattr(obj, "target", None), "samples", None)
            labels = getattr(getattr(obj, "reading", None), "categories", {})
            obj = model
        else:
            labels = {}
        if not isinstance(obj, Distribution):
            target = _in_memory(Target.of(obj), name)
            if target.bijection.is_discrete:
                return cls(name, normalised_target(target), mass_on="atoms")
            return cls(name, target, labels=target.reading.categories)
        obj = widened(obj)
        if obj.batch_shape != () and obj.event_shape == ():
            because = f"{name} is a batch of {tuple(obj.batch_shape)} distributions"
            instead = "Give one, or torch.distributions.Independent(…, 1) for a vector"
            raise InputError(cannot("estimate one divergence of it", because, instead))
        alone = coordinates(obj) or []
        obj = alone[0] if len(alone) == 1 else obj  # one column is a law of one number, for which closed forms are known
        mass_on = where_mass_is(obj)
        return cls(name, Target.of(obj) if mass_on == "density" else target_of_law(obj), obj, fitted_on, mass_on, labels)


def on_one_ground(p: Side, q: Side) -> tuple[Side, Side]:
    """Give labels the same codes on both sides, and read rows without a stated support as rows of atoms.

    They are rows of atoms where the other side lives on atoms, where both repeat like atoms, and in columns of categories.

    Raises:
        InputError: a row can't be an atom of the other side.
    """
    p, q = map(_with_masses, _under_common_labels(p, q))
    if p.is_bare and q.is_bare and p.target.dim == q.target.dim:
        if _repeats(p.target) and _repeats(q.target):
            return replace(p, mass_on="atoms"), replace(q, mass_on="atoms")
        masses = {**p.masses, **q.masses}
        if p.labels or masses:
            mass_on: MassOn = "atoms" if all(p.is_atomic) else "mixed"
            return replace(p, mass_on=mass_on, masses=masses), replace(q, mass_on=mass_on, masses=masses)
    return _joining(p, q), _joining(q, p)


def _with_masses(side: Side) -> Side:
    """Note the values with mass in the columns of rows that hold numbers; chains repeat values where they reject."""
    rows = side.target.samples
    if rows is None or not side.is_bare or side.target.chains is not None:
        return side
    return replace(side, masses={i: found for i, found in point_masses(rows).items() if not side.is_atomic[i]})


def _under_common_labels(p: Side, q: Side) -> tuple[Side, Side]:
    """Return both sides with the same code for each label: that of a law, which stays as it is, or of all labels in order.

    Raises:
        InputError: both sides are rows, with other columns of categories.
    """
    if p.is_bare and q.is_bare and p.labels.keys() != q.labels.keys():
        of_p, of_q = (quoted(tuple(side.labels)) if side.labels else "none" for side in (p, q))
        because = f"the columns of categories are {of_p} in p and {of_q} in q"
        raise InputError(cannot("compare p and q", because, "Name the same `categories=` for both"))
    law = next((side for side in (p, q) if side.distribution is not None), None)
    common = {
        name: law.labels[name] if law and name in law.labels else tuple(sorted({*p.labels[name], *q.labels[name]}, key=in_order))
        for name in p.labels.keys() & q.labels.keys()
    }
    return _recoded(p, common), _recoded(q, common)


def _recoded(side: Side, labels: Mapping[str, tuple[str, ...]]) -> Side:
    """Return rows with the codes that these lists give their labels; −1 for a label that isn't in its list."""
    changed = {name: known for name, known in labels.items() if side.labels[name] != known}
    rows = side.target.samples
    if side.distribution is not None or rows is None or not changed:
        return side
    rows, target = rows.clone(), copy.copy(side.target)
    for name, known in changed.items():
        codes = [known.index(label) if label in known else UNKNOWN for label in side.labels[name]]
        column = side.target.names.index(name)
        rows[:, column] = rows.new_tensor(codes)[rows[:, column].long()]
    target.samples = rows
    return replace(side, target=target, labels={**side.labels, **changed})


def _joining(side: Side, other: Side) -> Side:
    """Return bare rows as rows of what the other side lives on."""
    rows = side.target.samples
    if not side.is_bare or rows is None or other.mass_on == "density" or other.target.dim != side.target.dim:
        return side
    is_atomic = [i for i, on_atoms in enumerate(other.is_atomic) if on_atoms]
    broken = (rows != rows.round())[:, is_atomic].any(1).nonzero()[:, 0].tolist()
    if broken:
        shown = ", ".join(f"{v:.6g}" for v in rows[broken[0]].tolist()[:8])
        because = f"{other.name} lives on atoms, and row {broken[0]} of {side.name} isn't of whole numbers: {shown}"
        raise InputError(cannot("compare p and q", because, "Give both as discrete distributions, or both as continuous ones"))
    return replace(side, mass_on=other.mass_on)


def _repeats(p: Target) -> bool:
    """Whether rows are whole numbers of which each occurs ten times or more, on average."""
    x = p.samples
    few = None if x is None else x[:_MIN_REPEATS_OF_ATOMS]
    if x is None or few is None or bool((few != few.round()).any()) or bool((x != x.round()).any()):
        return False
    return len(x.unique(dim=0)) * _MIN_REPEATS_OF_ATOMS <= len(x)


def _in_memory(target: Target, name: str) -> Target:
    """Return a target whose samples are in memory, since all of them are compared with each other."""
    stream = target.stream
    if target.context_names:
        raise InputError(cannot("estimate a divergence of pairs (x, y)", f"{name} is conditional", "Give single rows"))
    if stream is None:
        return target
    check_memory(2 * stream.bytes_in_memory, f"hold the rows of {name}", "Give a part of them")
    whole = Target(samples=torch.cat([block.x for part in stream.parts for block in part.blocks()]), names=target.names)
    whole.reading = target.reading
    return whole


@dataclass(frozen=True)
class Question:
    """Both sides, the divergence, and the number of draws."""

    p: Side
    q: Side
    name: str
    kind: IntegralDivergence | None
    n: int
    seed: int

    def swapped(self) -> Question:
        """Return the question of KL(q‖p), as the forward KL of q from p."""
        return replace(self, p=self.q, q=self.p, name="forward_kl", kind=KINDS["forward_kl"]())

    @property
    def targets(self) -> tuple[Target, Target]:
        """The targets of both sides."""
        return self.p.target, self.q.target

    @property
    def continuous(self) -> bool:
        """Whether both have densities, in all columns."""
        return self.p.mass_on == self.q.mass_on == "density"

    @property
    def atoms(self) -> tuple[Atoms, Atoms] | None:
        """The probabilities of both sides, if both live on atoms and have them."""
        p, q = self.p.atoms, self.q.atoms
        return None if p is None or q is None else (p, q)

    @property
    def is_kl(self) -> bool:
        """Whether the divergence is the forward or the reverse KL."""
        return self.name in ("forward_kl", "reverse_kl")

    @property
    def evaluated(self) -> bool:
        """Whether both have a log density."""
        return Access.LOG_PROB in self.p.access and Access.LOG_PROB in self.q.access

    @property
    def sampled(self) -> bool:
        """Whether there are draws of both, fixed or fresh."""
        return self.p.access.can_sample and self.q.access.can_sample

    def drawn(self, side: Side, shift: int = 0) -> Target:
        """Return a side's fixed samples where there are any, else `n` fresh draws, at most 10,000."""
        target = side.target
        if target.samples is not None:
            return target
        return Target(samples=target.draws(min(self.n, _MAX_FRESH_DRAWS), self.seed + shift))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return draws of both, for methods that have nothing else."""
        x, y = self.drawn(self.p).samples, self.drawn(self.q, 1).samples
        if x is None or y is None:
            raise TypeError("no rows")
        return x, y

    def in_names(self, run: Callable[[], Estimate]) -> Estimate:
        """Run a method of two samples, and call these p and q in its notes and errors, which know them as `x` and `y`."""

        def renamed(text: str) -> str:
            for name, side in (("x", self.p.name), ("y", self.q.name)):
                text = re.sub(rf"(?<!column )`{name}`", side, text)  # a column may have the name
            return text

        try:
            found = run()
        except InputError as error:
            raise InputError(renamed(str(error))) from error
        return replace(found, notes=tuple(map(renamed, found.notes)))
