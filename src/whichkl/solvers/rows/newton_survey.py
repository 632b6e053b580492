"""Survey: the first pass of a regression: what standardises the columns x, how often each y occurs, and what can't be fitted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from whichkl._checks import InputError, cannot
from whichkl.families.design import check_context, context_names, refuse_degenerate
from whichkl.families.generalized_linear import GeneralizedLinear
from whichkl.samples import Block
from whichkl.solvers.rows.newton_passes import Design
from whichkl.solvers.rows.rows import Rows

Sums = dict[str, Tensor]
_FAR = 1e3


def survey(rows: Rows, family: GeneralizedLinear, names: Sequence[str]) -> Design:
    """Read the rows once for what standardises x, and refuse what can't be fitted.

    Raises:
        InputError: y holds other values than the response takes, or a class that never occurs; a column x is constant, or depends
            on others and there is no penalty.
    """
    first = next((block for part in rows.parts for block in rows.blocks_of(part)), None)
    if first is None:
        raise InputError(cannot("use these samples", "they hold no row", "Give at least one"))
    family.check_columns(first.x.shape[1])
    origin = check_context(family, first.context)[0]
    sums = _survey(rows, family, origin)
    shift = sums["x"] / sums["weight"]
    variance = sums["xx"].diagonal() / sums["weight"] - shift.square()
    if bool((shift.square() > _FAR**2 * variance.clamp(min=0)).any()):
        origin = origin + shift
        sums = _survey(rows, family, origin)
        shift = sums["x"] / sums["weight"]
    if int(sums["outside"]):
        because = (
            f"y holds {int(sums['outside']):,} values that `{family.response}` doesn't take: it takes {family.law.values.words}"
        )
        raise InputError(cannot(f"fit `{family}`", because, family.advice))
    family.check_count(int(sums["rows"]), 1)
    frequencies = sums["codes"] / sums["weight"]
    _check_frequencies(family, frequencies)
    covariance = sums["xx"] / sums["weight"] - torch.outer(shift, shift)
    known = context_names(names, len(origin))
    refuse_degenerate(family, covariance, known, dependent=family.penalty == 0)
    columns = len(frequencies) if family.response == "categorical" else 1
    count = float(sums["rows"])
    center, scale = origin + shift, covariance.diagonal().sqrt()
    return Design(family, known, center, scale, columns, count, count / float(sums["weight"]), frequencies)


def _survey(rows: Rows, family: GeneralizedLinear, origin: Tensor) -> Sums:
    total: Sums = {}
    for sums in rows.map(_Survey(family, origin)):
        for name, value in sums.items():
            if name in total and name == "codes" and len(total[name]) != len(value):
                size = max(len(total[name]), len(value))
                total[name], value = (torch.nn.functional.pad(one, (0, size - len(one))) for one in (total[name], value))
            total[name] = total[name] + value if name in total else value
    return total


def _check_frequencies(family: GeneralizedLinear, frequencies: Tensor) -> None:
    if family.response == "poisson":
        if float(frequencies[0]) == 0:
            because = "all counts y are 0, so the likelihood has no maximum"
            raise InputError(cannot(f"fit `{family}`", because, "Give rows with counts above 0"))
        return
    if family.response == "bernoulli":
        frequencies = torch.stack([1 - frequencies[0], frequencies[0]])
    missing = (frequencies <= 0).nonzero().flatten().tolist()
    if missing or len(frequencies) < 2:
        which = missing[0] if missing else 1
        because = f"class {which} never occurs in y, so its likelihood has no maximum"
        raise InputError(cannot(f"fit `{family}`", because, "Give rows of it, or code the classes that occur as 0 … K−1"))


@dataclass(frozen=True)
class _Survey:
    """Adds up moments of x about an origin, and the mean of y or the weight of each class."""

    family: GeneralizedLinear
    origin: Float[Tensor, " c"]

    def __call__(self, blocks: Iterator[Block]) -> Sums:
        c = len(self.origin)
        zero = self.origin.new_zeros(())
        sums = {"rows": zero, "weight": zero, "outside": zero, "x": zero.expand(c), "xx": zero.expand(c, c), "codes": zero[None]}
        for block in blocks:
            x, y = check_context(self.family, block.context) - self.origin, block.x[:, 0]
            inside = self.family.law.values.contains(y)
            y = torch.where(inside, y, 0)
            codes = (block.w @ y)[None]
            if self.family.response == "categorical":
                codes = torch.bincount(y.long(), weights=block.w, minlength=len(sums["codes"]))
                sums["codes"] = torch.nn.functional.pad(sums["codes"], (0, len(codes) - len(sums["codes"])))
            more = {
                "rows": (block.w > 0).sum(),
                "weight": block.w.sum(),
                "outside": (~inside).sum(),
                "x": block.w @ x,
                "xx": (block.w[:, None] * x).T @ x,
                "codes": codes,
            }
            sums = {name: value + more[name] for name, value in sums.items()}
        return sums
