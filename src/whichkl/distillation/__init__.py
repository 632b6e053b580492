"""Distillation: losses, the audit of a loss, and a student trained on a teacher that gives both samples and probabilities.

Names are loaded when they are first used, so that a loss costs no more than itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whichkl.distillation.classifier import DistillationTarget, distill
    from whichkl.distillation.language.capture import capture
    from whichkl.distillation.language.distillation import language_model
    from whichkl.distillation.language.held_out_loss import HeldOutLoss
    from whichkl.distillation.language.result import LanguageDistillation
    from whichkl.distillation.language.sequence_kl import SequenceKL, sequence_kl
    from whichkl.distillation.language.stored_teacher import StoredTeacher
    from whichkl.distillation.language.target import LanguageTarget
    from whichkl.distillation.language.teacher_access import TokenScores
    from whichkl.distillation.language.trainer import LanguageTrainer
    from whichkl.distillation.result import Distillation
    from whichkl.distillation.scores import Contrast, Reliability, Scores, reliability, scored

_HOMES = {
    "Contrast": "scores",
    "Distillation": "result",
    "DistillationTarget": "classifier",
    "HeldOutLoss": "language.held_out_loss",
    "LanguageDistillation": "language.result",
    "LanguageTarget": "language.target",
    "LanguageTrainer": "language.trainer",
    "Reliability": "scores",
    "Scores": "scores",
    "SequenceKL": "language.sequence_kl",
    "StoredTeacher": "language.stored_teacher",
    "TokenScores": "language.teacher_access",
    "capture": "language.capture",
    "distill": "classifier",
    "language_model": "language.distillation",
    "reliability": "scores",
    "scored": "scores",
    "sequence_kl": "language.sequence_kl",
}
"""The module of each name."""

__all__ = [
    "Contrast",
    "Distillation",
    "DistillationTarget",
    "HeldOutLoss",
    "LanguageDistillation",
    "LanguageTarget",
    "LanguageTrainer",
    "Reliability",
    "Scores",
    "SequenceKL",
    "StoredTeacher",
    "TokenScores",
    "capture",
    "distill",
    "language_model",
    "reliability",
    "scored",
    "sequence_kl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whichkl.distillation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"whichkl.distillation.{_HOMES[name]}"), name)
