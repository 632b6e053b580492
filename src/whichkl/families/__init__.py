"""Families: immutable descriptions of the sets of models that a fit chooses from."""

from whichkl.families.family import Family, family_from_config
from whichkl.families.gaussian import Gaussian
from whichkl.families.ladder import richer, simpler
from whichkl.families.mixture import Mixture
from whichkl.families.student_t import StudentT

__all__ = ["Family", "Gaussian", "Mixture", "StudentT", "family_from_config", "richer", "simpler"]
