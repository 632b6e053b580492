"""estimate: a divergence between two distributions or samples, in both directions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whichkl._checks import InputError, WhichklError, cannot
from whichkl.commands import console, exits
from whichkl.commands.options import AsJson, Categories, Columns, Drop, Missing, Seed, Thousands, read_side
from whichkl.commands.wording import with_options

_OTHER_DIRECTION = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}


def estimate(
    p: Annotated[
        str | None,
        typer.Option(
            "--p",
            help="The target: a sample file, or a distribution such as 'Normal(0,1)', 'Categorical(.3,.7)' or "
            "'0.5*Normal(-3,1) + 0.5*Normal(3,1)'; a wrong name lists all.",
        ),
    ] = None,
    q: Annotated[str | None, typer.Option("--q", help="The model: the same.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Folder of a language model, instead of --p; with --student and --prompts.")
    ] = None,
    student: Annotated[str | None, typer.Option("--student", help="Folder of the model that is compared with it.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="File of prompts: a line each, or .jsonl.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Where continuations are cut.")] = 64,
    samples: Annotated[int, typer.Option("--samples", help="Continuations of every prompt.")] = 1,
    divergence: Annotated[
        str, typer.Option("--divergence", help="forward_kl, reverse_kl, jeffreys, jensen_shannon, total_variation, energy, …")
    ] = "forward_kl",
    method: Annotated[
        str | None,
        typer.Option("--method", help="By default the access decides: closed_form, quadrature, monte_carlo, knn, classifier, …"),
    ] = None,
    form: Annotated[
        str, typer.Option("--form", help="What files hold: samples, or one row of probabilities or of logits per distribution.")
    ] = "samples",
    p_chains: Annotated[
        int | None, typer.Option("--p-chains", help="The samples of p are this many Markov chains, one after another.")
    ] = None,
    q_chains: Annotated[int | None, typer.Option("--q-chains", help="The same for q.")] = None,
    p_weights: Annotated[
        str | None,
        typer.Option(
            "--p-weights", metavar="COLUMN", help="The column of weights of p's rows; a file of `whichkl convert` names its own."
        ),
    ] = None,
    q_weights: Annotated[str | None, typer.Option("--q-weights", metavar="COLUMN", help="The same for q.")] = None,
    columns: Columns = None,
    drop: Drop = None,
    missing: Missing = "refuse",
    thousands: Thousands = None,
    categories: Categories = None,
    weight: Annotated[float | None, typer.Option("--weight", help="Weight of p in Jensen–Shannon and skew KLs.")] = None,
    weight_on_forward: Annotated[float | None, typer.Option("--weight-on-forward", help="Weight of KL(p‖q) in jeffreys.")] = None,
    order: Annotated[float | None, typer.Option("--order", help="Order of Rényi's divergence.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Estimate a divergence between two distributions or samples, both directions side by side, and report how reliable it is.

    With --teacher, --student and --prompts: the KL of sequences between two language models.
    """
    if _names_models({"--teacher": teacher, "--student": student, "--prompts": prompts}, p, q):
        _of_sequences(str(teacher), str(student), str(prompts), max_new_tokens, samples, seed, as_json)
        return
    if p is None or q is None:
        raise InputError(cannot("estimate a divergence", f"`{'--p' if p is None else '--q'}` is missing", "Give --p and --q"))
    with console.ERR.status("loading torch", spinner="line"):
        exits.load_torch()
        from whichkl.divergences.dispatch import estimate as run_estimate

        reading = {"columns": columns, "drop": drop, "missing": missing, "thousands": thousands, "categories": categories}
        first = read_side("p", p, form, p_chains, p_weights, **reading)
        second = read_side("q", q, form, q_chains, q_weights, **reading)
        knobs: dict[str, Any] = {"weight": weight, "weight_on_forward": weight_on_forward, "order": order}
        knobs |= {"seed": seed, "form": form, "method": method}
        asked = run_estimate(p=first, q=second, divergence=divergence, **knobs)
        other: Any = None
        if divergence in _OTHER_DIRECTION:
            try:
                other = run_estimate(p=first, q=second, divergence=_OTHER_DIRECTION[divergence], **knobs)
            except WhichklError as error:
                other = str(error)
    if as_json:
        back = {"error": other} if isinstance(other, str) else None if other is None else _as_json(other)
        console.print_json({"p": p, "q": q, **_as_json(asked), "other_direction": back})
        return
    _show(f"p = {p}, q = {q}", [one for one in (asked, other) if hasattr(one, "to_dict")])
    if isinstance(other, str):
        console.say(f"The other direction: {other}")


def _names_models(models: dict[str, str | None], p: str | None, q: str | None) -> bool:
    """Whether language models are to be compared; a part of what they need is refused."""
    if not any(models.values()):
        return False
    absent = next((name for name, value in models.items() if not value), None)
    if absent or p or q:
        because = f"`{absent}` is missing" if absent else "`--p` and `--q` are of other distributions"
        raise InputError(cannot("compare language models", because, "Give --teacher, --student and --prompts alone"))
    return True


def _of_sequences(teacher: str, student: str, prompts: str, max_new_tokens: int, samples: int, seed: int, as_json: bool) -> None:
    """Load two language models, and compare their continuations."""
    with console.progress() as tell:
        exits.load_torch()
        from whichkl.distillation import sequence_kl
        from whichkl.distillation.language.loading import common_tokenizer, load_model, load_prompts

        given = load_prompts(prompts)
        (p, tokenizer), (q, other) = load_model(teacher, "teacher"), load_model(student, "student")
        tokenizer = common_tokenizer(tokenizer, other)
        count: dict[str, Any] = {"max_new_tokens": max_new_tokens, "samples": samples, "seed": seed}
        found = sequence_kl(teacher=p, student=q, tokenizer=tokenizer, prompts=given, tell=tell, **count)
    if as_json:
        console.print_json({"teacher": teacher, "student": student, **found.to_dict()})
        return
    console.say(str(found))


def _show(title: str, results: list[Any]) -> None:
    from whichkl.divergences.estimate import TABLE_HEADS

    console.table(title, TABLE_HEADS, [one.cells for one in results])
    for one in results:
        console.say(one.sentence)
        for note in one.notes:
            side = "q" if " of q is data" in note else "p"
            console.say(f"  · {with_options(note, {'weights': f'--{side}-weights', 'drop': '--drop'})}")


def _as_json(one: Any) -> dict[str, Any]:
    """Return an estimate as JSON holds it, with its interval and its sentence."""
    return {**one.to_dict(), "interval": list(one.interval), "sentence": one.sentence}
