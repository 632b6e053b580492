"""Plots: plotly figures of a fit. They draw what was computed, and compute only curves and draws."""

from whichkl.plots.calibration import calibration_curves
from whichkl.plots.components import components_curve
from whichkl.plots.conditional import predictions
from whichkl.plots.fitted import plot
from whichkl.plots.margins import margins
from whichkl.plots.pairs import pairs

__all__ = ["calibration_curves", "components_curve", "margins", "pairs", "plot", "predictions"]
