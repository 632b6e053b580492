"""Study: an experiment that compares families and objectives at equal cost, in a folder from which it resumes if interrupted."""

from whichkl.study.comparing import Progress, compare
from whichkl.study.measures import DISTILLATION_NEEDS, FIELDS, LANGUAGE_NEEDS, MEASURES, NEEDS, Need
from whichkl.study.result import Study
from whichkl.study.verdict import Verdict, decide

__all__ = [
    "DISTILLATION_NEEDS",
    "FIELDS",
    "LANGUAGE_NEEDS",
    "MEASURES",
    "NEEDS",
    "Need",
    "Progress",
    "Study",
    "Verdict",
    "compare",
    "decide",
]
