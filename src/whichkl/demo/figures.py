"""The figures of the demo's story; they draw what `run` computed."""

from __future__ import annotations

import math
from typing import Any

import torch

from whichkl._checks import require
from whichkl.demo import textbook
from whichkl.demo.run import Schools
from whichkl.plots.fitted import density
from whichkl.plots.style import AXIS, COLORS, Figure, add_area, add_line, add_points, error_bars, new_figure, style
from whichkl.problems.real_data import EFFECTS, ERRORS


def case_curves(case: textbook.Case, x: torch.Tensor) -> Figure:
    """Draw the target, the forward fit and every reverse optimum."""
    figure, grid = new_figure(), x.tolist()
    add_area(figure, grid, case.target.log_prob(x[:, None]).exp().tolist(), "target p")
    add_line(figure, grid, density(case.forward.model, x), "forward_kl", "forward fit", width=2.5)
    for one in case.reverse.diagnostics.optima:
        name = f"reverse at {mean_of(one)} ({'global' if one.is_global else 'local'})"
        dash = "solid" if one.is_global else "dash"
        add_line(figure, grid, density(one.model, x), "reverse_kl", name, width=2.5, dash=dash)
    return style(figure, "x", "density")


def integrand_curves(case: textbook.Case, x: torch.Tensor) -> Figure:
    """Draw the integrands of both divergences, at the forward and at the reverse fit."""
    titles = ("at the forward fit", "at the reverse fit")
    figure = require("plotly.subplots", "app").make_subplots(rows=2, cols=1, subplot_titles=titles, vertical_spacing=0.16)
    names = {"forward_kl": "p log(p/q), area KL(p‖q)", "reverse_kl": "q log(q/p), area KL(q‖p)"}
    for row, which in enumerate(names, 1):
        for (color, name), y in zip(names.items(), textbook.integrands(case, which, x), strict=True):
            place = {"row": row, "col": 1, "legendgroup": name, "showlegend": row == 1, "fill": "tozeroy"}
            add_line(figure, x.tolist(), y, color, name, width=2.5, **place)
    style(figure, "", "nats per unit of x", 520)
    figure.update_layout(margin={"t": 40}, legend={"y": 1.07}, xaxis2={**AXIS, "title": "x"})
    figure.update_layout(yaxis2={**AXIS, "title": "nats per unit of x"})
    return figure


def bifurcation(book: textbook.Textbook) -> Figure:
    """Draw the means of all reverse optima as the bumps move apart."""
    figure = new_figure()
    for is_best, name, symbol in ((True, "global optimum", "circle"), (False, "local optimum", "circle-open")):
        points = [(b.half_distance, mean) for b in book.branches for mean, best in b.means if best is is_best]
        marker = {"line": {"width": 1.5, "color": COLORS["reverse_kl"]}}
        at, means = zip(*points, strict=True)
        add_points(figure, at, means, "reverse_kl", name, symbol=symbol, marker=marker)
    for value, side in ((book.exists_from, "right"), (book.wins_from, "left")):
        figure.add_vline(x=value, line={"color": COLORS["target"], "dash": "dot"})
        figure.add_annotation(x=value, y=4.6, text=f" {value:.2f} ", showarrow=False, xanchor=side)
    return style(figure, "M, half the distance between the bumps (sd 1)", "mean of q", 380)


def school_effects(schools: Schools) -> Figure:
    """Draw each school's effect under q, and what was published."""
    low, middle, high = schools.effects.tolist()
    figure, rows = new_figure(), range(len(EFFECTS))
    published = {"type": "data", "array": [2 * e for e in ERRORS], "thickness": 2, "width": 0}
    add_points(figure, EFFECTS, [i + 0.22 for i in rows], "target", "published effect ± 2 s.e.", error_x=published)
    interval = error_bars(low, middle, high, thickness=3)
    add_points(figure, middle, [*rows], "reverse_kl", "under q, 95 %", size=9, error_x=interval)
    style(figure, "effect on the test score", "", 430)
    labels = [f"school {i + 1}" for i in rows]
    figure.update_yaxes(tickvals=[i + 0.11 for i in rows], ticktext=labels, autorange="reversed")
    return figure


def normal(model: Any) -> str:
    """Write a one-dimensional model as N(mean, standard deviation)."""
    mean, variance = textbook.moments(model)
    return f"N({fixed(mean)}, {math.sqrt(variance):.2f})"


def mean_of(optimum: Any) -> str:
    """Write the mean of an optimum to two decimals."""
    return fixed(textbook.moments(optimum.model)[0])


def fixed(value: float) -> str:
    """Write two decimals, with a true minus sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
