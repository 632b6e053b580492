"""advise: which direction is possible for a target."""

from __future__ import annotations

from typing import Annotated

import typer

from whichkl._checks import InputError, cannot
from whichkl.commands import console, exits, options


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
    family: options.FamilyName = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    missing: options.Missing = "refuse",
    thousands: options.Thousands = None,
    categories: options.Categories = None,
    as_json: options.AsJson = False,
) -> None:
    """Say which direction is possible for a target, and why."""
    options.check_exists(samples)
    exits.load_torch()
    from whichkl.access import Access
    from whichkl.advice import advise as ask

    if access is not None and (samples or log_prob):
        raise InputError(cannot("use `--access` here", "a target is given, which has its own access", "Drop one of them"))
    reading = {"columns": columns, "drop": drop, "missing": missing, "thousands": thousands, "categories": categories}
    target = options.read_target(samples, log_prob, dim, support, None, **reading) if access is None else Access.parse(access)
    console.show(ask(target, family), as_json)
