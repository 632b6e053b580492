"""Fitting: `fit` returns a `Fit`, the model with how well it does."""

from whichkl.fitting.result import Fit
from whichkl.fitting.run import Solved, _identity, fit, solve

__all__ = ["Fit", "Solved", "_identity", "fit", "solve"]
