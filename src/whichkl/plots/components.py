"""Components: the held-out score of each number of components, where that number was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whichkl._checks import require
from whichkl.families import Mixture
from whichkl.fitting import Fit
from whichkl.plots.style import COLORS, short, style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def components_curve(fit: Fit) -> Figure | None:
    """Draw held-out −log q against the number of components, with one standard error; None where it wasn't chosen."""
    curve = fit.diagnostics.curve
    if not curve:
        return None
    figure = require("plotly.graph_objects", "app").Figure()
    counts, values = [count for count, _ in curve], short([one.value for _, one in curve])
    error = {"type": "data", "array": short([one.stderr for _, one in curve]), "thickness": 1.5, "width": 4}
    color = COLORS[fit.objective.name]
    figure.add_scatter(
        x=counts,
        y=values,
        error_y=error,
        mode="lines+markers",
        line={"color": color, "width": 2},
        marker={"size": 7},
        name="held-out −log q",
    )
    chosen = fit.family.components if isinstance(fit.family, Mixture) else None
    if chosen in counts:
        ring = {"size": 15, "symbol": "circle-open", "line": {"width": 2.5}, "color": COLORS["reverse_kl"]}
        at = values[counts.index(chosen)]
        figure.add_scatter(x=[chosen], y=[at], mode="markers", marker=ring, name=f"chosen: {chosen}")
    style(figure, "components", "held-out −log q, nats a row", 320)
    figure.update_xaxes(dtick=max(1, round(len(counts) / 10)))
    return figure
