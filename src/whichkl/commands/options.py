"""Options: what several commands take, and how a target, a family or a side of an estimate is read from it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whichkl._checks import InputError, cannot

if TYPE_CHECKING:
    from whichkl.families import Family
    from whichkl.targets import Target

Samples = Annotated[
    Path | None,
    typer.Argument(
        metavar="SAMPLES",
        help="Samples of the target: a CSV, Parquet, Arrow or NPY file, or a folder of them, one row per draw; or a distribution "
        "such as '0.7*Normal(-3,1) + 0.3*Normal(3,1)'.",
    ),
]
LogProb = Annotated[
    str | None,
    typer.Option(
        "--log-prob",
        metavar="FILE.py:FUNCTION",
        help="A function (n, d) → (n,): the log density, up to a constant. Your own code: it is run.",
    ),
]
Dim = Annotated[int | None, typer.Option("--dim", help="Number of coordinates; needed without samples.")]
Support = Annotated[
    str | None,
    typer.Option("--support", help="Where the target has mass: real, positive, unit_interval, simplex, 'interval(a, b)'."),
]
FamilyName = Annotated[
    str,
    typer.Option(
        "--family",
        help="gaussian, gaussian:diagonal, mixture:3, mixture:auto, student_t, product, flow, …; with --given linear_gaussian, "
        "generalized_linear:poisson, mixture_density_network, neural:categorical, …; a wrong name lists all.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option("--seed", help="Fixes every random choice.")]

_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")
"""The end of a file's name, which no distribution has."""


def out_option(text: str) -> Any:
    """Return the option `--out`, which refuses an empty name, such as that of a variable that the shell doesn't know."""
    return typer.Option("--out", help=text, parser=_folder, metavar="FOLDER")


def _folder(text: str) -> Path:
    if not str(text).strip():
        raise typer.BadParameter("the name is empty.")
    return Path(text)


def check_exists(samples: Path | None) -> None:
    """Refuse a path that doesn't exist, before torch is loaded; `read_target` tells distributions from paths.

    Raises:
        InputError: there is nothing of this name.
    """
    if samples is not None and not os.path.exists(samples) and ("(" not in str(samples) or _SUFFIX.search(str(samples))):
        raise InputError(cannot(f"read `{samples}`", "there is no such file or folder", "Correct the path"))


def read_target(
    samples: Path | None, log_prob: str | None, dim: int | None, support: str | None, given: str | None = None
) -> Target:
    """Make the target that the options describe.

    Raises:
        InputError: a file can't be read, or a function comes without `--dim`.
    """
    from whichkl.targets import Target
    from whichkl.user_code import load_function

    if samples is not None and not os.path.exists(samples):
        return _distribution(samples, {"--log-prob": log_prob, "--dim": dim, "--support": support, "--given": given})
    if log_prob is not None and samples is None and dim is None:
        raise InputError(cannot("use `--log-prob` alone", "a function doesn't say how many coordinates it takes", "Pass `--dim`"))
    function = None if log_prob is None else load_function(log_prob, f"--log-prob {log_prob}")
    columns = None if given is None else [name.strip() for name in given.split(",") if name.strip()]
    return Target(samples=samples, log_prob=function, dim=dim, support=support, given=columns)


def _distribution(samples: Path, others: dict[str, Any]) -> Target:
    """Make the target that a text such as ``Normal(0,1)`` names, which takes no other options of a target."""
    from whichkl.problems.named import named
    from whichkl.targets import Target

    text = str(samples)
    given = [name for name, value in others.items() if value is not None]
    if given:
        because = "the distribution already has its density, its dimension and its support"
        raise InputError(cannot(f"use `{given[0]}` with `{text}`", because, f"Leave `{given[0]}` out"))
    return Target.of(named(text))


def read_family(text: str) -> Family:
    """Return the family of a name such as ``mixture:3``."""
    from whichkl.families.named import family_named

    return family_named(text)


def read_side(text: str, form: str, chains: int | None) -> Any:
    """Read one side of an estimate: a distribution such as ``Normal(0,1)``, or a file of samples, possibly Markov chains.

    Raises:
        InputError: it can't be read, or it isn't a file of samples and has chains.
    """
    from whichkl.problems.named import looks_named, named
    from whichkl.samples import read_samples
    from whichkl.targets import Target

    if chains is not None and (looks_named(text) or form != "samples"):
        raise InputError(cannot(f"read `{text}` as chains", "it isn't a file of samples", "Leave the count of chains out"))
    if looks_named(text):
        return named(text)
    table = read_samples(Path(text))
    return Target(samples=table.values, names=table.names, chains=chains) if form == "samples" else table.values
