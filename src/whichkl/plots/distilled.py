"""Plots of a distillation: its loss per epoch, and how often student and teacher are right when they are confident."""

from __future__ import annotations

import math

from whichkl.distillation import Distillation
from whichkl.plots.style import COLORS, Figure, add_line, new_figure, style

_SIDES = {"student": "forward_kl", "teacher": "target"}
"""Colours of both sides."""


def loss_curve(result: Distillation) -> Figure:
    """Draw the mean loss of each epoch, in training and on the examples to stop by, with the epoch that was kept."""
    figure, epochs = new_figure(), list(range(len(result.history)))
    trained = [(i, loss) for i, (loss, _) in enumerate(result.history) if math.isfinite(loss)]
    stopping = [loss for _, loss in result.history]
    add_line(figure, [i for i, _ in trained], [loss for _, loss in trained], "target", "in training")
    add_line(figure, epochs, stopping, "forward_kl", "examples to stop by")
    figure.add_vline(x=result.best_epoch, line={"color": COLORS["other"], "width": 1.5, "dash": "dot"})
    style(figure, "epoch", "loss")
    if all(loss > 0 for loss in (*stopping, *(loss for _, loss in trained))):
        figure.update_yaxes(type="log")
    return figure


def reliability_curves(result: Distillation) -> Figure | None:
    """Draw the accuracy in each bin of confidence; None where there are no labels."""
    if result.scores.reliability is None:
        return None
    figure = new_figure()
    add_line(figure, [0, 1], [0, 1], "target", dash="dot", width=1)
    for side, one in result.scores.reliability.items():
        kept = [part for part in zip(one.confidence, one.accuracy, one.counts, strict=True) if part[2]]
        confidence, accuracy, counts = zip(*kept, strict=True)
        shape = {
            "mode": "lines+markers",
            "marker": {"size": [5 + 13 * math.sqrt(n / max(counts)) for n in counts], "opacity": 0.8},
            "customdata": counts,
            "hovertemplate": "confidence %{x:.3f}<br>right %{y:.3f}<br>%{customdata} examples",
        }
        add_line(figure, confidence, accuracy, _SIDES[side], f"{side}, ECE {one.ece:.3f}", **shape)
    return style(figure, "confidence", "share that is right")
