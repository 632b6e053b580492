"""Students: a study of distillations in a YAML file, which has the keys of `whichkl distill`, `objectives` and `seeds`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot
from whichkl.distillation.classifier import DistillationTarget
from whichkl.distillation.job import job, read_fields
from whichkl.distillation.language.job import is_language_job, language_job
from whichkl.distillation.language.target import LanguageTarget, check_arguments
from whichkl.distillation.teacher_target import TeacherTarget
from whichkl.study.plan import DistillationPlan, distillation_plan_of


def read_student_plan(path: Path) -> DistillationPlan:
    """Read a study of one student by several objectives; relative paths in it start at its folder.

    Raises:
        InputError: a key is unknown, missing or wrong, or something that it names can't be loaded.
    """
    fields = read_fields(path)
    values = dict(fields.values)
    objectives, seeds = values.pop("objectives", None), values.pop("seeds", 10)
    if wrong := [name for name in ("objective", "prefixes", "credit", "seed") if name in values]:
        because = f"`{wrong[0]}` is for one distillation"
        instead = "Name `objectives:`, a list such as [forward_kl@data, reverse_kl@student], and a number of `seeds:`"
        with fields.naming(wrong[0]):
            raise InputError(cannot(f"read `{path}`", because, instead))
    name = Path(str(values.get("student", "student")).rpartition(":")[2]).name
    is_of_language, written = is_language_job(values), fields._replace(values=values)
    found: dict[str, Any] = language_job(written) if is_of_language else job(written)
    student = found.pop("student")
    with fields.as_in_file((*fields.values, *found)):
        if is_of_language:
            target: TeacherTarget = LanguageTarget(**found)
            check_arguments(found.get("args"))
        else:
            target = DistillationTarget(found.pop("teacher"), found.pop("data"), found)
    for i, one in enumerate([objectives] if isinstance(objectives, str) else objectives or ()):
        with fields.naming("objectives", i):
            target.name_of(one)
    with fields.as_in_file(fields.values):
        return distillation_plan_of(target, {name: student}, objectives, seeds)
