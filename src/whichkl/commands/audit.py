"""audit: a distillation loss is examined by calling it."""

from __future__ import annotations

from typing import Annotated

import typer

from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, Seed


def audit(
    loss: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:LOSS",
            help="A distillation loss: a function, a module or its class. Its arguments' names tell how it's called. It is run.",
        ),
    ],
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="NAME|FILE.py:ADAPTER",
            help="How it's called: rows, student_teacher, labels, log_probs, heads, … (a wrong one lists all), or a function "
            "f(loss, *, teacher, student, mask, labels) that calls it; without mask or labels if it needs none.",
        ),
    ] = None,
    knob: Annotated[
        list[str] | None,
        typer.Option("--knob", metavar="NAME=LOW:HIGH", help="An argument to sweep between its ends; repeatable."),
    ] = None,
    claims: Annotated[str | None, typer.Option("--claims", help="What it claims to be: forward_kl, reverse_kl, …")] = None,
    shift: Annotated[
        int | None, typer.Option("--shift", min=0, max=1, help="By how many tokens logits precede their label.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Call a distillation loss to find which divergence it is, and its faults. Exit code 1: something is wrong."""
    with console.ERR.status("auditing", spinner="line"):
        exits.load_torch()
        from whichkl.distillation.audit import audit as run_audit
        from whichkl.distillation.audit.adapters import as_knobs
        from whichkl.user_code import load_function, looks_like_code

        knobs = {name: ends for text in knob or () for name, ends in as_knobs(text).items()}
        function = load_function(loss, loss)
        way = load_function(adapter, f"--adapter {adapter}") if adapter and looks_like_code(adapter) else adapter
        result = run_audit(function, adapter=way, knobs=knobs, claims=claims, shift=shift, seed=seed)
    console.show(result, as_json)
    if not result.passed:
        raise typer.Exit(1)
