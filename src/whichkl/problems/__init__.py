"""Problems: targets with a known truth, and well-known real ones."""

from whichkl.problems.boltzmann import RestrictedBoltzmann, restricted_boltzmann
from whichkl.problems.named import named
from whichkl.problems.posteriors import POSTERIORS, posterior
from whichkl.problems.real_data import breast_cancer, eight_schools, petals
from whichkl.problems.synthetic import banana, bimodal, funnel, gmm40, many_well, two_moons

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
