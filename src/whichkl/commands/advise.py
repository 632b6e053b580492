"""advise: which direction is possible for a target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whichkl._checks import InputError, cannot
from whichkl.commands import asking, console, exits, options
from whichkl.conversions.table import conversion_named

if TYPE_CHECKING:
    from whichkl.advice import Advice


def advise(
    samples: options.Samples = None,
    log_prob: options.LogProb = None,
    dim: options.Dim = None,
    support: options.Support = None,
    access: Annotated[
        str | None,
        typer.Option(
            "--access", help="Instead of a target, what you can do with it: 'samples', 'sampler,log_prob', … or 'nothing'."
        ),
    ] = None,
    left: Annotated[
        str | None,
        typer.Option(
            "--left",
            help="If you can neither sample nor evaluate it, what you have: simulator, comparisons, moments, labels or weights.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="DIR|KIND",
            help="Of language models, instead of a target: a folder that save_pretrained or `distill capture` wrote, or what you "
            "have of the teacher: model, text, scores, top_k or draws.",
        ),
    ] = None,
    family: options.FamilyName = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    missing: options.Missing = "refuse",
    thousands: options.Thousands = None,
    categories: options.Categories = None,
    as_json: options.AsJson = False,
) -> None:
    """Say which direction is possible for a target, and why. On a terminal, without a target, it asks what you can do."""
    options.check_exists(samples)
    given = {"SAMPLES": samples, "--log-prob": log_prob, "--dim": dim, "--support": support, "--access": access, "--left": left}
    if teacher is not None:
        console.show(_of_teacher(teacher, {**given, "--family": family}), as_json)
        return
    is_given = any(one is not None for one in given.values())
    if not is_given and asking.is_possible() and not as_json:
        access, left = asking.ask()
    _check_together(access, left, is_target=bool(samples or log_prob))
    exits.load_torch()
    from whichkl.access import Access
    from whichkl.advice import advise as advised

    if access is not None or (left is not None and dim is None):
        target: Any = Access.parse(access or "nothing")
    else:
        reading: dict[str, Any] = {"columns": columns, "drop": drop, "missing": missing, "thousands": thousands}
        target = options.read_target(samples, log_prob, dim, support, **reading, categories=categories)
    advice = advised(target, family)
    if left is not None:
        advice = replace(advice, conversions=(conversion_named(left),))
    console.show(advice, as_json)
    if not is_given and not as_json:
        console.say(f"\nNext: {_next_line(advice)}")


def _check_together(access: str | None, left: str | None, *, is_target: bool) -> None:
    if left is not None and (is_target or access not in (None, "nothing")):
        because = "it is for a target that can be neither sampled nor evaluated, and an access is given"
        raise InputError(cannot("use `--left` here", because, "Drop one of them"))
    if access is not None and is_target:
        raise InputError(cannot("use `--access` here", "a target is given, which has its own access", "Drop one of them"))


def _of_teacher(teacher: str, others: dict[str, Any]) -> Advice:
    """Return the advice for a teacher of language models: a stored one is opened, and what a model allows needs no model."""
    if given := [name for name, value in others.items() if value is not None]:
        because = f"`{given[0]}` is for a target of another kind"
        raise InputError(cannot("use `--teacher` here", because, "Drop one of them"))
    exits.load_torch()
    from whichkl.distillation.language.advice import language_advice
    from whichkl.distillation.language.stored_teacher import MANIFEST, StoredTeacher
    from whichkl.distillation.language.teacher_access import TeacherAccess

    folder = Path(teacher)
    is_stored, is_model = (folder / MANIFEST).exists(), (folder / "config.json").exists()
    known = TeacherAccess.of(StoredTeacher.open(folder)) if is_stored else TeacherAccess.named("model" if is_model else teacher)
    if known.kind == "scores":  # by a function, which only Python takes
        return language_advice(known)
    return language_advice(known, shell=teacher if is_stored or is_model or known.kind == "text" else "FOLDER")


def _next_line(advice: Advice) -> str:
    """Return the line to run next: a command, or code where it takes a program."""
    if advice.access.cell == "neither":
        first = advice.conversions[0]
        return first.command or first.call if len(advice.conversions) == 1 else "collect draws, or write log p(x) down"
    samples = ["SAMPLES.csv"] * advice.access.can_sample
    density = ["--log-prob", "FILE.py:FUNCTION", *(["--dim", "D"] if not samples else [])] * advice.access.can_evaluate
    return " ".join(["whichkl", "fit", *samples, *density])
