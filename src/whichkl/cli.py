"""The command line. Torch is imported inside the commands, so that --help is instant."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from whichkl import __version__, console, exits
from whichkl._checks import InputError, ResourceError, TargetError, WhichklError, cannot, require
from whichkl._files import check_writable
from whichkl._locks import locked
from whichkl.printable import one_line
from whichkl.results_folder import check_results_folder, deliver, write_report

if TYPE_CHECKING:
    from whichkl.families import Family
    from whichkl.targets import Target


class _Command(TyperCommand):
    """A command, whose results are kept apart from what the user's code prints, and which that code can't end."""

    def invoke(self, ctx: Any) -> Any:
        """Run it; errors that typer has other plans for get our words."""
        from whichkl.user_code import said_of

        try:
            with console.results_apart():
                return super().invoke(ctx)
        except (SystemExit, GeneratorExit, EOFError) as error:
            raise InputError(cannot("go on", f"of your own code {said_of(error)}", "Leave that out of it")) from error
        except OSError as error:
            raise ResourceError(exits.described(error)) from error


class _Group(TyperGroup):
    """The commands; what a usage error repeats of the command line is made printable."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the options before the command."""
        with _printable_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Parse the command's own options, and run it."""
        with _printable_usage():
            return super().invoke(ctx)


class _App(typer.Typer):
    """An app whose commands are of the class above."""

    def command(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        """Register a command."""
        return super().command(*args, **{"cls": _Command, **kwargs})


app = _App(
    name="whichkl",
    cls=_Group,
    help="Forward or reverse KL? Say what you can do with your target; see which is possible, fit it, see if it worked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_LINES = ("metrics.jsonl", "times.jsonl")
_REVERSED = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}

Samples = Annotated[
    Path | None,
    typer.Argument(help="Samples of the target: a CSV, Parquet, Arrow or NPY file, or a folder of them, one row a draw."),
]
LogProb = Annotated[
    str | None,
    typer.Option(
        "--log-prob",
        metavar="FILE.py:FUNCTION",
        help="A function (n, d) → (n,): the log density, up to a constant. Your own code: it is run.",
    ),
]
Dim = Annotated[int | None, typer.Option("--dim", help="Number of coordinates, where there are no samples to tell.")]
Support = Annotated[
    str | None,
    typer.Option("--support", help="Where the target has mass: real, positive, unit_interval, simplex, 'interval(a, b)'."),
]
FamilyName = Annotated[
    str,
    typer.Option(
        "--family",
        help="gaussian, gaussian:diagonal, mixture:3, mixture:auto, student_t, product, flow, …; with --given linear_gaussian, "
        "generalized_linear:poisson, mixture_density_network, neural:categorical, …; a wrong one lists all.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option("--seed", help="Fixes every random choice.")]


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    context.obj = debug
    if version:
        console.say(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and report.json.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Answer the question on five inputs, with a report to open in a browser."""
    check_writable(out)
    check_results_folder(out, "report.html", "report.json")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.ERR, disable=as_json or not console.ERR.is_terminal) as progress:
        bar = progress.add_task("loading torch", total=None)
        from whichkl.demo import STEPS, run_demo, write_demo
        from whichkl.threads import one_thread

        progress.update(bar, total=len(STEPS))
        with one_thread():  # its operations are small: more threads only wait for each other
            result = run_demo(lambda step: progress.update(bar, completed=step, description=STEPS[step]))
        progress.update(bar, completed=len(STEPS), description="done")
    if as_json:
        console.print_json(result.to_dict())
    else:
        _show_demo(result)
    page, _ = write_demo(result, out)
    if not as_json:
        console.say(f"Report: {page}")


def _show_demo(result: Any) -> None:
    console.table(
        "Forward or reverse KL?",
        ("with p you can …", "minimise", "measured on unseen draws (nats)", "found"),
        [
            (
                "sample",
                "forward KL",
                f"held-out −log q {result.petals.fit.value.number}",
                console.found(result.petals.fit.findings),
            ),
            (
                "evaluate up to a constant",
                "reverse KL",
                f"ELBO {getattr(result.schools.fit.diagnostics.elbo, 'number', '')}",
                console.found(result.schools.fit.findings),
            ),
            *(
                (
                    "both",
                    one.fit.objective.name.replace("_kl", " KL"),
                    f"KL(p‖q) {one.forward.number}, KL(q‖p) {one.reverse.number}",
                    console.found(one.fit.findings),
                )
                for one in result.both
            ),
            ("neither", "none yet", "—", f"{len(result.neither.conversions)} ways to convert what is left"),
        ],
    )


@app.command()
def advise(
    samples: Samples = None,
    log_prob: LogProb = None,
    dim: Dim = None,
    support: Support = None,
    access: Annotated[
        str | None,
        typer.Option(
            "--access", help="Instead of a target, what you can do with it: 'samples', 'sampler,log_prob', … or 'nothing'."
        ),
    ] = None,
    family: FamilyName = "gaussian",
    as_json: AsJson = False,
) -> None:
    """Say which direction is possible for a target, and why."""
    from whichkl.access import Access
    from whichkl.advice import advise as ask

    if access is not None and (samples or log_prob):
        raise InputError(cannot("use `--access` here", "a target is given, and it speaks for itself", "Drop one of them"))
    target = _target(samples, log_prob, dim, support) if access is None else Access.parse(access)
    advice = ask(target, _family(family))
    if as_json:
        console.print_json(advice.to_dict())
    else:
        console.say(str(advice))


@app.command()
def fit(
    samples: Samples = None,
    log_prob: LogProb = None,
    dim: Dim = None,
    support: Support = None,
    family: FamilyName = "gaussian",
    given: Annotated[
        str | None,
        typer.Option(
            "--given",
            metavar="COLUMNS",
            help="Names of the columns that are x, divided by commas; the rest are y, and q(y|x) is fitted: supervised learning.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="forward_kl, reverse_kl, or between them jeffreys:0.3, jensen_shannon:0.5, renyi:0.5, …; unless said, what the "
            "access allows.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and the saved fit.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="'auto' or HOST:PORT of a Ray cluster whose machines read the samples; the same answer."),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a model to samples, to a log density, or to both. Killed, the same command with the same --out goes on."""
    if out is not None:
        check_writable(out)
        check_results_folder(out, "report.html")
    with _locked(out, "fit"):
        with console.progress() as tell:
            from whichkl.fit_file import FIT
            from whichkl.fitting import fit as run_fit

            if out is not None:
                FIT.refuse_other(out / "fit")
            tell("opening the target", math.nan)
            target, chosen = _target(samples, log_prob, dim, support, given), _family(family)
            tell(f"fitting {chosen.label}", math.nan)
            journal = _journal(out)
            result = run_fit(target, chosen, objective=objective, seed=seed, cluster=cluster, journal=journal, tell=tell)

        def show() -> None:
            if as_json:
                console.print_json({**result.to_dict(), "parameters": _parameters(result)})
                return
            console.say(str(result))
            for name, values in _parameters(result).items():
                console.say(f"  {name}: {console.shown(values)}")

        place = None if out is None else out / "fit"
        deliver(None if place is None else lambda: result.save(place), f"The fit is saved in `{place}`", show)
        if out is not None:
            write_report(result, out / "report.html", quiet=as_json)


@app.command()
def estimate(
    p: Annotated[
        str,
        typer.Option(
            "--p",
            help="The target: a sample file, or a distribution such as 'Normal(0,1)', 'Categorical(.3,.7)' or "
            "'0.5*Normal(-3,1) + 0.5*Normal(3,1)'; a wrong name lists all.",
        ),
    ],
    q: Annotated[str, typer.Option("--q", help="The model: the same.")],
    divergence: Annotated[
        str, typer.Option("--divergence", help="forward_kl, reverse_kl, jeffreys, jensen_shannon, total_variation, energy, …")
    ] = "forward_kl",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Instead of the one that the access decides: closed_form, quadrature, monte_carlo, knn, classifier, …",
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--form", help="What files hold: samples, or probabilities or logits, a row each.")
    ] = "samples",
    p_chains: Annotated[
        int | None, typer.Option("--p-chains", help="The samples of p are this many Markov chains, one after another.")
    ] = None,
    q_chains: Annotated[int | None, typer.Option("--q-chains", help="The same of q.")] = None,
    weight: Annotated[float | None, typer.Option("--weight", help="Of the mixture in Jensen–Shannon and in skew KLs.")] = None,
    weight_on_forward: Annotated[float | None, typer.Option("--weight-on-forward", help="Of KL(p‖q) in jeffreys.")] = None,
    order: Annotated[float | None, typer.Option("--order", help="Of Rényi's divergence.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Estimate a divergence between two distributions or samples, both directions side by side, and say how far to trust it."""
    with console.ERR.status("loading torch", spinner="line"):
        from whichkl.divergences.dispatch import estimate as run_estimate

        first, second = _side(p, form, p_chains), _side(q, form, q_chains)
        knobs: dict[str, Any] = {
            "weight": weight,
            "weight_on_forward": weight_on_forward,
            "order": order,
            "seed": seed,
            "form": form,
            "method": method,
        }
        asked = run_estimate(p=first, q=second, divergence=divergence, **knobs)
        other: Any = None
        if divergence in _REVERSED:
            try:
                other = run_estimate(p=first, q=second, divergence=_REVERSED[divergence], **knobs)
            except WhichklError as error:
                other = str(error)
    if as_json:
        back = {"error": other} if isinstance(other, str) else None if other is None else _fields(other)
        console.print_json({"p": p, "q": q, **_fields(asked), "other_direction": back})
        return
    results = [one for one in (asked, other) if hasattr(one, "to_dict")]
    console.table(
        f"p = {p}, q = {q}",
        ("divergence", "value", "95 % interval", "method", "trust"),
        [
            (
                one.quantity,
                f"{one.number}{'' if one.unit == 'none' else ' ' + one.unit}{one.constant}",
                "exact" if one.exact else f"{one.interval[0]:.4g} … {one.interval[1]:.4g}",
                one.method,
                "yes" if one.reliable else "no",
            )
            for one in results
        ],
    )
    for one in results:
        console.say(f"{one.sentence}")
        for note in one.notes:
            console.say(f"  · {note}")
    if isinstance(other, str):
        console.say(f"The other direction: {other}")


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="What is compared: target, families, objectives, seeds, …")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the cells and tables; unless said, STUDY.out beside the file.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="So many processes of this machine (needs Ray).")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="'auto' or HOST:PORT of a Ray cluster.")] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Drop the worse half of the arms after two seeds, and again after four.")
    ] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute cells anew that failed or are corrupt.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare families and objectives by an experiment. Killed, the same command goes on and reruns nothing."""
    folder = study.parent / f"{study.stem}.out" if out is None else out
    check_writable(folder)
    check_results_folder(folder, "report.html", "report.md", "study.json", "table.csv", "table.parquet", *_LINES)
    with console.ERR.status("loading torch", spinner="line"):
        for module in ("pydantic", "yaml"):
            require(module, "app")
        from whichkl.study.comparing import run
        from whichkl.study.config import read_plan
        from whichkl.study.live import LiveTable

        plan = read_plan(study)
    with LiveTable(console.ERR) as live:
        result = run(plan, folder, cluster, workers, pilot=pilot, recompute=recompute, tell=live.tell)
    page, failed = folder / "report.html", result.failed
    if as_json:
        arms = {"dropped": [{"arm": arm, "seeds": count} for arm, count in result.dropped]}
        counts = {"cells": len(result.cells), "failed": len(failed)}
        console.print_json(
            {
                "folder": str(folder),
                "report": str(page),
                **counts,
                **arms,
                "verdict": result.verdict.to_dict(),
                "rows": result.rows,
            }
        )
    else:
        console.say(result.verdict.sentence)
        console.say(str(result))
        for cell in failed[:5]:
            said = f"failed: {cell.row['family']} · {cell.row['objective']}, seed {cell.row['seed']}: {cell.row['error']}"
            console.say(said)
        console.say(f"Table: {folder / 'table.csv'}")
    exits.KEPT.saved.append(f"The cells and tables are saved in `{folder}`")
    write_report(result, page, quiet=as_json)
    if len(failed) == len(result.cells):
        because = f"all {len(failed)} cells failed, the first one so: {str(failed[0].row['error']).rstrip('.')}"
        raise TargetError(cannot("compare anything", because, "Correct what it names; `cell.json` of a cell says more"))


@app.command()
def distill(
    job: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The arguments in a file; options come on top.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="FILE.py:NAME", help="A torch module, or a function that makes one. Your own code: it is run."
        ),
    ] = None,
    student: Annotated[str | None, typer.Option("--student", metavar="FILE.py:NAME", help="The same.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE.py:FUNCTION", help="A function that returns (x, labels), x, a Dataset or a DataLoader."
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out", metavar="FILE.py:FUNCTION", help="The same, of what is scored; a fifth of the data unless said."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="forward_kl unless said, reverse_kl, jeffreys:0.3, jensen_shannon, total_variation, …"),
    ] = None,
    hard_label_weight: Annotated[
        float | None, typer.Option("--hard-label-weight", help="Share of the labels' cross-entropy.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Divides both logits.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the examples, 40 unless said.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and the student's weights.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Fixes every random choice.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a student classifier on its teacher, and report on unseen examples. Killed, the same command with --out goes on."""
    if out is not None:
        check_writable(out)
        check_results_folder(out, "report.html")
    with _locked(out, "distill"):
        with console.progress() as tell:
            from whichkl.distillation.classifier import distill as run_distill
            from whichkl.distillation.job import job as job_of
            from whichkl.distillation.job import read_job
            from whichkl.distillation.result import DISTILLATION

            if out is not None:
                DISTILLATION.refuse_other(out / "student")
            said: dict[str, Any] = {
                "teacher": teacher,
                "student": student,
                "data": data,
                "held_out": held_out,
                "objective": objective,
                "seed": seed,
            }
            said |= {"hard_label_weight": hard_label_weight, "temperature": temperature, "epochs": epochs}
            given = {name: value for name, value in said.items() if value is not None}
            arguments = job_of(given) if job is None else read_job(job, given)
            result = run_distill(**arguments, journal=_journal(out), tell=tell)
        place = None if out is None else out / "student"
        deliver(
            None if place is None else lambda: result.save(place),
            f"The student is saved in `{place}`",
            lambda: console.print_json(result.to_dict()) if as_json else console.say(str(result)),
        )
        if out is not None:
            write_report(result, out / "report.html", quiet=as_json)
            if result.journal is not None:
                result.journal.clear()


@app.command()
def audit(
    loss: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:LOSS",
            help="A distillation loss, loss(*, teacher, student, mask=None) of logits unless --adapter says another. It is run.",
        ),
    ],
    adapter: Annotated[
        str,
        typer.Option(
            "--adapter",
            help="How it's called: keywords, student_teacher, labels, named_labels, log_probs, heads, …; a wrong one lists all.",
        ),
    ] = "keywords",
    knob: Annotated[
        list[str] | None,
        typer.Option("--knob", metavar="NAME=LOW:HIGH", help="An argument to sweep between its ends; repeatable."),
    ] = None,
    claims: Annotated[str | None, typer.Option("--claims", help="What it's said to be: forward_kl, reverse_kl, …")] = None,
    shift: Annotated[
        int | None, typer.Option("--shift", min=0, max=1, help="How far before its label a token's logits should lie.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Examine a distillation loss by calling it: which divergence, with which faults. Exit code 1: not passed."""
    with console.ERR.status("auditing", spinner="line"):
        from whichkl.distillation.audit import audit as run_audit
        from whichkl.distillation.audit.adapters import as_knobs
        from whichkl.user_code import load_function

        knobs = {name: ends for text in knob or () for name, ends in as_knobs(text).items()}
        function = load_function(loss, loss)
        result = run_audit(function, adapter=adapter, knobs=knobs, claims=claims, shift=shift, seed=seed)
    if as_json:
        console.print_json(result.to_dict())
    else:
        console.say(str(result))
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A saved fit, distillation or study, or a command's --out.")],
    as_json: AsJson = False,
) -> None:
    """Check that saved results are whole: every checksum, field and table. Exit code 5: something is damaged."""
    with console.ERR.status("loading torch", spinner="dots"):
        from whichkl.verifying import verify as run_verify

        found = run_verify(folder)
    if as_json:
        console.print_json({"folder": str(folder), "whole": True, "results": [one.to_dict() for one in found]})
        return
    for one in found:
        console.say(str(one))


def _fields(one: Any) -> dict[str, Any]:
    """An estimate as JSON holds it, with its interval and its sentence."""
    return {**one.to_dict(), "interval": list(one.interval), "sentence": one.sentence}


def invoke() -> None:
    """Run the command that the process's arguments name."""
    app(args=[argument for argument in sys.argv[1:] if argument != "--debug"])


def run() -> None:
    """Run it as the whole process: see `exits.run` for how it ends."""
    exits.run(invoke)


@contextlib.contextmanager
def _printable_usage() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "message"):
            error.message = one_line(str(error.message))
        raise


def _target(samples: Path | None, log_prob: str | None, dim: int | None, support: str | None, given: str | None = None) -> Target:
    from whichkl.targets import Target
    from whichkl.user_code import load_function

    if log_prob is not None and samples is None and dim is None:
        raise InputError(cannot("use `--log-prob` alone", "a function doesn't say how many coordinates it takes", "Pass `--dim`"))
    function = None if log_prob is None else load_function(log_prob, f"--log-prob {log_prob}")
    columns = None if given is None else [name.strip() for name in given.split(",") if name.strip()]
    return Target(samples=samples, log_prob=function, dim=dim, support=support, given=columns)


def _side(text: str, form: str, chains: int | None) -> Any:
    """Read a distribution by the closed grammar, or a file, perhaps of chains."""
    from whichkl.problems.named import looks_named, named
    from whichkl.samples import read_samples
    from whichkl.targets import Target

    if chains is not None and (looks_named(text) or form != "samples"):
        raise InputError(cannot(f"read `{text}` as chains", "it isn't a file of samples", "Leave the count of chains out"))
    if looks_named(text):
        return named(text)
    table = read_samples(Path(text))
    return Target(samples=table.values, names=table.names, chains=chains) if form == "samples" else table.values


def _family(text: str) -> Family:
    from whichkl.families.named import family_named

    return family_named(text)


def _locked(out: Path | None, do: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of an output folder, where there is one."""
    return contextlib.nullcontext() if out is None else locked(out, f"{do} into `{out}`")


def _journal(out: Path | None) -> Path | None:
    """Where training writes down how far it is; says where something lies there already."""
    if out is None:
        return None
    journal = out / ".journal"
    if next(journal.glob("*/*.safetensors"), None) is not None:
        console.note(f"An interrupted run left its state in {out}: the same run resumes from there.")
    return journal


def _parameters(result: Any) -> dict[str, Any]:
    """The best model's parameters in free coordinates; of a network nothing, they are in the saved fit."""
    if result.solver == "stochastic":
        return {}
    best = result.diagnostics.optima[0].model
    return {name: value.tolist() for name, value in result.family.parameters(best).items()}
