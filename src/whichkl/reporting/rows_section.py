"""The section that compares a model with its data: pairs, margins, calibration, and the number of components."""

from __future__ import annotations

from torch.distributions import Distribution

from whichkl.fitting import Fit
from whichkl.plots import calibration_curves, components_curve, margins, pairs, predictions
from whichkl.plots.margins import MAX_MARGINS
from whichkl.plots.pairs import MAX_COLUMNS
from whichkl.reporting.page import Block, Section

_NO_ROWS = (
    "The rows aren't available (they came from a stream, or the fit was loaded), so that the model can't be drawn over them. "
    "Report on the fit where it was made."
)


def rows_section(fit: Fit) -> Section | None:
    """Compare the model with rows of the target; None where there are neither rows nor figures."""
    blocks = [*_compared(fit), *_calibrated(fit), *_components(fit)]
    if not blocks:
        return None
    return Section("The model and the data", "Grey is the data p, blue the model q.", tuple(blocks))


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
        f"low.{more}"
    )
    notes = [Block.sentence(note) for note in calibration.notes]
    return [Block.charts(figures, caption), *notes]


def _components(fit: Fit) -> list[Block]:
    figure = components_curve(fit)
    caption = "Held-out −log q for each number of components, with one standard error: lower is better."
    return [] if figure is None else [Block.chart(figure, caption)]
