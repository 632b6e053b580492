"""Calibration plots: how far the transforms of unseen rows are from uniform, within what chance allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whichkl._checks import require
from whichkl.fitting import Fit
from whichkl.goodness.bands import levels
from whichkl.plots.style import COLORS, SOFT, short, small

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST = 12


def calibration_curves(fit: Fit, most: int = MOST) -> list[Figure]:
    """Draw, for each column, the distribution function of u = F_q(x) on unseen rows less its diagonal, with its 95 % band.

    The band is simultaneous: under a right model all curves of all columns stay inside with 95 % chance. Worst first; none
    where the fit wasn't calibrated.
    """
    calibration = fit.diagnostics.calibration
    if calibration is None or calibration.p_value is None:
        return []
    go, z, figures = require("plotly.graph_objects", "app"), levels(), []
    for one in sorted(calibration.columns, key=lambda one: (one.p_value, -one.distance))[:most]:
        low, high = one.band
        figure, x = go.Figure(), short([0.0, *z.tolist(), 1.0])
        for side, fill in ((low, None), (high, "tonexty")):
            y = short([0.0, *(value - level for value, level in zip(side, z, strict=True)), 0.0])
            figure.add_scatter(
                x=x, y=y, mode="lines", line={"width": 0}, fill=fill, fillcolor=SOFT["target"], hoverinfo="skip", showlegend=False
            )
        y = short([0.0, *(value - level for value, level in zip(one.curve, z, strict=True)), 0.0])
        color = COLORS["reverse_kl" if one.differs else fit.objective.name]
        figure.add_scatter(x=x, y=y, mode="lines", line={"color": color, "width": 2.2}, name=one.name)
        small(figure, f"{one.name}, p = {one.p_value:.2g}", "u" if len(calibration.columns) == 1 else "")
        reach = max(0.02, *(abs(value) for value in y), *(h - level for h, level in zip(high, z, strict=True)))
        figure.update_yaxes(range=[-1.15 * reach, 1.15 * reach], nticks=5)
        figure.update_xaxes(range=[0, 1], nticks=6)
        figures.append(figure)
    return figures
