"""Options: what several commands take, and how a target, a family or a side of an estimate is read from it."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whichkl._checks import InputError, cannot, quoted
from whichkl.commands.wording import in_options

if TYPE_CHECKING:
    from whichkl.families import Family
    from whichkl.samples import Table
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
    list[str] | None,
    typer.Option(
        "--support",
        help="Where the target has mass: real, positive, unit_interval, simplex, 'interval(a, b)'; or of one column, "
        "amount=positive; repeatable.",
    ),
]
Columns = Annotated[
    list[str] | None, typer.Option("--columns", metavar="COLUMNS", help="The columns that are used, separated by commas.")
]
Drop = Annotated[
    list[str] | None, typer.Option("--drop", metavar="COLUMNS", help="The columns that aren't used, separated by commas.")
]
Missing = Annotated[
    str, typer.Option("--missing", metavar="refuse|drop", help="Refuse missing cells, or leave out the rows that have one.")
]
Thousands = Annotated[
    str | None, typer.Option("--thousands", metavar="MARK", help="The character between thousands, such as ',' in 1,234.5.")
]
Categories = Annotated[
    list[str] | None,
    typer.Option("--categories", metavar="COLUMNS", help="The columns of labels, separated by commas; product models them."),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="COLUMN", help="The column of non-negative weights of the rows; it isn't modelled."),
]
LogWeights = Annotated[
    str | None,
    typer.Option("--log-weights", metavar="COLUMN", help="The column of log weights of the rows, up to one constant."),
]
Given = Annotated[
    str | None,
    typer.Option(
        "--given",
        metavar="COLUMNS",
        help="Names of the columns of x, separated by commas; the rest are y, and q(y|x) is fitted: supervised learning. A file "
        "that `convert simulations` wrote has its own.",
    ),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="By default gaussian, or product with --categories. Names: gaussian:diagonal, mixture:3, mixture:auto, student_t, "
        "flow, …; with --given linear_gaussian, generalized_linear:poisson, neural:categorical, …; a wrong name lists all.",
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


def check_exists(samples: Path | None, *, may_be_named: bool = True) -> None:
    """Refuse a path that doesn't exist, before torch is loaded; `read_target` tells distributions from paths.

    Args:
        samples: the path.
        may_be_named: whether a distribution such as ``Normal(0,1)`` is taken, too.

    Raises:
        InputError: there is nothing of this name.
    """
    is_named = may_be_named and "(" in str(samples) and not _SUFFIX.search(str(samples))
    if samples is not None and not os.path.exists(samples) and not is_named:
        raise InputError(cannot(f"read `{samples}`", "there is no such file or folder", "Correct the path"))


def read_target(
    samples: Path | None,
    log_prob: str | None,
    dim: int | None,
    support: Sequence[str] | None,
    given: str | None = None,
    weights: str | None = None,
    log_weights: str | None = None,
    **reading: Any,
) -> Target:
    """Make the target that the options describe.

    Args:
        samples: the file or folder.
        log_prob: FILE.py:FUNCTION.
        dim: the number of coordinates.
        support: one support, or texts such as ``"amount=positive"``.
        given: the columns of x.
        weights: the column of weights.
        log_weights: the column of log weights.
        reading: `columns`, `drop`, `missing`, `thousands` and `categories`.

    Raises:
        InputError: a file can't be read, or a function comes without `--dim`.
    """
    from whichkl.targets import Target
    from whichkl.user_code import load_function

    if samples is not None and not os.path.exists(samples):
        others = {"--log-prob": log_prob, "--dim": dim, "--support": support, "--given": given, "--weights": weights}
        others["--log-weights"] = log_weights
        return _distribution(samples, {**others, **{f"--{name}": value for name, value in reading.items()}})
    if log_prob is not None and samples is None and dim is None:
        raise InputError(cannot("use `--log-prob` alone", "a function doesn't say how many coordinates it takes", "Pass `--dim`"))
    function = None if log_prob is None else load_function(log_prob, f"--log-prob {log_prob}")
    x = None if given is None else listed([given])
    if samples is None and (weights or log_weights) is not None:
        do = f"use `--{'weights' if weights is not None else 'log-weights'}`"
        raise InputError(cannot(do, "there are no samples to weight", "Name a file of samples"))
    with typed_options(tuple(reading)):
        given_as = {"log_prob": function, "dim": dim, "support": _support(support), "given": x, "weights": weights}
        given_as["log_weights"] = log_weights
        return Target(samples=samples, **given_as, **as_keywords(reading))


def read_table(path: Path, **reading: Any) -> Table:
    """Read a file of samples into memory."""
    from whichkl.samples import Reading, read_samples

    with typed_options(tuple(reading)):
        return read_samples(path, Reading.of(**as_keywords(reading)))


def read_draws(path: Path, **reading: Any) -> Target:
    """Read a file of samples into memory, with the weights that its origin names."""
    from whichkl.targets import Target

    with typed_options(tuple(reading)):
        found = Target(samples=path, **as_keywords(reading))
    if found.context_names:
        because = f"its rows are pairs of the data {quoted(found.context_names)} and parameters, by its origin"
        raise InputError(cannot(f"read `{path}` as draws", because, f"Pass `--drop {_joined(found.context_names)}`"))
    if found.stream is None:
        return found
    table = read_table(path, **reading)
    whole = Target(samples=table.values, names=table.names)
    whole.origin = found.origin
    return whole


def column_of(draws: Target, name: str, option: str) -> Any:
    """Return the column of this name.

    Raises:
        InputError: there is none, or no other.
    """
    if name not in draws.names or draws.dim == 1 or draws.samples is None:
        because = f"there is no column `{name}`, but {quoted(draws.names)}" if name not in draws.names else "no column is left"
        raise InputError(cannot(f"use `{option} {name}`", because, "Name one of several columns"))
    return draws.samples[:, draws.names.index(name)]


def _distribution(samples: Path, others: dict[str, Any]) -> Target:
    """Make the target that a text such as ``Normal(0,1)`` names, which takes no other options of a target."""
    from whichkl.problems.named import named
    from whichkl.targets import Target

    text = str(samples)
    given = [name for name, value in others.items() if value not in (None, [], (), "refuse")]
    if given:
        because = "the distribution already has its density, its dimension and its support"
        raise InputError(cannot(f"use `{given[0]}` with `{text}`", because, f"Leave `{given[0]}` out"))
    return Target.of(named(text))


def as_keywords(reading: dict[str, Any]) -> dict[str, Any]:
    """Return the options of reading a table as the arguments of `Target`."""
    several = {name: listed(value) for name, value in reading.items() if isinstance(value, (list, tuple))}
    return {name: value for name, value in {**reading, **several}.items() if value is not None}


def listed(texts: Sequence[str]) -> list[str]:
    """Return the names in texts that separate them by commas; a name with a comma is in double quotes."""
    return [name.strip() for row in csv.reader(texts, skipinitialspace=True) for name in row if name.strip()]


@contextlib.contextmanager
def typed_options(able: Sequence[str]) -> Iterator[None]:
    """In errors about cells of a table, write the command that reads it.

    Args:
        able: the names of the options that the command has.
    """
    from whichkl.samples import TableError

    try:
        yield
    except TableError as error:
        keywords = dict(error.keywords)
        if "categories" not in able and "categories" in keywords:
            keywords["drop"] = [*keywords.pop("categories"), *keywords.get("drop", [])]
        if not keywords or not set(keywords) <= set(able):
            raise
        options = [part for name, value in keywords.items() for part in (f"--{name}", _joined(value))]
        command = shlex.join(["whichkl", *sys.argv[1:], *options])
        otherwise = f", or {error.otherwise}" if error.otherwise else ""
        raise InputError(f"{cannot(error.do, error.because, 'Run')[:-1]} `{command}`{otherwise}.") from error


def _joined(value: Any) -> str:
    if isinstance(value, str):
        return value
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(value)
    return line.getvalue()


def _support(texts: Sequence[str] | None) -> Any:
    """Read one support, or the supports of some columns."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    pairs = [text.rpartition("=") for text in texts]
    if not all(name for name, _, _ in pairs):
        because = "it is given for all columns and for one of them"
        raise InputError(cannot("use this `--support`", because, "Write one support, or COLUMN=SUPPORT each time"))
    return {name.strip(): support.strip() for name, _, support in pairs}


def read_family(text: str | None, target: Target) -> Family:
    """Return the family of a name such as ``mixture:3``; by default that of the target."""
    from whichkl.advice import default_family
    from whichkl.families.named import family_named

    return default_family(target) if text is None else family_named(text)


def read_side(name: str, text: str, form: str, chains: int | None, weights: str | None, **reading: Any) -> Any:
    """Read p or q, the `name`: a distribution such as ``Normal(0,1)``, or a file of samples, weighted or Markov chains.

    Raises:
        InputError: it can't be read, or it isn't a file of samples and has chains or weights.
    """
    from whichkl.problems.named import looks_named, named
    from whichkl.targets import Target

    if chains is not None and (looks_named(text) or form != "samples"):
        raise InputError(cannot(f"read `{text}` as chains", "it isn't a file of samples", "Leave the count of chains out"))
    if weights is not None and (looks_named(text) or form != "samples"):
        raise InputError(cannot(f"weight `{text}`", "it isn't a file of samples", "Leave the column of weights out"))
    if looks_named(text):
        return named(text)
    if form != "samples":
        return read_table(Path(text), **reading).values
    with typed_options(tuple(reading)), in_options({"weights": f"--{name}-weights", "chains": f"--{name}-chains"}):
        return Target(samples=Path(text), chains=chains, weights=weights, **as_keywords(reading))
