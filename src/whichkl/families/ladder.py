"""Ladder: the next family when one is too small, or too rich."""

from dataclasses import replace

from whichkl.families.block_mixture import BlockMixture
from whichkl.families.family import Family
from whichkl.families.gaussian import Gaussian
from whichkl.families.generalized_linear import GeneralizedLinear
from whichkl.families.linear_gaussian import LinearGaussian
from whichkl.families.mixture import Mixture
from whichkl.families.network_family import NetworkFamily
from whichkl.families.neural import MixtureDensityNetwork, Neural
from whichkl.families.product import Product
from whichkl.families.student_t import StudentT


def has_independent_columns(family: Family) -> bool:
    """Whether it is a single normal or Student-t law of columns that are independent of each other.

    >>> has_independent_columns(Gaussian("diagonal")), has_independent_columns(Gaussian("full"))
    (True, False)
    """
    if isinstance(family, Product):
        return set(family.named) == {"normal"}
    return isinstance(family, (Gaussian, StudentT)) and family.covariance == "diagonal"


def richer(family: Family, *, correlated: bool = False) -> Family | None:
    """Return the next richer family, or None: two components for one law, one more for a mixture, networks for linear models.

    Args:
        family: the present family.
        correlated: whether columns are correlated that the family treats as independent; then a full covariance comes first.

    >>> richer(Gaussian("diagonal"))
    Mixture(components=2, covariance='diagonal', law='gaussian')
    >>> richer(Gaussian("diagonal"), correlated=True)
    Gaussian(covariance='full')
    """
    if has_independent_columns(family):
        if correlated:
            return StudentT() if isinstance(family, StudentT) else Gaussian("full")
        return Mixture(2, "diagonal", "student_t" if isinstance(family, StudentT) else "gaussian")
    if isinstance(family, Gaussian) and family.covariance == "low_rank":
        return Gaussian("full")
    if isinstance(family, Gaussian):
        return Mixture(2)
    if isinstance(family, StudentT):
        return Mixture(2, family.covariance, "student_t")
    if isinstance(family, BlockMixture):
        return replace(family, components=family.components + 1)
    if isinstance(family, Mixture):
        return replace(family, components=family.count + 1)
    if isinstance(family, NetworkFamily):
        return family.wider()
    if isinstance(family, LinearGaussian):
        return MixtureDensityNetwork(1)
    if isinstance(family, GeneralizedLinear):
        return Neural(family.response)
    return None


def simplest(family: Family) -> Family | None:
    """Return the single law of a mixture; None for other families.

    >>> simplest(Mixture(5, "diagonal"))
    Gaussian(covariance='diagonal')
    """
    return simpler(replace(family, components=2)) if isinstance(family, Mixture) and family.count > 1 else None


def simpler(family: Family) -> Family | None:
    """Return the next simpler family: a mixture with one component less, a Gaussian for a Student-t; None for a Gaussian.

    >>> simpler(Mixture(2))
    Gaussian(covariance='full')
    """
    if isinstance(family, Gaussian):
        return Gaussian("diagonal") if family.covariance == "low_rank" else None
    if isinstance(family, Mixture) and family.count > 2:
        return replace(family, components=family.count - 1)
    if not isinstance(family, StudentT | Mixture) or (isinstance(family, Mixture) and family.count == 1):
        return None
    law = StudentT if isinstance(family, Mixture) and family.law == "student_t" else Gaussian
    return law("diagonal" if family.covariance == "diagonal" else "full")
