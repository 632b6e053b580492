"""distill: a student is trained on its teacher, a classifier or a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, out_option
from whichkl.commands.results_folder import (
    check_results_folder,
    deliver,
    journal_of,
    locked_results,
    prepare_results,
    write_report,
)

if TYPE_CHECKING:
    from whichkl.distillation.job import JobFields
    from whichkl.progress import Tell


def distill(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="A file of arguments; options override it.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="FILE.py:NAME|DIR",
            help="A torch module, or a function that makes one; your own code: it is run. For language models a folder that "
            "save_pretrained or `distill capture` wrote, or text.",
        ),
    ] = None,
    student: Annotated[str | None, typer.Option("--student", metavar="FILE.py:NAME|DIR", help="The student, likewise.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE.py:FUNCTION|FILE",
            help="A function that returns (x, labels), x, a Dataset or a DataLoader. For language models a .jsonl with prompt "
            "and completion, or messages, or text, on every line; or a .txt with a text on every line.",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="FILE.py:FUNCTION|FILE",
            help="What is scored, likewise; by default a fifth of the data, of language models a tenth.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="By default forward_kl; reverse_kl, jeffreys:0.3, jensen_shannon, total_variation, …"),
    ] = None,
    hard_label_weight: Annotated[
        float | None, typer.Option("--hard-label-weight", help="Share of the labels' cross-entropy.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Divides both logits.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the examples; by default 40, of language models 3.")
    ] = None,
    out: Annotated[Path | None, out_option("Folder for report.html and the student's weights.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Fixes every random choice.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a student classifier or language model on its teacher, and report on unseen examples.

    With --out, the same command resumes. `whichkl distill capture` stores a teacher language model's laws first, so that students
    are trained without it; it has a --help of its own.
    """
    if out is not None:
        check_results_folder(out, "report.html")
    options: dict[str, Any] = {"teacher": teacher, "student": student, "data": data, "held_out": held_out}
    options |= {"objective": objective, "seed": seed}
    options |= {"hard_label_weight": hard_label_weight, "temperature": temperature, "epochs": epochs}
    given = {name: value for name, value in options.items() if value is not None}
    with locked_results(out, "distill"):
        with console.progress() as tell:
            exits.load_torch()
            from whichkl.distillation.job import JobFields, read_fields
            from whichkl.distillation.language.job import is_language_job

            fields = JobFields(given) if job is None else read_fields(job, given)
            run = _language_model if is_language_job(fields.values) else _classifier
            result = run(fields, out, tell)
        deliver(result, None if out is None else out / "student", "The student", lambda: console.show(result, as_json))
        if out is not None:
            write_report(result, out / "report.html", quiet=as_json)
            if result.journal is not None:
                result.journal.clear()


def _classifier(fields: JobFields, out: Path | None, tell: Tell) -> Any:
    from whichkl.distillation.classifier import distill as run_distill
    from whichkl.distillation.job import job as job_of
    from whichkl.distillation.result import DISTILLATION

    if out is not None:
        prepare_results(DISTILLATION, out / "student")
    arguments = job_of(fields)
    with fields.as_in_file(arguments):
        return run_distill(**arguments, journal=journal_of(out), tell=tell)


def _language_model(fields: JobFields, out: Path | None, tell: Tell) -> Any:
    from whichkl.distillation.language.distillation import language_model
    from whichkl.distillation.language.job import NAMES, language_job
    from whichkl.distillation.language.result import LANGUAGE_DISTILLATION

    if out is not None:
        prepare_results(LANGUAGE_DISTILLATION, out / "student")
    values = dict(fields.values)
    if "epochs" in values:  # an option of the command
        values["args"] = {**values.get("args", {}), "num_train_epochs": values.pop("epochs")}
    arguments = language_job(fields._replace(values=values))
    with fields.as_in_file(NAMES):
        return language_model(**arguments, journal=journal_of(out), tell=tell)
