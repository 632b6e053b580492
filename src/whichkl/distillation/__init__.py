"""Distillation: a student trained on a teacher that gives both samples and probabilities."""

from whichkl.distillation.calibration import Reliability, reliability
from whichkl.distillation.classifier import distill
from whichkl.distillation.result import Distillation
from whichkl.distillation.scores import Contrast, Scores, scored
from whichkl.distillation.target import DistillationTarget

__all__ = ["Contrast", "Distillation", "DistillationTarget", "Reliability", "Scores", "distill", "reliability", "scored"]
