"""fit: a model is fitted to samples, to a log density, or to both."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whichkl._checks import InputError, cannot
from whichkl.commands import console, exits, options, results_folder
from whichkl.commands.wording import typed_in_shell

if TYPE_CHECKING:
    from whichkl.fitting import Fit


def fit(
    samples: options.Samples = None,
    log_prob: options.LogProb = None,
    dim: options.Dim = None,
    support: options.Support = None,
    family: options.FamilyName = None,
    given: options.Given = None,
    weights: options.Weights = None,
    log_weights: options.LogWeights = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    missing: options.Missing = "refuse",
    thousands: options.Thousands = None,
    categories: options.Categories = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="forward_kl, reverse_kl, or between them jeffreys:0.3, jensen_shannon:0.5, renyi:0.5, …; by default what "
            "the access allows.",
        ),
    ] = None,
    out: Annotated[Path | None, options.out_option("Folder for report.html and the saved fit.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="'auto' or HOST:PORT of a Ray cluster whose machines read the samples; the same answer."),
    ] = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fit a model to samples, to a log density, or to both. With --out, the same command resumes an interrupted fit."""
    if samples is None and log_prob is None:
        because = "neither samples nor a log density are given"
        raise InputError(cannot("fit a model", because, "Name a file of samples, or pass `--log-prob FILE.py:FUNCTION --dim D`"))
    options.check_exists(samples)
    if out is not None:
        results_folder.check_results_folder(out, "report.html")
    with results_folder.locked_results(out, "fit"):
        with console.progress() as tell:
            exits.load_torch()
            from whichkl.fitting import fit as run_fit
            from whichkl.fitting.saved_fit import FIT

            if out is not None:
                results_folder.prepare_results(FIT, out / "fit")
            tell("opening the target", math.nan)
            reading = {"columns": columns, "drop": drop, "missing": missing, "thousands": thousands, "categories": categories}
            target = options.read_target(samples, log_prob, dim, support, given, weights, log_weights, **reading)
            chosen = options.read_family(family, target)
            tell(f"fitting {chosen.label}", math.nan)
            journal = results_folder.journal_of(out)
            result = run_fit(target, chosen, objective=objective, seed=seed, cluster=cluster, journal=journal, tell=tell)
            if result.diagnostics.left_out:
                if out is not None:  # so that an interruption from now on loses nothing
                    result.save(out / "fit")
                result = result.check(tell=tell)
        results_folder.deliver(result, None if out is None else out / "fit", "The fit", lambda: _show(result, as_json))
        if out is not None:
            results_folder.write_report(result, out / "report.html", quiet=as_json)
            if samples is not None and samples.exists() and not as_json:
                console.say(f"The strangest rows: {shlex.join(['whichkl', 'score', str(out), str(samples), '--top', '20'])}")


def _show(result: Fit, as_json: bool) -> None:
    from whichkl.families.named import name_in

    parameters = shown_parameters(result)
    if as_json:
        console.print_json(
            {**result.to_dict(), "trust": result.trust, "summary": result.summary().to_dict(), "parameters": parameters}
        )
        return
    console.say(typed_in_shell(str(result)))
    for name, values in parameters.items():
        console.say(f"  {name}: {console.shown(values)}")
    if other := name_in(" ".join(result.explanations)):
        console.say(f"The family to try: {shlex.join(['whichkl', *sys.argv[1:], '--family', other])}")


def shown_parameters(result: Fit) -> dict[str, Any]:
    """Return the best model's parameters in free coordinates; none of a network, whose thousands are in the saved fit."""
    from whichkl.families import NetworkFamily

    if isinstance(result.family, NetworkFamily):
        return {}
    best = result.diagnostics.optima[0].model
    return {name: value.tolist() for name, value in result.family.parameters(best).items()}
