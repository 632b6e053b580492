"""Components: the held-out score of each number of components, where that number was chosen."""

from __future__ import annotations

from whichkl.families import Mixture
from whichkl.fitting import Fit
from whichkl.plots.style import Figure, add_line, add_points, new_figure, short, style


def components_curve(fit: Fit) -> Figure | None:
    """Draw held-out −log q against the number of components, with one standard error; None where it wasn't chosen."""
    curve = fit.diagnostics.curve
    if not curve:
        return None
    figure, counts, values = new_figure(), [count for count, _ in curve], [one.value for _, one in curve]
    error = {"type": "data", "array": short([one.stderr for _, one in curve]), "thickness": 1.5, "width": 4}
    shape = {"mode": "lines+markers", "marker": {"size": 7}, "error_y": error}
    add_line(figure, counts, values, fit.objective.name, "held-out −log q", **shape)
    chosen = fit.family.components if isinstance(fit.family, Mixture) else None
    if chosen in counts:
        ring = {"size": 15, "symbol": "circle-open", "marker": {"line": {"width": 2.5}}}
        add_points(figure, [chosen], [values[counts.index(chosen)]], "reverse_kl", f"chosen: {chosen}", **ring)
    style(figure, "components", "held-out −log q, nats a row", 320)
    figure.update_xaxes(dtick=max(1, round(len(counts) / 10)))
    return figure
