"""Study: an experiment that compares families and objectives at equal cost, and a folder that survives being killed."""

from whichkl.study.comparing import Progress, compare
from whichkl.study.measures import FIELDS, MEASURES
from whichkl.study.result import Study

__all__ = ["FIELDS", "MEASURES", "Progress", "Study", "compare"]
