"""Plots: plotly figures of a fit, a study or a distillation. They show computed results, and compute only curves and draws."""

from whichkl.plots.curves import calibration_curves, components_curve
from whichkl.plots.dispatch import plot
from whichkl.plots.predictions import predictions
from whichkl.plots.rows import margins, pairs

__all__ = ["calibration_curves", "components_curve", "margins", "pairs", "plot", "predictions"]
