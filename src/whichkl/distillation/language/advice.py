"""Advice: what can be asked of a language model's teacher → which objectives on which prefixes, and what they minimise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from whichkl._checks import InputError
from whichkl.access import Access
from whichkl.advice import Advice, Option
from whichkl.distillation.language.objective import LanguageObjective
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.teacher_access import TokenScores

_RANKED = (
    "forward_kl@data",
    "forward_kl@teacher",
    "reverse_kl@student",
    "reverse_kl@student:sequence",
    "jeffreys:0.5@data",
    "reverse_kl@data",
    "forward_kl@student",
    "reverse_kl@teacher",
)
"""Objectives that are considered, the first to try first; any other row divergence can take the place of `jeffreys:0.5`."""
_REASONS = {
    "data": "the teacher's laws are read after the data's tokens; nothing is drawn, which costs least",
    "teacher": "the teacher draws continuations of the prompts, and its laws along them are read",
    "student": "the student draws continuations of the prompts, and the teacher's laws along them are read",
}


@dataclass(frozen=True, repr=False)
class LanguageAdvice(Advice):
    """The possible pairs of a divergence and prefixes for a teacher, and the reasons against the others."""

    known: str = ""
    """One sentence on what can be asked of the teacher."""

    @property
    def situation(self) -> str:
        """One sentence on what can be asked of the teacher."""
        return self.known

    @property
    def verdict(self) -> str:
        """What to do, in plain words."""
        if self.access.cell == "samples":
            return "Minimise forward KL on the data's prefixes: no other direction is possible."
        if self.access.cell == "log_prob":
            return "Minimise reverse KL on the student's own prefixes: no other direction is possible."
        return (
            "Either direction is possible, and so is every source of prefixes, so let an experiment on your data decide: "
            "whichkl.compare(target, {'student': student}, ['forward_kl@data', 'reverse_kl@student'], seeds=6). Start with "
            "forward_kl@data, which is the cheapest."
        )


def language_advice(teacher: Any, access: Access, check: Callable[[LanguageObjective], None]) -> LanguageAdvice:
    """Return the advice for a teacher; `check` refuses an objective that it doesn't allow."""
    options, missing = [], {}
    for text in _RANKED:
        objective = replace(LanguageObjective.of(text), is_of_teachers_text=teacher is None)
        try:
            check(objective)
        except InputError as error:
            missing[text] = str(error).split(": ", 1)[-1].split(". ", 1)[0]
            continue
        options.append(Option(objective, _reason(teacher, objective), f"language_model({_typed(objective)}, …)"))
    return LanguageAdvice(access, None, None, tuple(options), missing, (), known=_known(teacher))


def _known(teacher: Any) -> str:
    if teacher is None:
        return "You have the teacher's text, and can ask it nothing."
    if isinstance(teacher, StoredTeacher):
        return f"You have {teacher.what} after each token of the teacher's text, and can ask it nothing else."
    if isinstance(teacher, TokenScores):
        return "You can have the teacher score given tokens, and not sample it."
    return "You can sample the teacher and evaluate it."


def _reason(teacher: Any, objective: LanguageObjective) -> str:
    if teacher is None:
        return "the data are the teacher's text, whose cross-entropy is the forward KL up to the text's entropy"
    if isinstance(teacher, StoredTeacher):
        return f"{teacher.what} are stored after every token of the data"
    if isinstance(teacher, TokenScores):
        return "the student draws continuations of the prompts, and the teacher scores their tokens"
    return _REASONS[next(name for name, share in objective.shares.items() if share)]


def _typed(objective: LanguageObjective) -> str:
    arguments = objective.arguments
    if arguments["credit"] == "token":
        del arguments["credit"]
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
