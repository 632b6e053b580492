"""The report of one fit: verdict first, then the evidence, the advice and the exact configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch.distributions import Distribution

from whichkl._checks import plain
from whichkl.arrays import tensor_of
from whichkl.diagnostics import next_richer, shown_weights
from whichkl.families import simpler
from whichkl.fitting import Fit
from whichkl.plots import SHOWN, plot
from whichkl.plots.arms import training
from whichkl.plots.rows import data
from whichkl.reporting.page import Block, Section, write_page
from whichkl.reporting.rows_section import rows_section
from whichkl.reporting.study_fits import TRAINING
from whichkl.solvers import Optimum

_DIRECTIONS = {
    "forward_kl": "KL(p‖q), the expectation under the target: it covers mass.",
    "reverse_kl": "KL(q‖p), the expectation under the model: it tends to seek modes.",
}


_CROSS_ENTROPY = (
    "The loss is the cross-entropy KL(p‖q) + H(p), as in every fit to samples alone: H(p), the entropy of the data, is the same "
    "for every model, so that differences between models are differences in KL, and the number itself is not one."
)


def report_fit(result: Fit, path: str | os.PathLike[str]) -> Path:
    """Write the report of a fit as one HTML file.

    Raises:
        InputError: the `app` extra isn't installed.
        ResourceError: the file can't be written.
    """
    title = f"{result.objective.title} over {result.family.label}"
    rows = rows_section(result)
    sections = [_verdict(result), *([] if rows is None else [rows]), _evidence(result), _choice(result), _configuration(result)]
    objective = result.objective
    what = _DIRECTIONS.get(objective.name, f"{objective.spec}, {objective.formula}: {objective.character}.")
    return write_page(path, title, what, sections, "Written by whichkl. All numbers are in nats.")


def _verdict(fit: Fit) -> Section:
    named = zip(sorted(fit.findings), fit.explanations, strict=True)
    blocks = [Block.warning(text.replace("`", ""), name.replace("_", " ")) for name, text in named]
    if not blocks:
        blocks = [Block.finding("Nothing speaks against this fit in what could be measured with this access.", "No findings")]
    count = len(fit.findings)
    judgement = (
        "nothing speaks against it" if not count else f"{count} finding{'s' * (count > 1)} speak{'s' * (count == 1)} against it"
    )
    lead = f"The solver {fit.status}, and {judgement}; {fit.value}."
    return Section("Did it work?", lead, (*blocks, *_figure(fit)))


def _figure(fit: Fit) -> list[Block]:
    """The fit's own figure; none for a conditional fit without its rows."""
    if not isinstance(fit.model, Distribution) and data(fit) is None:
        return []
    figure = plot(fit)
    return [Block.chart(figure, (figure.layout.meta or {}).get("caption") or _caption(fit))]


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
    if d.held_out is not None and d.held_out.number != fit.value.number:
        rows.append(("held-out −log q", d.held_out.number, d.held_out.method))
    if d.elbo is not None:
        rows.append(("ELBO", d.elbo.number, "mean of log p − log q over fresh draws of q"))
    if d.ess is not None and d.khat is not None and d.elbo is not None:
        rows.append(("importance ESS", f"{d.ess:,.0f} of {d.elbo.n:,}", "draws of q that count, reweighted to p"))
        tail = shown_weights(d.ess, d.khat, d.elbo.n)
        rows.append(("PSIS k̂ of the weights", tail, "below 0.7 q's draws can be reweighted to p, where q reaches"))
        rows.append(
            (
                "reverse KL, at least",
                f"{max(d.least_kl or 0.0, 0.0):.3f}",
                "from the weights, and from separate optima and missing modes that q leaves out",
            )
        )
    missing = d.missing_modes
    if missing is not None and missing.reason is None:
        number = f"{missing.mass:.1%} ± {missing.stderr:.1%}"
        rows.append(
            ("mass at modes that q misses", number, f"{missing.count} found; by {missing.method}, searched {missing.searched}")
        )
    for word, gain, near in (
        ("richer", d.richer_gain, next_richer(fit.family, d)),
        ("simpler", d.simpler_gain, simpler(fit.family)),
    ):
        if gain is not None and near is not None:
            is_lowest = word == "simpler" and d.simpler is not None
            name, label = (
                ("gain of the simplest family", str(d.simpler)) if is_lowest else (f"gain of the next {word} family", near.label)
            )
            rows.append((name, gain.number, f"{label}, nats a draw, paired"))
    if d.two_sample is not None and d.two_sample.auc is not None:
        rows.append(("classifier, unseen rows or draws of q?", d.two_sample.number, f"chance is 0.5; {d.two_sample.chance}"))
    if d.calibration is not None and d.calibration.p_value is not None:
        count, seen = len(d.calibration.columns), f"{d.calibration.rows:,} unseen rows"
        what = f"least of {count} columns, corrected for their number" if count > 1 else "of the one column"
        rows.append(("calibration", f"p = {d.calibration.p_value:.2g}", f"{what}, on {seen}"))
    if d.node_error is not None:
        rows.append(("node error", f"{d.node_error:.3g}", "shift of the means in sd when the nodes are doubled"))
    if d.residual > 0:
        rows.append(("size of the gradient at the end", f"{d.residual:.1g}", f"after {d.iterations} iterations"))
    blocks = [Block.table(("measure", "number", "meaning"), rows)]
    for name, check in (("classifier test", d.two_sample), ("calibration", d.calibration)):
        if check is not None and check.reason is not None:
            blocks.append(Block.paragraph(f"No {name}: {check.reason}."))
    if fit.value.up_to == "entropy_p":
        blocks.append(Block.paragraph(_CROSS_ENTROPY))
    blocks += [Block.paragraph(f"{note[:1].upper()}{note[1:]}{'' if note.endswith('.') else '.'}") for note in d.notes]
    if len(d.optima) > 1:
        optima = [(str(i + 1), f"{o.loss:.4f}", "global" if o.is_global else "local", _at(o)) for i, o in enumerate(d.optima)]
        note = "Every distinct optimum that was found; means in unconstrained coordinates."
        blocks.append(Block.table(("optimum", "loss", "kind", "mean"), optima, note))
    curve = training({fit.objective.spec: d.history}) if len(d.history) > 1 else None
    blocks += [] if curve is None else [Block.chart(curve, TRAINING)]
    return Section("The evidence", "Measured on draws that the fit has not seen, wherever the access allows it.", tuple(blocks))


def _at(optimum: Optimum) -> str:
    mean = [f"{value + 0.0:.3g}" for value in tensor_of(optimum.model.mean).flatten().tolist()]
    return ", ".join(mean[:6]) + (", …" if len(mean) > 6 else "")


def _choice(fit: Fit) -> Section:
    return Section("Why this direction", "What the access to the target allows.", (Block.listing(str(fit.advice)),))


def _configuration(fit: Fit) -> Section:
    fields = fit.to_dict()
    del fields["diagnostics"]["history"]
    calibration = fields["diagnostics"].get("calibration")
    if calibration:
        columns = [{key: value for key, value in one.items() if key != "curve"} for one in calibration["columns"]]
        fields["diagnostics"] = {**fields["diagnostics"], "calibration": {**calibration, "columns": columns}}
    text = json.dumps(plain(fields), indent=1, ensure_ascii=False)
    return Section("Exact configuration", "What it takes to do this again.", (Block.listing(text),))
