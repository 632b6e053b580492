"""Families: immutable descriptions of the sets of models that a fit chooses from."""

from whichkl.families.categorical import Categorical
from whichkl.families.family import Family, family_from_config
from whichkl.families.gaussian import Gaussian
from whichkl.families.generalized_linear import GeneralizedLinear
from whichkl.families.ladder import richer, simpler
from whichkl.families.linear_gaussian import LinearGaussian
from whichkl.families.mixture import Mixture
from whichkl.families.product import Product
from whichkl.families.student_t import StudentT

__all__ = [
    "Categorical",
    "Family",
    "Gaussian",
    "GeneralizedLinear",
    "LinearGaussian",
    "Mixture",
    "Product",
    "StudentT",
    "family_from_config",
    "richer",
    "simpler",
]
