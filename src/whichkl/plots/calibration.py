"""Calibration plots: how far the transforms of unseen rows are from uniform, and the band that chance allows."""

from __future__ import annotations

from whichkl.fitting import Fit
from whichkl.goodness.transform import levels
from whichkl.plots.style import Figure, add_band, add_line, new_figure, small

_MAX_FIGURES = 12


def calibration_curves(fit: Fit, most: int = _MAX_FIGURES) -> list[Figure]:
    """Draw, for each column, the distribution function of u = F_q(x) on unseen rows less its diagonal, with its 95 % band.

    The band is simultaneous: under a right model all curves of all columns stay inside with 95 % chance. The worst column comes
    first; the list is empty where the fit wasn't calibrated.
    """
    calibration = fit.diagnostics.calibration
    if calibration is None or calibration.p_value is None:
        return []
    z, figures = levels(), []
    x = [0.0, *z.tolist(), 1.0]
    for one in sorted(calibration.columns, key=lambda one: (one.p_value, -one.distance))[:most]:
        figure = new_figure()
        low, high, y = ([0.0, *(value - z).tolist(), 0.0] for value in (*one.band, one.curve))
        add_band(figure, x, low, high, "target")
        add_line(figure, x, y, "reverse_kl" if one.differs else fit.objective.name, one.name)
        small(figure, f"{one.name}, p = {one.p_value:.2g}", "u" if len(calibration.columns) == 1 else "")
        reach = max(0.02, *map(abs, y), *high)
        figure.update_yaxes(range=[-1.15 * reach, 1.15 * reach], nticks=5)
        figure.update_xaxes(range=[0, 1], nticks=6)
        figures.append(figure)
    return figures
