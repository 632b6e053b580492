"""convert: what is known about a target in place of samples or a density → a file of weighted samples, which `fit` reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from whichkl._checks import InputError, cannot
from whichkl.commands import console, exits, options
from whichkl.commands.converted_file import check_output, write_converted
from whichkl.commands.observables import observables
from whichkl.commands.wording import of_file
from whichkl.files.writing import origin_file
from whichkl.printable import count_of

if TYPE_CHECKING:
    from whichkl.targets import Target

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="A new .csv or .parquet file for the samples; FILE.origin.json is next to it."),
]


def moments(
    frames: Annotated[Path, typer.Argument(metavar="FRAMES", help="Draws of the reference: a CSV, Parquet, Arrow or NPY file.")],
    of: Annotated[
        str,
        typer.Option(
            "--of",
            help="What the moments are of, separated by commas: products of powers of columns, such as 'x1, x1^2, x1*x2'; or "
            "FILE.py:FUNCTION, (n, d) → (n, k), your own code: it is run.",
        ),
    ],
    values: Annotated[str, typer.Option("--values", help="The values of the moments, separated by commas.")],
    stderr: Annotated[
        str | None, typer.Option("--stderr", help="Their standard errors, separated by commas; by default they are exact.")
    ] = None,
    out: Out = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    missing: options.Missing = "refuse",
    thousands: options.Thousands = None,
    as_json: options.AsJson = False,
) -> None:
    """Weight draws of a reference so that they have known moments, and stay as near to the reference as these allow."""
    options.check_exists(frames, may_be_named=False)
    check_output(out)
    with console.progress() as tell:
        exits.load_torch()
        from whichkl.conversions.convert import convert
        from whichkl.conversions.moments import Moments

        tell("reading the draws", float("nan"))
        reference = options.read_draws(frames, columns=columns, drop=drop, missing=missing, thousands=thousands)
        f, names = _observed(of, reference)
        errors = None if stderr is None else _numbers(stderr, "--stderr")
        m = _numbers(values, "--values")
        if names is not None and len(names) != len(m):
            because = f"`--of` names {count_of(len(names), 'observable')}, and `--values` has {count_of(len(m), 'number')}"
            raise InputError(cannot("use these moments", because, "Give one value per observable"))
        target = convert(Moments(of=f, values=m, stderr=errors, reference=reference, names=names))
    _deliver(target, out, as_json)


def labels(
    draws: Annotated[Path, typer.Argument(metavar="DRAWS", help="Draws of a model: a CSV, Parquet, Arrow or NPY file.")],
    passed: Annotated[str, typer.Option("--passed", metavar="COLUMN", help="The column that says which draws passed: 1 or 0.")],
    out: Out = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    missing: options.Missing = "refuse",
    thousands: options.Thousands = None,
    as_json: options.AsJson = False,
) -> None:
    """Keep the draws of a model that passed: they are samples of the target. In Python, `Labels(model=)` has its density too."""
    options.check_exists(draws, may_be_named=False)
    check_output(out)
    with console.progress() as tell:
        exits.load_torch()
        from whichkl.conversions.convert import convert
        from whichkl.conversions.labels import Labels
        from whichkl.targets import Target

        tell("reading the draws", float("nan"))
        with _numbers_in(passed):
            read = options.read_draws(draws, columns=columns, drop=drop, missing=missing, thousands=thousands)
        chosen = options.column_of(read, passed, "--passed")
        others = [name for name in read.names if name != passed]
        x = Target(samples=cast(Any, read.samples)[:, [read.names.index(name) for name in others]], names=others)
        x.weights, x.origin = read.weights, read.origin  # labels refuse weights
        target = convert(Labels(draws=x, passed=chosen))
    _deliver(target, out, as_json)


def comparisons(
    winners: Annotated[Path, typer.Argument(metavar="WINNERS", help="The likelier point of each pair: CSV, Parquet or NPY.")],
    losers: Annotated[Path, typer.Argument(metavar="LOSERS", help="The other point of each pair, row by row.")],
    noise: Annotated[float, typer.Option("--noise", help="Scale of the answers: the odds are (p(a)/p(b))^(1/noise).")] = 1.0,
    rows: Annotated[int, typer.Option("--rows", help="How many draws of the density that is found to write.")] = 10_000,
    out: Out = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Find the density that explains which of two points was said to be likelier, and draw from it."""
    for path in (winners, losers):
        options.check_exists(path, may_be_named=False)
    check_output(out)
    with console.progress() as tell:
        exits.load_torch()
        from whichkl.conversions.comparisons import Comparisons
        from whichkl.conversions.convert import convert
        from whichkl.fitting import fit
        from whichkl.targets import Target

        tell("reading the pairs", float("nan"))
        a, b = (options.read_draws(path, columns=columns, drop=drop) for path in (winners, losers))
        if a.names != b.names:
            because = f"`{winners}` has {', '.join(a.names)} and `{losers}` has {', '.join(b.names)}"
            raise InputError(cannot("compare these files", because, "Give both the same columns, in the same order"))
        if a.weights is not None or b.weights is not None:
            because = "a row is an answer, and the rows of one of them have weights"
            raise InputError(cannot("compare these files", because, "Give files of answers"))
        found = convert(Comparisons(winners=a, losers=b, noise=noise), seed=seed)
        tell("drawing from the density", float("nan"))
        x = fit(found, seed=seed).draws(rows, corrected=True, seed=seed) if found.sampler is None else found.draws(rows, seed)
        drawn = Target(samples=x, names=list(a.names))
        drawn.origin = found.origin
    _deliver(drawn, out, as_json)


def simulations(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parameters, and the data made of them.")],
    prior: Annotated[
        list[str],
        typer.Option("--prior", help="The law that a parameter was drawn from, such as 'rate=Gamma(2,1)'; once per parameter."),
    ],
    proposal: Annotated[
        list[str] | None,
        typer.Option(
            "--proposal",
            help="The law that a parameter was drawn from, where it isn't the prior: 'rate=Gamma(3,1)', once per parameter; or "
            "the column of the log densities with which the parameters were drawn.",
        ),
    ] = None,
    out: Out = None,
    columns: options.Columns = None,
    drop: options.Drop = None,
    missing: Annotated[
        str,
        typer.Option("--missing", metavar="refuse|drop", help="Refuse missing parameters, or leave out the rows that have one."),
    ] = "refuse",
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Check simulations against their prior, and write them as pairs, to which a posterior for any data is fitted.

    Rows with missing data are failed simulations: they are left out and counted.
    """
    options.check_exists(table, may_be_named=False)
    check_output(out)
    with console.progress() as tell:
        exits.load_torch()
        from whichkl.commands.simulation_table import read_simulations
        from whichkl.conversions.convert import convert
        from whichkl.conversions.simulations import Simulations

        laws, proposed = _laws(prior, "--prior"), _proposal(proposal)
        tell("reading the simulations", float("nan"))
        column = proposed if isinstance(proposed, str) else None
        read = read_simulations(table, laws, column, columns=columns, drop=drop, missing=missing)
        source: Any = proposed if column is None else read.log_densities
        made = Simulations(prior=laws, parameters=read.theta, data=read.data, proposal=source)
        made.data_names = read.data_names
        target = convert(made, seed=seed)
    _deliver(target, out, as_json)


def _laws(texts: list[str], option: str) -> dict[str, Any]:
    """Return the law of each parameter."""
    from whichkl.problems import named

    laws: dict[str, Any] = {}
    for text in texts:
        name, equals, law = (part.strip() for part in text.partition("="))
        because = "it doesn't name a parameter" if not (equals and name) else f"`{name}` appears twice" if name in laws else ""
        if because or not law:
            because = because or "it names no law"
            raise InputError(cannot(f"use `{option} '{text}'`", because, f"Write, say, `{option} 'rate=Gamma(2,1)'`, once each"))
        laws[name] = named(law.replace(" ", ""))
    return laws


def _proposal(texts: list[str] | None) -> dict[str, Any] | str | None:
    """Return the laws of a proposal, or the column of its log densities."""
    columns = [text.strip() for text in texts or () if "=" not in text and "(" not in text]
    if texts and columns:
        if len(texts) > 1:
            because = f"the log densities in the column `{columns[0]}` are those of all parameters together"
            raise InputError(cannot("use several `--proposal`", because, "Give that column alone, or a law per parameter"))
        return columns[0]
    return _laws(texts, "--proposal") if texts else None


def _observed(of: str, draws: Target) -> tuple[Any, list[str] | None]:
    """Return what the moments are of at the draws, with their names; or the user's function."""
    from whichkl.user_code import load_function, looks_like_code

    if looks_like_code(of):
        return load_function(of, f"--of {of}"), None
    texts = options.listed([of])
    if not texts or len(set(texts)) < len(texts):
        because = "it names nothing" if not texts else "an observable appears twice"
        raise InputError(cannot(f"use `--of {of}`", because, "Name each observable once, separated by commas"))
    return observables(texts, cast(Any, draws.samples).cpu().numpy(), draws.names), texts


@contextlib.contextmanager
def _numbers_in(passed: str) -> Iterator[None]:
    """Where the column that says which draws passed holds text, ask for numbers: without this column there are no labels."""
    from whichkl.samples import TableError

    try:
        yield
    except InputError as error:
        cause = error if isinstance(error, TableError) else error.__cause__
        named = [*cause.keywords.get("categories", ()), *cause.keywords.get("drop", ())] if isinstance(cause, TableError) else []
        if passed not in named:
            raise
        do, instead = f"use `--passed {passed}`", "Write 1 for draws that passed, and 0 for the others"
        raise InputError(cannot(do, "this column holds no numbers", instead)) from error


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(one) for one in text.split(",")]
    except ValueError as error:
        because = "it isn't numbers that are separated by commas"
        raise InputError(cannot(f"use `{option} {text}`", because, f"Write, say, `{option} 0.7,0.99`")) from error


def _deliver(target: Target, out: Path | None, as_json: bool) -> None:
    """Write the samples, and print the origin, what was written, and the next command."""
    origin: Any = target.origin
    said = {name: tuple(map(of_file, getattr(origin, name))) for name in ("assumed", "unknown", "left_out")}
    target.origin = origin = replace(origin, **said, trust=of_file(origin.trust))
    written = write_converted(target, out)
    rows = len(cast(Any, target.samples))
    if as_json:
        console.print_json({"origin": origin.to_dict(), "rows": rows, "out": None if out is None else str(out)})
        return
    console.say(str(target))
    if written is None or out is None:
        console.say("Nothing was written: pass `--out FILE` for the samples, which `whichkl fit` reads.")
        return
    console.say(f"Wrote {out}: {count_of(rows, 'row')} of {', '.join(written.columns)}; and {origin_file(out)}.")
    console.say(f"Next: {written.following}")


app = typer.Typer(
    help="Turn what is left of a target without samples and without a density into weighted samples.", no_args_is_help=True
)
COMMANDS = (comparisons, moments, labels, simulations)
"""The kinds of evidence that files can hold, each a subcommand."""
