"""demo: the question answered on five inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, out_option
from whichkl.commands.results_folder import check_results_folder


def demo(
    out: Annotated[Path, out_option("Folder for report.html and report.json.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Answer the question on five inputs, with a report to open in a browser."""
    check_results_folder(out, "report.html", "report.json")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.ERR, disable=as_json or not console.ERR.is_terminal) as progress:
        bar = progress.add_task("loading torch", total=None)
        exits.load_torch()
        from whichkl.demo import STEPS, run_demo, write_demo
        from whichkl.process.threads import one_thread

        progress.update(bar, total=len(STEPS))
        with one_thread():  # the operations are small, and more threads would wait for each other
            result = run_demo(lambda step: progress.update(bar, completed=step, description=STEPS[step]))
        progress.update(bar, completed=len(STEPS), description="done")
    if as_json:
        console.print_json(result.to_dict())
    else:
        _show(result)
    page, _ = write_demo(result, out)
    if not as_json:
        console.say(f"Report: {page}")


def _show(result: Any) -> None:
    schools = result.schools.fit
    rows = [
        ("sample", "forward KL", f"held-out −log q {result.petals.fit.value.number}", console.found(result.petals.fit.findings)),
        ("evaluate up to a constant", "reverse KL", f"ELBO {schools.diagnostics.elbo.number}", console.found(schools.findings)),
    ]
    for one in result.both:
        measured = f"KL(p‖q) {one.forward.number}, KL(q‖p) {one.reverse.number}"
        rows.append(("both", one.fit.objective.name.replace("_kl", " KL"), measured, console.found(one.fit.findings)))
    neither = result.neither
    measured = f"KL(p‖q) {neither.forward.number} of what {neither.pairs} comparisons became"
    rows.append(("neither", "what is left, converted", measured, f"{len(neither.advice.conversions)} ways to convert"))
    console.table("Forward or reverse KL?", ("with p you can …", "minimise", "measured on unseen draws (nats)", "found"), rows)
