"""The report of one fit: verdict first, then the evidence, the advice and the exact configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot, plain
from whichkl.diagnostics import shown_khat
from whichkl.families import richer
from whichkl.fitting import Fit
from whichkl.plots import SHOWN, plot
from whichkl.reporting.page import Block, Section, write_page
from whichkl.solvers import Optimum

_TITLES = {"forward_kl": "Forward KL", "reverse_kl": "Reverse KL"}
_DIRECTIONS = {
    "forward_kl": "KL(p‖q), the expectation under the target: it covers mass.",
    "reverse_kl": "KL(q‖p), the expectation under the model: it tends to seek modes.",
}


def report(result: Any, path: str | os.PathLike[str]) -> Path:
    """Write the report of a fit as one HTML file.

    Args:
        result: what `fit` returned.
        path: where to.

    Raises:
        InputError: the result isn't a fit, or the `app` extra isn't installed.
        ResourceError: the file can't be written.
    """
    if not isinstance(result, Fit):
        because = f"it is a `{type(result).__name__}`"
        raise InputError(cannot("report on this", because, "Pass what whichkl.fit returned"))
    title = f"{_TITLES[result.objective.name]} over {result.family.label}"
    sections = [_verdict(result), _evidence(result), _choice(result), _configuration(result)]
    return write_page(path, title, _DIRECTIONS[result.objective.name], sections, "Written by whichkl. All numbers are in nats.")


def _verdict(fit: Fit) -> Section:
    named = zip(sorted(fit.findings), fit.explanations, strict=True)
    blocks = [Block.warning(text.replace("`", ""), name.replace("_", " ")) for name, text in named]
    if not blocks:
        blocks = [Block.finding("Nothing speaks against this fit in what could be measured with this access.", "No findings")]
    count = len(fit.findings)
    judgement = (
        "nothing speaks against it" if not count else f"{count} finding{'s' * (count > 1)} speak{'s' * (count == 1)} against it"
    )
    lead = f"The solver {fit.status}, and {judgement}. {fit.value}."
    return Section("Did it work?", lead, (*blocks, Block.chart(plot(fit), _caption(fit))))


def _caption(fit: Fit) -> str:
    known = fit.target is not None and (fit.target.access.can_sample or (len(fit.names) == 1 and fit.target.normalized))
    parts = ["The fitted model over the target." if known else "The fitted model; the target can't be drawn, only evaluated."]
    many = len(fit.diagnostics.optima)
    if many > 1:
        parts.append(f"{many} distinct optima were found; the dotted ones are the others.")
    if len(fit.names) > SHOWN:
        parts.append(f"The first {SHOWN} of {len(fit.names)} coordinates.")
    return " ".join(parts)


def _evidence(fit: Fit) -> Section:
    d = fit.diagnostics
    rows = [("value", fit.value.number, fit.value.method)]
    if d.elbo is not None:
        rows.append(("ELBO", d.elbo.number, "mean of log p − log q over fresh draws of q"))
    if d.ess is not None and d.khat is not None and d.elbo is not None:
        rows.append(("importance ESS", f"{d.ess:,.0f} of {d.elbo.n:,}", "draws of q that count, reweighted to p"))
        rows.append(("PSIS k̂", shown_khat(d.khat), "below 0.7 q's draws can be reweighted to p, where q reaches"))
        rows.append(
            (
                "reverse KL, at least",
                f"{max(d.least_kl or 0.0, 0.0):.3f}",
                "from the weights, and from separate optima that q leaves out",
            )
        )
    if d.richer_gain is not None:
        rows.append(("gain of the next richer family", d.richer_gain.number, f"{richer(fit.family)}, nats a draw, paired"))
    if d.node_error is not None:
        rows.append(("node error", f"{d.node_error:.3g}", "shift of the means in sd when the nodes are doubled"))
    if d.residual > 0:
        rows.append(("size of the gradient at the end", f"{d.residual:.1g}", f"after {d.iterations} iterations"))
    blocks = [Block.table(("measure", "number", "meaning"), rows)]
    if len(d.optima) > 1:
        optima = [(str(i + 1), f"{o.loss:.4f}", "global" if o.is_global else "local", _at(o)) for i, o in enumerate(d.optima)]
        note = "Every distinct optimum that was found; means in unconstrained coordinates."
        blocks.append(Block.table(("optimum", "loss", "kind", "mean"), optima, note))
    return Section("The evidence", "Measured on draws that the fit has not seen, wherever the access allows it.", tuple(blocks))


def _at(optimum: Optimum) -> str:
    mean = [f"{value + 0.0:.3g}" for value in optimum.model.mean.tolist()]
    return ", ".join(mean[:6]) + (", …" if len(mean) > 6 else "")


def _choice(fit: Fit) -> Section:
    return Section("Why this direction", "What the access to the target allows.", (Block.listing(str(fit.advice)),))


def _configuration(fit: Fit) -> Section:
    text = json.dumps(plain(fit.to_dict()), indent=1)
    return Section("Exact configuration", "What it takes to do this again.", (Block.listing(text),))
