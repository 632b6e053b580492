"""Fitting: `fit` returns a `Fit`, the model with how well it does."""

from whichkl.fitting.result import Fit
from whichkl.fitting.run import _identity, fit
from whichkl.fitting.solve import Solved, solve

__all__ = ["Fit", "Solved", "_identity", "fit", "solve"]
