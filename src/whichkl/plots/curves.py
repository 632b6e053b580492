"""Curves of what a solver or a check recorded: losses, held-out scores, calibration and reliability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from whichkl.distillation import Distillation, LanguageDistillation
from whichkl.divergences import Estimate
from whichkl.families import Mixture
from whichkl.fitting import Fit
from whichkl.goodness.transform import levels
from whichkl.plots.style import (
    COLORS,
    MAX_LEGEND_LENGTH,
    Figure,
    add_band,
    add_line,
    add_points,
    color_of,
    new_figure,
    short,
    small,
    style,
)
from whichkl.printable import shorten

_MAX_FIGURES = 12
_SIDES = {"student": "forward_kl", "teacher": "target"}
"""Colours of both sides."""
_DASHES = ("solid", "dash", "dot", "dashdot")


def calibration_curves(fit: Fit, most: int = _MAX_FIGURES) -> list[Figure]:
    """Draw, for each column, the distribution function of u = F_q(x) on unseen rows less its diagonal, with its 95 % band.

    The band is simultaneous: under a right model all curves of all columns stay inside with 95 % chance. The worst column comes
    first; the list is empty where the fit wasn't calibrated.
    """
    calibration = fit.diagnostics.calibration
    if calibration is None or calibration.p_value is None:
        return []
    z, figures = levels(), []
    x = [0.0, *z.tolist(), 1.0]
    for one in sorted(calibration.columns, key=lambda one: (one.p_value, -one.distance))[:most]:
        figure = new_figure()
        low, high, y = ([0.0, *(value - z).tolist(), 0.0] for value in (*one.band, one.curve))
        add_band(figure, x, low, high, "target")
        add_line(figure, x, y, "reverse_kl" if one.differs else fit.objective.name, one.name)
        small(figure, f"{one.name}, p = {one.p_value:.2g}", "u" if len(calibration.columns) == 1 else "")
        reach = max(0.02, *map(abs, y), *high)
        figure.update_yaxes(range=[-1.15 * reach, 1.15 * reach], nticks=5)
        figure.update_xaxes(range=[0, 1], nticks=6)
        figures.append(figure)
    return figures


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


def training(histories: Mapping[str, Sequence[float]]) -> Figure | None:
    """Draw the best loss of each arm over the iterations of its solver; None where no solver recorded it."""
    known = {arm: losses for arm, losses in histories.items() if any(map(math.isfinite, losses))}
    if not known:
        return None
    figure = new_figure()
    for i, (arm, losses) in enumerate(known.items()):
        step = max(1, len(losses) // 400)
        rounds = [k for k in range(0, len(losses), step) if math.isfinite(losses[k])]
        y, dash = [losses[k] for k in rounds], _DASHES[i % len(_DASHES)]
        add_line(figure, [k + 1 for k in rounds], y, color_of(arm), shorten(arm, MAX_LEGEND_LENGTH), dash=dash)
    return style(figure, "iteration", "best loss, nats", 340)


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


def language_curves(result: LanguageDistillation) -> list[Figure]:
    """Draw both KLs over training; of sequences, then the entropy and the length of the student's continuations."""
    curve, figures = result.curve, [new_figure()]
    for name in ("forward_kl", "reverse_kl"):
        known = [(one.step, getattr(one.found, name)) for one in curve]
        _add_estimates(figures[0], [(step, one) for step, one in known if one is not None], name)
    small(figures[0], f"KL, nats a {result.after.per}", "step", height=260)
    figures[0].update_yaxes(rangemode="tozero")
    for name, unit in (("entropy", "nats"), ("length", "tokens")):
        measures = [(one.step, getattr(one.found, "measures", {})) for one in curve]
        figure, points = new_figure(), [(step, found[name]) for step, found in measures if name in found]
        if not points:
            continue
        _add_estimates(figure, [(step, one.student) for step, one in points], "other")
        teacher = points[-1][1].teacher.value
        add_line(figure, [points[0][0], points[-1][0]], [teacher, teacher], "target", dash="dot")
        figures.append(small(figure, f"{name} of continuations, {unit}", "step", height=260))
    return figures


def _add_estimates(figure: Figure, points: Sequence[tuple[int, Estimate]], color: str) -> None:
    """Draw a line through estimates, with a standard error to both sides; infinite ones are left out."""
    kept = [(step, one) for step, one in points if math.isfinite(one.value)]
    error = {"type": "data", "array": short([one.stderr for _, one in kept]), "thickness": 1.5, "width": 4}
    shape: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 7}, "error_y": error}
    add_line(figure, [step for step, _ in kept], [one.value for _, one in kept], color, **shape)


def logged_losses(losses: Sequence[float]) -> Figure:
    """Draw losses that were logged at equal distances."""
    figure = new_figure()
    add_line(figure, list(range(1, len(losses) + 1)), losses, "forward_kl")
    return style(figure, "logged", "loss, nats a token", 280)
