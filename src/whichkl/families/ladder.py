"""The ladder of families: where to go when one is too small, or too rich."""

from whichkl.families.family import Family
from whichkl.families.gaussian import Gaussian
from whichkl.families.mixture import Mixture


def richer(family: Family) -> Family:
    """Return the next richer family: a mixture of two above a Gaussian, one component more above a mixture.

    >>> richer(Gaussian("diagonal"))
    Mixture(components=2, covariance='diagonal')
    """
    if isinstance(family, Gaussian):
        return Mixture(2, family.covariance)
    if isinstance(family, Mixture):
        return Mixture(family.components + 1, family.covariance)
    raise TypeError(family)


def simpler(family: Family) -> Family | None:
    """Return the next simpler family: one component less below a mixture; None below a Gaussian.

    >>> simpler(Mixture(2))
    Gaussian(covariance='full')
    """
    if not isinstance(family, Mixture) or family.components == 1:
        return None
    return Gaussian(family.covariance) if family.components == 2 else Mixture(family.components - 1, family.covariance)
