"""score: new rows are scored by a saved fit, and the strangest are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whichkl._checks import InputError, cannot
from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, Seed, check_exists, typed_options
from whichkl.files.writing import refuse_existing
from whichkl.printable import count_of

if TYPE_CHECKING:
    from whichkl.fitting import Fit
    from whichkl.fitting.scores import ScoredRow

_SUFFIXES = (".csv", ".parquet", ".json")


def score(
    fit: Annotated[Path, typer.Argument(metavar="FIT", help="A saved fit, or the --out folder of `whichkl fit`.")],
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="The rows: a file or a folder, with the fit's columns by their names.")
    ],
    top: Annotated[
        int, typer.Option("--top", min=0, help="How many of the strangest rows are shown, with what drives them.")
    ] = 20,
    missing: Annotated[
        str | None,
        typer.Option("--missing", metavar="refuse|drop", help="Missing cells: by default as in the fit; drop leaves rows out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A new .csv, .parquet or .json file for the scores of all rows.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score rows by a saved fit: the log density of each, its rank among the model's draws, and what drives the strangest."""
    check_exists(samples, may_be_named=False)
    if out is not None:
        if out.suffix.lower() not in _SUFFIXES:
            because = f"its suffix is `{out.suffix}`"
            raise InputError(cannot(f"write scores to `{out}`", because, f"Use one of {', '.join(_SUFFIXES)}"))
        refuse_existing(out)
    with console.progress() as tell, typed_options(("missing",)):
        exits.load_torch()
        from whichkl.fitting import Fit
        from whichkl.fitting.scored_files import scores_written
        from whichkl.fitting.scoring import score_blocks

        loaded = Fit.load(fit)
        with scores_written(out) as take:
            result = score_blocks(loaded, samples, take, top=top, seed=seed, missing=missing, tell=tell)
    if as_json:
        console.print_json({"fit": str(fit), "samples": str(samples), **result.to_dict()})
        return
    _show(loaded, result.rows, f"The {len(result.rows)} strangest of {count_of(result.count, 'row')}")
    for line in result.sentences:
        console.say(line)
    if out is not None:
        console.say(f"Scores: {out}")


def _show(fit: Fit, rows: tuple[ScoredRow, ...], title: str) -> None:
    if not rows:
        return
    what = "log q(y|x)" if fit.context_names else "log q(x)"
    cells: list[Any] = [(one.place, f"{one.log_density:.4g}", f"{one.rank:.4g}", one.driven_by) for one in rows]
    console.table(title, ("where", f"{what} (nats)", "rank", "driven by (nats it would gain)"), cells)
