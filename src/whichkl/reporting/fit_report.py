"""The report of one fit: verdict first, then the model over its data, the evidence, the advice and the configuration."""

from __future__ import annotations

from torch.distributions import Distribution

from whichkl.arrays import tensor_of
from whichkl.diagnostics import Diagnostics, next_richer, shown_weights
from whichkl.families import simpler
from whichkl.fitting import Fit
from whichkl.fitting.summary import MAX_ROWS, Summary
from whichkl.plots import calibration_curves, components_curve, margins, pairs, plot, predictions
from whichkl.plots.curves import training
from whichkl.plots.fitted import MAX_INTERVALS
from whichkl.plots.rows import MAX_COLUMNS, MAX_MARGINS, data
from whichkl.plots.style import color_word
from whichkl.reporting.page import Block, Page, Section, configuration_section
from whichkl.solvers import Optimum

_DIRECTIONS = {
    "forward_kl": "KL(p‖q), the expectation under the target: it covers mass.",
    "reverse_kl": "KL(q‖p), the expectation under the model: it tends to seek modes.",
}
_CROSS_ENTROPY = (
    "The loss is the cross-entropy KL(p‖q) + H(p), as in every fit to samples alone. H(p), the entropy of the data, is the same "
    "for every model, so that differences between models are differences in KL; the number itself isn't a KL."
)
_OF_SIMULATIONS = (
    " This is simulation-based calibration: u is the rank of the parameter of an unseen simulation among draws of the posterior "
    "at its data."
)
TRAINING = (
    "How the loss fell. For networks trained on rows: the lowest loss so far on rows set aside, per round; otherwise that of "
    "the best start, per iteration. It may rise where nodes were doubled, or where a first part of the rows was followed by "
    "all. Losses are up to the objective's constant."
)
_MAX_SHOWN_MEANS = 6

Row = tuple[str, str, str]
_NO_ROWS = (
    "The rows aren't available (they came from a stream, or the fit was loaded), so that the model can't be drawn over them. "
    "Report on the fit where it was made."
)


def fit_page(fit: Fit) -> Page:
    """Return the report of a fit."""
    objective, rows = fit.objective, rows_section(fit)
    advice = Section(
        "Why this direction", "What the access to the target allows.", (Block.listing(str(fit.advice).replace("`", "")),)
    )
    sections = [verdict_section(fit), *([] if rows is None else [rows]), *_origin(fit), _evidence(fit), advice]
    sections.append(_configuration(fit))
    what = _DIRECTIONS.get(objective.name, f"{objective.spec}, {objective.formula}: {objective.character}.")
    return Page(f"{objective.title} over {fit.family.label}", what, sections, "Written by whichkl. All numbers are in nats.")


def finding_blocks(fit: Fit) -> list[Block]:
    """Return a warning for each finding, or one block that there are none."""
    named = zip(sorted(fit.findings), fit.explanations, strict=True)
    blocks = [Block.warning(text, name.replace("_", " ")) for name, text in named]
    return blocks or [Block.finding("No check that this access allows speaks against this fit.", "No findings")]


def verdict_section(fit: Fit, *, has_pictures: bool = True) -> Section:
    """State whether the fit worked; then the findings, the table, and, if it `has_pictures`, the model."""
    count, blocks, summary = len(fit.findings), finding_blocks(fit), fit.summary()
    judgement = f"{count} finding{'s are' if count > 1 else ' is'} explained below" if count else "nothing speaks against it"
    judgement += "" if count or fit.value.reliable else ", but its value isn't reliable"
    blocks += [summary_block(summary)] if summary.rows else [Block.sentence(note) for note in summary.notes]
    if has_pictures and (isinstance(fit.model, Distribution) or data(fit) is not None):
        figure = plot(fit)
        blocks.append(Block.chart(figure, (figure.layout.meta or {}).get("caption") or _caption(fit)))
    return Section("Did it work?", f"{fit.trust} The solver {fit.status}, and {judgement}; {fit.value}.", tuple(blocks))


def summary_block(summary: Summary) -> Block:
    """Return the first rows of a fit's table."""
    more = f" The first {MAX_ROWS} of {len(summary.rows):,} rows." if len(summary.rows) > MAX_ROWS else ""
    heads = [head.replace(" ", "\u00a0") for head in summary.heads]  # on one line each
    return Block.table(("", *heads), summary.cells(MAX_ROWS), " ".join(summary.notes) + more)


def _caption(fit: Fit) -> str:
    count = len(fit.diagnostics.optima)
    if len(fit.names) > 2 or (len(fit.names) == 2 and not fit.bijection.is_real):
        some = f" The first {MAX_INTERVALS} of {len(fit.names)}." if len(fit.names) > MAX_INTERVALS else ""
        others = f" This is the best of {count} distinct optima." if count > 1 else ""
        return f"Median and 95 % interval of each coordinate under the fitted model.{some}{others}"
    known = fit.target is not None and (fit.target.access.can_sample or (len(fit.names) == 1 and fit.target.normalized))
    parts = ["The fitted model over the target." if known else "The fitted model; the target can't be drawn, only evaluated."]
    if count > 1:
        parts.append(f"{count} distinct optima were found; the dotted ones are the others.")
    return " ".join(parts)


def _origin(fit: Fit) -> list[Section]:
    """Return what the target was converted from, if it was."""
    origin = fit.advice.origin
    if origin is None:
        return []
    table = Block.table(("", "what"), origin.rows)
    return [Section("What the target was made of", origin.source, (table,))]


def _evidence(fit: Fit) -> Section:
    d = fit.diagnostics
    rows = [*_value_rows(fit), *_weight_rows(d), *_neighbour_rows(fit), *_check_rows(d)]
    blocks = [Block.table(("measure", "number", "meaning"), rows)]
    for name, check in (("classifier test", d.two_sample), ("calibration", d.calibration)):
        if check is not None and check.reason is not None:
            blocks.append(Block.paragraph(f"No {name}: {check.reason}."))
    if fit.value.includes_entropy:
        blocks.append(Block.paragraph(_CROSS_ENTROPY))
    blocks += [Block.sentence(note) for note in d.notes]
    if len(d.optima) > 1:
        optima = [(str(i + 1), f"{o.loss:.4f}", "global" if o.is_global else "local", _mean(o)) for i, o in enumerate(d.optima)]
        caption = "Every distinct optimum that was found; means in unconstrained coordinates."
        blocks.append(Block.table(("optimum", "loss", "kind", "mean"), optima, caption))
    curve = training({fit.objective.spec: d.history}) if len(d.history) > 1 else None
    blocks += [] if curve is None else [Block.chart(curve, TRAINING)]
    return Section("The evidence", "Measured on draws that the fit has not seen, wherever the access allows it.", tuple(blocks))


def _value_rows(fit: Fit) -> list[Row]:
    d, rows = fit.diagnostics, [("value", f"{fit.value.number}{fit.value.constant}", fit.value.method)]
    if d.held_out is not None and d.held_out.number != fit.value.number:
        rows.append(("held-out −log q", f"{d.held_out.number}{d.held_out.constant}", d.held_out.method))
    if d.elbo is not None:
        rows.append(("ELBO", f"{d.elbo.number}{d.elbo.constant}", "mean of log p − log q over fresh draws of q"))
    return rows


def _weight_rows(d: Diagnostics) -> list[Row]:
    if d.ess is None or d.khat is None or d.elbo is None:
        return []
    tail, least = shown_weights(d.ess, d.khat, d.elbo.n), f"{max(d.least_kl or 0.0, 0.0):.3f}"
    return [
        ("importance ESS", f"{d.ess:,.0f} of {d.elbo.n:,}", "draws of q that count, reweighted to p"),
        (
            "PSIS k̂ of the weights",
            tail,
            "up to 0.5 q's draws can be reweighted to p, where q reaches",
        ),
        ("reverse KL, at least", least, "from the weights, and from separate optima and missing modes that q leaves out"),
    ]


def _neighbour_rows(fit: Fit) -> list[Row]:
    """Return what q misses, and what the next richer and simpler families gain."""
    d, rows, missing = fit.diagnostics, [], fit.diagnostics.missing_modes
    if missing is not None and missing.reason is None:
        number = f"{missing.mass:.1%} ± {missing.stderr:.1%}"
        meaning = f"{missing.count} found; by {missing.method}, searched {missing.searched}"
        rows.append(("mass at modes that q misses", number, meaning))
    richer, poorer = next_richer(fit.family, d), simpler(fit.family)
    if d.richer_gain is not None and richer is not None:
        rows.append(("gain of the next richer family", d.richer_gain.number, f"{richer.label}, nats a draw, paired"))
    if d.simpler_gain is not None and poorer is not None:
        name = "gain of the next simpler family" if d.simpler is None else "gain of the simplest family"
        rows.append((name, d.simpler_gain.number, f"{d.simpler or poorer.label}, nats a draw, paired"))
    return rows


def _check_rows(d: Diagnostics) -> list[Row]:
    rows = []
    if d.two_sample is not None and d.two_sample.auc is not None:
        rows.append(("classifier, unseen rows or draws of q?", d.two_sample.number, f"chance is 0.5; {d.two_sample.chance}"))
    if d.calibration is not None and d.calibration.p_value is not None:
        count = len(d.calibration.columns)
        joint = f"{count - 1} columns and of all together, corrected for their number"
        what = f"least of {joint}" if count > 1 else "of the one column"
        rows.append(("calibration", f"p = {d.calibration.p_value:.2g}", f"{what}, on {d.calibration.rows:,} unseen rows"))
    if d.node_error is not None:
        rows.append(("node error", f"{d.node_error:.3g}", "shift of the means in sd when the nodes are doubled"))
    if d.residual > 0:
        rows.append(("size of the gradient at the end", f"{d.residual:.1g}", f"after {d.iterations} iterations"))
    return rows


def _mean(optimum: Optimum) -> str:
    mean = [f"{value + 0.0:.3g}" for value in tensor_of(optimum.model.mean).flatten().tolist()]
    return ", ".join(mean[:_MAX_SHOWN_MEANS]) + (", …" if len(mean) > _MAX_SHOWN_MEANS else "")


def _configuration(fit: Fit) -> Section:
    fields = fit.to_dict()
    del fields["diagnostics"]["history"], fields["summary"]
    calibration = fields["diagnostics"].get("calibration")
    if calibration:
        columns = [{key: value for key, value in one.items() if key != "curve"} for one in calibration["columns"]]
        fields["diagnostics"] = {**fields["diagnostics"], "calibration": {**calibration, "columns": columns}}
    return configuration_section(fields)


def rows_section(fit: Fit) -> Section | None:
    """Compare the model with rows of the target; None where there are neither rows nor figures."""
    blocks, curve = [*_compared(fit), *_calibrated(fit)], components_curve(fit)
    if curve is not None:
        caption = "Held-out −log q for each number of components, with one standard error: lower is better."
        blocks.append(Block.chart(curve, caption))
    what = f"Grey is the data p, {color_word(fit.objective.name)} the model q."
    return Section("The model and the data", what, tuple(blocks)) if blocks else None


def _compared(fit: Fit) -> list[Block]:
    d = len(fit.names)
    if not isinstance(fit.model, Distribution):
        figures = predictions(fit)
        # the verdict shows the first
        return [Block.charts(figures[1:], "The other columns of y.")] if figures[1:] else _missing(fit, bool(figures))
    if d == 1:
        return []
    blocks, figure = [], pairs(fit)
    if figure is None:
        return _missing(fit, False)
    if d > MAX_COLUMNS:
        shown = f" The first {MAX_MARGINS} of {d} columns." if d > MAX_MARGINS else ""
        blocks.append(Block.charts(margins(fit), f"Each column of the data, and the model's margin.{shown}"))
    which = f" The {MAX_COLUMNS} of {d} columns with the worst calibration." if d > MAX_COLUMNS else ""
    caption = (
        "Below the diagonal the data, with the smallest regions that hold 50 % and 90 % of the model; above it the same number "
        f"of draws of the model; on it both margins. A model that fits looks the same on both sides.{which}"
    )
    return [*blocks, Block.chart(figure, caption)]


def _missing(fit: Fit, drawn: bool) -> list[Block]:
    """State that there is no figure, where there would be one if the rows were kept."""
    from_rows = fit.target is None or fit.target.access.can_sample
    return [Block.paragraph(_NO_ROWS)] if from_rows and not drawn and fit.objective.name == "forward_kl" else []


def _calibrated(fit: Fit) -> list[Block]:
    figures, calibration = calibration_curves(fit), fit.diagnostics.calibration
    if not figures or calibration is None:
        return []
    more = f" The {len(figures)} worst of {len(calibration.columns)}." if len(figures) < len(calibration.columns) else ""
    caption = (
        f"Calibration on {calibration.rows:,} unseen rows: the distribution function of u = F_q(x), which is uniform if the "
        "model is right, minus the diagonal. If the model is right, all curves stay in their grey bands with 95 % chance. A "
        "curve that rises and then falls below 0 has too many rows in both tails of q (q is too narrow). A curve that falls and "
        "then rises has too few (q is too wide). A curve above 0 means that q lies too high, one below 0 that it lies too "
        f"low.{more}{_OF_SIMULATIONS if fit.context_names and fit.advice.origin else ''}"
    )
    notes = [Block.sentence(note) for note in calibration.notes]
    return [Block.charts(figures, caption), *notes]
