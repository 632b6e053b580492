"""Counting: divergences of laws on atoms from how often each atom occurs, corrected for their bias by the jackknife."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from whichkl._checks import TargetError, cannot
from whichkl.divergences import regions
from whichkl.divergences.estimate import Estimate, Finite
from whichkl.divergences.exact.atoms import Atoms, named
from whichkl.divergences.exact.discrete import log_sum
from whichkl.divergences.kinds import KINDS, IntegralDivergence
from whichkl.divergences.samples import nearest_neighbors
from whichkl.families.columns import IndependentColumns
from whichkl.importance import doubt_of_weights
from whichkl.samples.point_masses import Masses
from whichkl.targets import Target

MAX_CELLS = 4_096
"""Largest number of distinct rows: the jackknife computes the divergence once per distinct row."""
_NUMBERS_PER_BLOCK = 1 << 20
_MIN_ROWS = 20
_MAX_SHARE_SEEN_ONCE, _MAX_SHARE_ALONE = 0.1, 0.5
"""Largest shares of rows that are alone in their cell, of a reliable answer and of any: about as much of the mass was never seen
(Good, 1953)."""
_MAX_UNSEEN_NATS = 0.01
_MIN_MASS_OF_THE_REST = 1e-9
"""Smallest mass outside of all cells that counts: less is rounding."""
_MIN_ROWS_PER_CELL = 50
"""Fewest rows with the same atoms among which the density of the other columns is compared."""
_NONE: Masses = {}
_SMOOTHING = 0.5
"""Rows added to each cell of a side whose zeros make a divergence infinite (Krichevsky & Trofimov, 1981)."""


@dataclass(frozen=True)
class _Counts:
    """How much of one side is in each cell.

    Args:
        name: p or q.
        count: rows per cell, in effective rows where they are weighted; for a law, its probabilities.
        squares: Σ w² per cell, of weights that sum to 1; None for a law.
        smoothing: the number of rows that are added to each cell.
    """

    name: str
    count: Float[Tensor, " c"]
    squares: Float[Tensor, " c"] | None
    smoothing: float = 0.0

    @property
    def rows(self) -> float:
        """The number of effective rows; ∞ for a law."""
        return math.inf if self.squares is None else float(self.count.sum())

    @property
    def share_alone(self) -> float:
        """The share of the rows that are alone in their cell."""
        return 0.0 if self.squares is None else float(self.count[self.count <= 1].sum()) / self.rows

    def log_mass(self, without: Int[Tensor, " k"] | None = None) -> Float[Tensor, "... c"]:
        """Return the log of each cell's share; with `without`, one row per cell number, without one row of this cell."""
        count = self.count
        if self.squares is None:
            return count.log()
        if without is not None:
            count = count.repeat(len(without), 1)
            place = torch.arange(len(without), device="cpu")
            count[place, without] = (count[place, without] - 1).clamp(min=0.0)
        count = count + self.smoothing
        return count.log() - count.sum(-1, keepdim=True).log()


def divergence(p: Target | Atoms, q: Target | Atoms, kind: IntegralDivergence) -> Estimate:
    """A divergence of two laws on atoms from rows of one and rows or probabilities of the other; consistent.

    It is the divergence of the shares of rows per cell, a cell being a distinct row. Where a share of 0 would make it infinite,
    half a row is added to each cell of that side. Bias and error are those of the jackknife, over each side's rows: for the
    KLs they agree with Miller & Madow's correction and the delta method. It is ∞ where rows lie on atoms that a known law
    excludes. An atom in the rows of one side alone can't be distinguished from one that the other excludes: if its share
    matters, the answer isn't reliable.

    Args:
        p: rows, or a law's probabilities.
        q: likewise; at least one of them rows.
        kind: which divergence.

    Raises:
        TargetError: there are more than 4,096 distinct rows, or most rows occur only once.

    Source: Miller (1955); Efron & Stein (1981) for the jackknife.

    >>> x = torch.tensor([0.0] * 400 + [1.0] * 600)
    >>> from torch.distributions import Bernoulli
    >>> from whichkl.divergences.kinds import KINDS
    >>> divergence(Target(samples=x), Atoms(Bernoulli(torch.tensor(0.5))), KINDS["forward_kl"]()).number  # of 0.6: 0.0201
    '0.0196 ± 0.0063'
    """
    cells, of_p, of_q = _cells(p, q)
    for side in (of_p, of_q):
        if side.share_alone > _MAX_SHARE_ALONE:
            because = f"{side.share_alone:.0%} of the rows of {side.name} occur only once"
            raise TargetError(cannot("compare these samples by counting", because, "Pass method='classifier'"))
    of_p, of_q = _smoothed(of_p, of_q, kind)
    method = f"counting, {_described(p, of_p)} and {_described(q, of_q)}, {len(cells):,} distinct rows"
    log_p, log_q = of_p.log_mass(), of_q.log_mass()
    missed = kind.misses(log_p, log_q)
    where = (missed > 0).nonzero().flatten().tolist()
    n = int(sum(one.rows for one in (of_p, of_q) if one.squares is not None))
    if where:
        shown = ", ".join(named(cells[i]) if i < len(cells) else "others" for i in where[:5]) + ", …" * (len(where) > 5)
        note = f"{float(missed.sum()):.4g} of the mass of {regions.outside(missed, log_p, log_q)}, on the atoms {shown}"
        return Estimate(kind.name, math.inf, finite="infinite", method=method, n=n, notes=(note,))
    value = whole = float(log_sum(kind, log_p, log_q))
    variance = 0.0
    for side, other in ((of_p, log_q), (of_q, log_p)):
        if side.squares is not None:
            bias, spread = _jackknife(side, other, kind, whole, is_p=side is of_p)
            value, variance = value - bias, variance + spread
    # Where p = q, what was subtracted is the mean of a multiple of χ² with one degree of freedom less than there are cells.
    stderr = math.hypot(math.sqrt(variance), (whole - value) * math.sqrt(2 / max(len(log_p) - 1, 1)))
    if kind.name == "total_variation":  # it has a kink where p = q, which no jackknife sees
        value, stderr = whole, math.hypot(stderr, _kink(of_p, of_q))
    doubts = _doubts(of_p, of_q, stderr)
    weights = (one.weights for one in (p, q) if isinstance(one, Target) and one.weights is not None)
    doubts += [doubt for one in weights if (doubt := doubt_of_weights(one)) is not None]
    finite: Finite = "certified" if kind.bounded else "not certified"
    return Estimate(kind.name, value, stderr, finite=finite, method=method, n=n, reliable=not doubts, notes=tuple(doubts))


def mixed_kl(
    p: Target, q: IndependentColumns | Target, is_atomic: Sequence[bool], masses: Masses = _NONE, seed: int = 0
) -> Estimate:
    """KL(p‖q) of rows with columns of atoms a and of numbers y from a law with independent columns, or from rows; consistent.

    KL(p‖q) = KL(p_a‖q_a) + Σ_a p(a) KL(p(y|a)‖q(y|a)): the first by counting, the others by nearest neighbours in each cell of
    at least 50 rows, of both sides if both are rows. A number that is one of the `masses` of its column is part of a.

    Raises:
        TargetError: the rows are weighted, or more than a tenth of those of p are in smaller cells.
    """
    on_atoms = torch.tensor(is_atomic, dtype=torch.bool, device="cpu")
    x, y = _equal_rows(p), _equal_rows(q) if isinstance(q, Target) else None
    a, b = _atoms_in(x, on_atoms, masses), None if y is None else _atoms_in(y, on_atoms, masses)
    atoms, number, counts = a.unique(dim=0, return_inverse=True, return_counts=True)
    of_x = [x[number == i] for i in range(len(atoms))]
    of_y = [] if y is None or b is None else [y[(b == atom).all(1)] for atom in atoms]
    absent = [i for i, rows in enumerate(of_y) if len(rows) == 0]  # counting reports them
    large = [i for i, rows in enumerate(of_x) if min(map(len, (rows, *of_y[i : i + 1]))) >= _MIN_ROWS_PER_CELL]
    share, rest = counts[large] / counts.sum(), 1 - float(counts[absent].sum() / counts.sum())
    if float(share.sum()) < rest - _MAX_SHARE_SEEN_ONCE:
        because = f"{rest - float(share.sum()):.0%} of the rows are in cells of fewer than {_MIN_ROWS_PER_CELL} rows"
        raise TargetError(cannot("compare these samples by counting", because, "Pass method='classifier'"))
    if isinstance(q, IndependentColumns):
        laws = [[law for law, one in zip(q.laws, is_atomic, strict=True) if one is kind] for kind in (True, False)]
        of_atoms, of_numbers = (IndependentColumns(part, [""] * len(part)) for part in laws)
        other: Target | Atoms = Atoms(of_atoms)
        inner = [nearest_neighbors.one_sample_kl(of_x[i][:, ~on_atoms], of_numbers.log_prob, seed=seed) for i in large]
    else:
        other, inner = Target(samples=b), []
        for i in large:
            numbers = ~on_atoms
            numbers[list(masses)] = atoms[i, len(atoms[i]) - len(masses) :] < 0
            if bool(numbers.any()):
                inner.append(nearest_neighbors.two_sample_kl(of_x[i][:, numbers], of_y[i][:, numbers], seed=seed))
            else:
                inner.append(Estimate("forward_kl", 0.0))
    counted = divergence(Target(samples=a), other, KINDS["forward_kl"]())
    weight = (share / share.sum().clamp(min=1e-300) * rest).tolist()
    value = counted.value + math.fsum(w * one.value for w, one in zip(weight, inner, strict=True))
    stderr = math.sqrt(counted.stderr**2 + math.fsum((w * one.stderr) ** 2 for w, one in zip(weight, inner, strict=True)))
    notes = dict.fromkeys((*counted.notes, *(note for one in inner if not one.reliable for note in one.notes)))
    return replace(
        counted,
        value=value,
        stderr=stderr,
        finite="infinite" if value == math.inf else "not certified",
        method=f"counting in {len(atoms):,} cells, and nearest neighbours in {len(large):,} of them",
        reliable=counted.reliable and all(one.reliable for one in inner),
        notes=tuple(notes),
    )


def _atoms_in(x: Float[Tensor, "n d"], on_atoms: Bool[Tensor, " d"], masses: Masses) -> Float[Tensor, "n c"]:
    """Return the columns on atoms, and one per column with masses: the number of the value with mass, −1 for other values."""
    columns = [x[:, on_atoms]]
    for i, values in masses.items():
        known = x.new_tensor(sorted(values))
        place = (x[:, i, None] == known).double()
        columns.append(((place @ torch.arange(1, len(known) + 1, dtype=place.dtype, device=place.device)) - 1)[:, None])
    return torch.cat(columns, 1)


def _equal_rows(p: Target) -> Float[Tensor, "n d"]:
    """Return rows of equal weight, in float64 on the CPU."""
    if p.samples is None or p.weights is not None:
        because = "they are weighted"
        raise TargetError(cannot("compare these samples by counting", because, "Resample them by their weights first"))
    return p.samples.to("cpu", torch.float64)


def _cells(p: Target | Atoms, q: Target | Atoms) -> tuple[Float[Tensor, "c d"], _Counts, _Counts]:
    """Return the distinct rows of both, and what each has there and, as a last cell, in all others."""
    rows = [one.samples.to("cpu", torch.float64) for one in (p, q) if isinstance(one, Target) and one.samples is not None]
    cells, number = torch.cat(rows).unique(dim=0, return_inverse=True)
    if len(cells) > MAX_CELLS:
        because = f"there are {len(cells):,} distinct rows, and it takes {MAX_CELLS:,}"
        raise TargetError(cannot("compare these samples by counting", because, "Pass method='classifier'"))
    numbers, rest, found = iter(number.split(list(map(len, rows)))), 0.0, list[_Counts]()
    for name, side in (("p", p), ("q", q)):
        if isinstance(side, Atoms):
            mass = side.log_mass(cells).exp()
            rest = max(rest, 1 - float(mass.sum()))
            found.append(_Counts(name, torch.cat([mass, (1 - mass.sum()).clamp(min=0.0)[None]]), None))
            continue
        at = next(numbers)
        w = (
            torch.ones(len(at), dtype=torch.float64, device="cpu")
            if side.weights is None
            else side.weights.to("cpu", torch.float64)
        )
        w = w / w.sum()
        share, squares = (
            torch.zeros(len(cells) + 1, dtype=torch.float64, device="cpu").index_add(0, at, one) for one in (w, w.square())
        )
        found.append(_Counts(name, share / squares.sum(), squares))
    if rest < _MIN_MASS_OF_THE_REST:
        found = [replace(one, count=one.count[:-1], squares=None if one.squares is None else one.squares[:-1]) for one in found]
    return cells, found[0], found[1]


def _smoothed(p: _Counts, q: _Counts, kind: IntegralDivergence) -> tuple[_Counts, _Counts]:
    """Add half a row to each cell of a side of rows whose zeros alone make the divergence infinite."""
    half = torch.tensor([0.5, 0.5], dtype=torch.float64, device="cpu").log()
    one = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu").log()
    if q.squares is not None and bool((kind.misses(half, one) > 0).any()):
        q = replace(q, smoothing=_SMOOTHING)
    if p.squares is not None and bool((kind.misses(one, half) > 0).any()):
        p = replace(p, smoothing=_SMOOTHING)
    return p, q


def _jackknife(
    side: _Counts, other: Float[Tensor, " c"], kind: IntegralDivergence, whole: float, *, is_p: bool
) -> tuple[float, float]:
    """Return the bias, and the variance, that this side's rows give to the divergence."""
    seen = (side.count > 0).nonzero()[:, 0]
    values = []
    for part in seen.split(max(1, _NUMBERS_PER_BLOCK // len(other))):
        own = side.log_mass(part)
        both = other.expand_as(own)
        values.append(log_sum(kind, *((own, both) if is_p else (both, own))))
    without, share, n = torch.cat(values), side.count[seen] / side.rows, side.rows
    mean = float(share @ without)
    squares = side.squares if side.squares is not None else torch.zeros_like(side.count)
    return (n - 1) * (mean - whole), float(squares[seen] @ ((n - 1) * (without - mean)).square()) * n / max(n - 1, 1.0)


def _kink(p: _Counts, q: _Counts) -> float:
    """Return the mean total variation of the shares of the cells that may be equal in both laws, if they are."""
    share, other = (one.count / one.count.sum() for one in (p, q))
    pooled = (p.squares is not None) * share * (1 - share) / p.rows + (q.squares is not None) * other * (1 - other) / q.rows
    sd = torch.where((share - other).abs() < 2 * pooled.sqrt(), pooled.sqrt(), 0.0)
    return float(0.5 * math.sqrt(2 / math.pi) * sd.sum())


def _doubts(p: _Counts, q: _Counts, stderr: float) -> list[str]:
    doubts = []
    for one, other in ((p, q), (q, p)):
        if one.squares is None:
            continue
        if one.rows < _MIN_ROWS:
            doubts.append(f"{one.rows:.0f} effective rows of {one.name} are too few for an error bar, which needs {_MIN_ROWS}")
        if one.share_alone > _MAX_SHARE_SEEN_ONCE:
            what = f"{one.share_alone:.0%} of the rows of {one.name} occur only once"
            doubts.append(f"{what}, so about as much of its mass was never seen")
        if one.smoothing:
            share = other.count / other.count.sum()
            unseen = float(share[one.count == 0].sum())
            if unseen * math.log(max(one.rows, 2.0)) > max(stderr, _MAX_UNSEEN_NATS):
                what = f"{unseen:.2g} of the mass of {other.name} lies on atoms that no row of {one.name} has"
                doubts.append(f"{what}: if {one.name} excludes them, it is infinite")
    return doubts


def _described(side: Target | Atoms, counts: _Counts) -> str:
    if isinstance(side, Atoms):
        return f"the probabilities of {counts.name}"
    rows = 0 if side.samples is None else len(side.samples)
    return f"{rows:,} rows of {counts.name}" + ("" if side.weights is None else f", worth {counts.rows:,.0f}")
