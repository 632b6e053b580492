"""compare: families and objectives are compared by an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whichkl._checks import TargetError, cannot, require
from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, out_option
from whichkl.commands.results_folder import check_results_folder, write_report

if TYPE_CHECKING:
    from whichkl.study.result import Study

_MAX_FAILURES_SHOWN = 5
_FILES = ("report.html", "report.md", "study.json", "table.csv", "table.parquet", "metrics.jsonl", "times.jsonl")


def compare(
    study: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY.yaml", help="What is compared: target, families, objectives, …; or teacher, student, data, …"
        ),
    ],
    out: Annotated[Path | None, out_option("Folder for the cells and tables; by default STUDY.out next to the file.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Number of processes on this machine (needs Ray).")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="'auto' or HOST:PORT of a Ray cluster.")] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Drop the worse half of the arms after two seeds, and again after four.")
    ] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Compute failed and damaged cells again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare families, or students, and objectives by an experiment. The same command resumes an interrupted study."""
    folder = study.parent / f"{study.stem}.out" if out is None else out
    check_results_folder(folder, *_FILES)
    with console.ERR.status("loading torch", spinner="line"):
        exits.load_torch()
        for module in ("pydantic", "yaml"):
            require(module, "app")
        from whichkl.study.comparing import run
        from whichkl.study.config import read_plan
        from whichkl.study.live import LiveTable

        plan = read_plan(study)
    with LiveTable(console.ERR) as live:
        result = run(plan, folder, cluster, workers, pilot=pilot, recompute=recompute, tell=live.tell)
    failed = result.failed
    _show(result, folder, as_json)
    exits.KEPT.saved.append(f"The cells and tables are saved in `{folder}`")
    write_report(result, folder / "report.html", quiet=as_json)
    if len(failed) == len(result.cells):
        first = str(failed[0].row["error"]).rstrip(".")
        because = f"all {len(failed)} cells failed; the first error is: {first}"
        raise TargetError(cannot("compare anything", because, "Correct what it names; `cell.json` of a cell has details"))


def _show(result: Study, folder: Path, as_json: bool) -> None:
    if as_json:
        counts = {"cells": len(result.cells), "failed": len(result.failed)}
        dropped = [{"arm": arm, "seeds": count} for arm, count in result.dropped]
        verdict = {"dropped": dropped, "verdict": result.verdict.to_dict(), "rows": result.rows}
        console.print_json({"folder": str(folder), "report": str(folder / "report.html"), **counts, **verdict})
        return
    console.say(result.verdict.sentence)
    console.say(str(result))
    for cell in result.failed[:_MAX_FAILURES_SHOWN]:
        row = cell.row
        console.say(f"failed: {row['family']} · {row['objective']}, seed {row['seed']}: {row['error']}")
    console.say(f"Table: {folder / 'table.csv'}")
