"""Divergences: numbers between two distributions, each with its error."""

from whichkl.divergences.estimate import Estimate, Finite

__all__ = ["Estimate", "Finite"]
