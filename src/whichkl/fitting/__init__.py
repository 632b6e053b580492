"""Fitting: `fit` returns a `Fit`, the model with how well it does."""

from whichkl.fitting.result import Fit
from whichkl.fitting.run import _identity, fit, fit_of, solve

__all__ = ["Fit", "_identity", "fit", "fit_of", "solve"]
