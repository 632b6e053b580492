"""Problems: targets with a known truth, and well-known real ones."""

from whichkl.problems.boltzmann import RestrictedBoltzmann, restricted_boltzmann
from whichkl.problems.breast_cancer import breast_cancer
from whichkl.problems.eight_schools import eight_schools
from whichkl.problems.multimodal import gmm40, many_well
from whichkl.problems.named import named
from whichkl.problems.petals import petals
from whichkl.problems.planar import banana, funnel, two_moons
from whichkl.problems.posteriors import POSTERIORS, posterior
from whichkl.problems.textbook import bimodal

__all__ = [
    "POSTERIORS",
    "RestrictedBoltzmann",
    "banana",
    "bimodal",
    "breast_cancer",
    "eight_schools",
    "funnel",
    "gmm40",
    "many_well",
    "named",
    "petals",
    "posterior",
    "restricted_boltzmann",
    "two_moons",
]
