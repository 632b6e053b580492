"""Problems: targets with a known truth, or real ones that everybody knows."""

from whichkl.problems.eight_schools import eight_schools
from whichkl.problems.multimodal import gmm40, many_well
from whichkl.problems.named import named
from whichkl.problems.petals import petals
from whichkl.problems.posteriors import POSTERIORS, posterior
from whichkl.problems.textbook import bimodal

__all__ = ["POSTERIORS", "bimodal", "eight_schools", "gmm40", "many_well", "named", "petals", "posterior"]
