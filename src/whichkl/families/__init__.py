"""Families: immutable descriptions of the sets of models that a fit chooses from."""

from whichkl.families.autoencoder import VariationalAutoencoder
from whichkl.families.autoregressive import Autoregressive
from whichkl.families.block_mixture import BlockMixture
from whichkl.families.categorical import Categorical
from whichkl.families.family import Family, family_from_config
from whichkl.families.flow import Flow
from whichkl.families.gaussian import Gaussian
from whichkl.families.generalized_linear import GeneralizedLinear
from whichkl.families.ladder import has_independent_columns, richer, simpler, simplest
from whichkl.families.linear_gaussian import LinearGaussian
from whichkl.families.mixture import Mixture
from whichkl.families.network_family import NetworkFamily
from whichkl.families.neural import MixtureDensityNetwork, Neural
from whichkl.families.product import Product
from whichkl.families.student_t import StudentT
from whichkl.families.user_module import Module, family_of

__all__ = [
    "Autoregressive",
    "BlockMixture",
    "Categorical",
    "Family",
    "Flow",
    "Gaussian",
    "GeneralizedLinear",
    "LinearGaussian",
    "Mixture",
    "MixtureDensityNetwork",
    "Module",
    "NetworkFamily",
    "Neural",
    "Product",
    "StudentT",
    "VariationalAutoencoder",
    "family_from_config",
    "family_of",
    "has_independent_columns",
    "richer",
    "simpler",
    "simplest",
]
