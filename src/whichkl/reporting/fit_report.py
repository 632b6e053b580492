"""The report of one fit: verdict first, then the evidence, the advice and the exact configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from whichkl._checks import InputError, cannot, plain
from whichkl.families import richer
from whichkl.fitting import Fit
from whichkl.plots import plot
from whichkl.reporting.page import Block, Section, write_page

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
    title = f"{_TITLES[result.objective.name]} over {result.family.label}: {result.status}"
    sections = [_verdict(result), _evidence(result), _choice(result), _configuration(result)]
    return write_page(path, title, _DIRECTIONS[result.objective.name], sections, "Written by whichkl. All numbers are in nats.")


def _verdict(fit: Fit) -> Section:
    blocks = [
        Block.finding(text, name.replace("_", " ")) for name, text in zip(sorted(fit.findings), fit.explanations, strict=True)
    ]
    if not blocks:
        blocks = [Block.finding("Nothing speaks against this fit in what could be measured with this access.", "No findings")]
    return Section("Did it work?", str(fit.value), (*blocks, Block.chart(plot(fit), _caption(fit))))


def _caption(fit: Fit) -> str:
    many = len(fit.diagnostics.optima)
    return (
        f"The fitted model over the target. {many} distinct optima were found."
        if many > 1
        else "The fitted model over the target."
    )


def _evidence(fit: Fit) -> Section:
    d = fit.diagnostics
    rows = [("value", fit.value.number, fit.value.method)]
    if d.elbo is not None:
        rows.append(("ELBO", d.elbo.number, "mean of log p − log q over fresh draws of q"))
    if d.ess is not None and d.khat is not None and d.elbo is not None:
        rows.append(("importance ESS", f"{d.ess:,.0f} of {d.elbo.n:,}", "draws of q that count, reweighted to p"))
        rows.append(("PSIS k̂", f"{d.khat:.2f}", "below 0.7 the reweighted answers can be trusted"))
    if d.richer_gain is not None:
        rows.append(("gain of the next richer family", d.richer_gain.number, f"{richer(fit.family)}, nats a draw, paired"))
    if d.node_error is not None:
        rows.append(("node error", f"{d.node_error:.3g}", "shift of the means in sd when the nodes are doubled"))
    rows.append(("size of the gradient at the end", f"{d.residual:.1g}", f"after {d.iterations} iterations"))
    blocks = [Block.table(("measure", "number", "meaning"), rows)]
    if len(d.optima) > 1:
        optima = [(str(i + 1), f"{o.loss:.6f}", "global" if o.is_global else "local") for i, o in enumerate(d.optima)]
        blocks.append(Block.table(("optimum", "loss", "kind"), optima, "Every distinct optimum that was found."))
    return Section("The evidence", "Measured on draws that the fit has not seen, wherever the access allows it.", tuple(blocks))


def _choice(fit: Fit) -> Section:
    return Section("Why this direction", fit.advice.verdict, (Block.listing(str(fit.advice)),))


def _configuration(fit: Fit) -> Section:
    text = json.dumps(plain(fit.to_dict()), indent=1)
    return Section("Exact configuration", "What it takes to do this again.", (Block.listing(text),))
