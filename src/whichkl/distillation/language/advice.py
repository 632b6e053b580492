"""Advice: what can be asked of a language model's teacher → which objectives on which prefixes, and what they minimise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from whichkl._checks import InputError
from whichkl.advice import Advice, Option
from whichkl.distillation.language.objective import LanguageObjective
from whichkl.distillation.language.teacher_access import TeacherAccess, check_access

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
    label: str = ""
    """What there is of the teacher, for the page."""
    is_for_shell: bool = False
    """Whether its lines are for the command line: keys of a job, in place of Python."""

    @property
    def access_label(self) -> str:
        """What there is of the teacher."""
        return self.label

    @property
    def situation(self) -> str:
        """One sentence on what can be asked of the teacher."""
        return self.known

    @property
    def verdict(self) -> str:
        """What to do, in plain words."""
        names = [option.objective.name for option in self.options]
        if not names:
            return "Nothing can be minimised: the reasons are below."
        if self.access.cell == "samples" and len(names) == 1:
            return "Minimise forward KL on the data's prefixes: no other direction is possible."
        if self.access.cell == "log_prob":
            return "Minimise reverse KL on the student's own prefixes: no other direction is possible."
        other, possible = "reverse_kl@student", "Either direction is possible, and direction and prefixes are two choices"
        if self.access.cell == "samples":
            other = "reverse_kl@data"
            possible = "Either direction of the next token's KL is possible, as a lower bound and on the data's prefixes alone"
        typed = f"whichkl.compare(target, {{'student': student}}, [{names[0]!r}, {other!r}], seeds=6)"
        if self.is_for_shell:
            typed = f"`whichkl compare STUDY.yaml`, with `objectives: [{names[0]}, {other}]` and `seeds: 6`"
        return (
            f"{possible}, so let an experiment on your data decide: {typed}. Start with {names[0]}, which drops nothing that "
            "the teacher may write."
        )


def language_advice(
    teacher: TeacherAccess, check: Callable[[LanguageObjective], None] | None = None, shell: str | None = None
) -> LanguageAdvice:
    """Return the advice for a teacher of this access.

    Args:
        teacher: what can be asked of it.
        check: refuses an objective; by default what the access doesn't allow is refused.
        shell: the teacher as a job names it, for lines of the command line; None for lines of Python.

    >>> [option.objective.name for option in language_advice(TeacherAccess.named("text")).options]
    ['forward_kl@data']
    """
    options, missing = [], {}
    for text in _RANKED:
        objective = replace(LanguageObjective.of(text), is_of_teachers_text=teacher.kind == "text")
        try:
            if check is None:
                check_access(teacher, objective.divergence, objective.shares)
            else:
                check(objective)
        except InputError as error:
            missing[text] = str(error).split(": ", 1)[-1].split(". ", 1)[0]
            continue
        source = next(name for name, share in objective.shares.items() if share)
        line = f"language_model({_typed(objective)}, …)" if shell is None else _as_job(objective, shell)
        options.append(Option(objective, teacher.reason or _REASONS[source], line))
    return LanguageAdvice(
        teacher.access,
        None,
        None,
        tuple(options),
        missing,
        (),
        known=teacher.situation,
        label=teacher.label,
        is_for_shell=shell is not None,
    )


def _arguments(objective: LanguageObjective) -> dict[str, Any]:
    return {name: value for name, value in objective.arguments.items() if (name, value) != ("credit", "token")}


def _typed(objective: LanguageObjective) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in _arguments(objective).items())


def _as_job(objective: LanguageObjective, teacher: str) -> str:
    """Return the command, and the keys of its job that state the objective."""
    keys = {"teacher": teacher, **_arguments(objective)}
    keys["prefixes"] = "{" + ", ".join(f"{name}: {share:g}" for name, share in keys["prefixes"].items()) + "}"
    return "whichkl distill JOB.yaml, with\n" + "\n".join(f"    {name}: {value}" for name, value in keys.items())
