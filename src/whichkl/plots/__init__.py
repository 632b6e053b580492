"""Plots: plotly figures of a fit. They draw what was computed and compute nothing but curves and draws."""

from whichkl.plots.calibration import calibration_curves
from whichkl.plots.components import components_curve
from whichkl.plots.conditional import predictions
from whichkl.plots.fitted import SHOWN, add_ellipses, density, ellipse, plot
from whichkl.plots.margins import margins
from whichkl.plots.pairs import pairs
from whichkl.plots.style import COLORS, Curve, lines, style

__all__ = [
    "COLORS",
    "SHOWN",
    "Curve",
    "add_ellipses",
    "calibration_curves",
    "components_curve",
    "density",
    "ellipse",
    "lines",
    "margins",
    "pairs",
    "plot",
    "predictions",
    "style",
]
