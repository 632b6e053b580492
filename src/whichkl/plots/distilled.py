"""Plots of a distillation: its loss, epoch by epoch, and how often student and teacher are right when they are confident."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from whichkl._checks import require
from whichkl.distillation import Distillation
from whichkl.plots.style import COLORS, Curve, lines, short, style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SIDES = {"student": "forward_kl", "teacher": "target"}


def loss_curve(result: Distillation) -> Figure:
    """Draw the mean loss of each epoch, while training and on the examples to stop by, with the epoch that was kept."""
    epochs = list(range(len(result.history)))
    trained = [(i, a) for i, (a, _) in enumerate(result.history) if math.isfinite(a)]
    curves = [
        Curve("while training", [i for i, _ in trained], [a for _, a in trained], "target"),
        Curve("examples to stop by", epochs, [b for _, b in result.history], "forward_kl"),
    ]
    figure = lines(curves, "epoch", "loss")
    figure.add_vline(x=result.best_epoch, line={"color": COLORS["other"], "width": 1.5, "dash": "dot"})
    if all(value > 0 for curve in curves for value in curve.y):
        figure.update_yaxes(type="log")
    return figure


def reliability_curves(result: Distillation) -> Figure | None:
    """Draw the accuracy in each bin of confidence; None where there are no labels."""
    if result.scores.reliability is None:
        return None
    figure = require("plotly.graph_objects", "app").Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": COLORS["target"], "dash": "dot", "width": 1}, showlegend=False
    )
    for side, one in result.scores.reliability.items():
        kept = [(c, a, n) for c, a, n in zip(one.confidence, one.accuracy, one.counts, strict=True) if n]
        most = max(n for _, _, n in kept)
        figure.add_scatter(
            x=short([c for c, _, _ in kept]),
            y=short([a for _, a, _ in kept]),
            mode="lines+markers",
            name=f"{side}, ECE {one.ece:.3f}",
            line={"color": COLORS[_SIDES[side]], "width": 2},
            marker={"size": [5 + 13 * math.sqrt(n / most) for _, _, n in kept], "opacity": 0.8},
            customdata=[n for _, _, n in kept],
            hovertemplate="confidence %{x:.3f}<br>right %{y:.3f}<br>%{customdata} examples",
        )
    return style(figure, "confidence", "share that is right")
