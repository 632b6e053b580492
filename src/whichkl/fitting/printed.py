"""Printed: a fit as text, in at most 40 lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whichkl.diagnostics import shown_weights
from whichkl.fitting.summary import MAX_ROWS
from whichkl.printable import wrapped

if TYPE_CHECKING:
    from whichkl.fitting.result import Fit

_MAX_LINES = 40
"""Largest number of printed lines, of which the table has at least `_MIN_ROWS` rows."""
_MIN_ROWS = 5
_MAX_LOSSES = 8


def printed(fit: Fit) -> str:
    """Return what `print` shows of a fit."""
    d = fit.diagnostics
    head = f"{fit.objective.spec} over {fit.family} by {fit.solver}: {fit.status}"
    lines = [*wrapped(head), *wrapped(fit.trust, "  "), *wrapped(str(fit.value), "  ")]
    if d.elbo is not None:
        weights = ""
        if d.ess is not None and (n := d.elbo.n) is not None:
            weights = f", importance ESS {d.ess:,.0f} of {n:,}, PSIS k̂ {shown_weights(d.ess, d.khat, n)}"
        lines.append(f"  ELBO {d.elbo.number} nats{d.elbo.constant}{weights}")
    said = []
    if len(d.optima) > 1:
        losses = ", ".join(f"{one.loss:.4f}" for one in d.optima[:_MAX_LOSSES])
        said.append(f"{len(d.optima)} distinct optima, losses {losses}{', …' * (len(d.optima) > _MAX_LOSSES)}")
    said += [str(one) for one in (d.two_sample, d.calibration) if one is not None and one.p_value is not None]
    if d.missing_modes is not None and (d.missing_modes.found or d.missing_modes.reason):
        said.append(str(d.missing_modes))
    said += d.notes
    said += [f"{name}: {text}" for name, text in zip(sorted(fit.findings), fit.explanations, strict=True)]
    rest = [line for one in said for line in wrapped(one, "  ")]
    summary = fit.summary()
    rows = max(_MIN_ROWS, min(MAX_ROWS, _MAX_LINES - len(lines) - len(rest) - len(summary.notes) - 2))
    table = [f"  {line}" for line in summary.lines(rows)]
    return "\n".join([*lines, *table, *(f"  {note}" for note in summary.notes if table), *rest])
