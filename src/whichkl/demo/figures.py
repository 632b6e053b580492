"""The figures of the demo's story; they draw what `run` computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from whichkl._checks import require
from whichkl.demo import textbook
from whichkl.demo.run import Demo
from whichkl.plots import COLORS, Curve, density, lines, style
from whichkl.problems.eight_schools import EFFECTS, ERRORS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def case_curves(case: textbook.Case, x: torch.Tensor) -> Figure:
    """The target, the forward fit and every reverse optimum, as curves."""
    grid = x.tolist()
    curves = [Curve("target p", grid, case.target.log_prob(x[:, None]).exp().tolist(), "target", fill=True)]
    curves.append(Curve("forward fit", grid, density(case.forward.model, x), "forward_kl"))
    for one in case.reverse.diagnostics.optima:
        kind = "global" if one.is_global else "local"
        name = f"reverse at {mean_of(one)} ({kind})"
        curves.append(Curve(name, grid, density(one.model, x), "reverse_kl", "solid" if one.is_global else "dash"))
    return lines(curves, "x", "density")


def integrand_curves(case: textbook.Case, x: torch.Tensor) -> Figure:
    """Where both divergences are paid, at the forward and at the reverse fit."""
    make = require("plotly.subplots", "app").make_subplots
    figure = make(rows=2, cols=1, subplot_titles=("at the forward fit", "at the reverse fit"), vertical_spacing=0.16)
    for row, which in enumerate(("forward_kl", "reverse_kl"), 1):
        values = textbook.integrands(case, which, x)
        names = ("p log(p/q), area KL(p‖q)", "q log(q/p), area KL(q‖p)")
        for name, color, y in zip(names, ("forward_kl", "reverse_kl"), values, strict=True):
            shown = [float(f"{v:.5g}") for v in y]
            line = {"color": COLORS[color], "width": 2.5, "simplify": False}
            figure.add_scatter(
                x=x.tolist(), y=shown, name=name, legendgroup=name, showlegend=row == 1, line=line, fill="tozeroy", row=row, col=1
            )
    style(figure, "", "nats per unit of x", 520)
    axes = {"gridcolor": figure.layout.yaxis.gridcolor, "zeroline": False}
    figure.update_layout(margin={"t": 40}, xaxis2={**axes, "title": "x"}, yaxis2={**axes, "title": "nats per unit of x"})
    figure.update_layout(legend={"y": 1.07})
    return figure


def bifurcation(demo: Demo) -> Figure:
    """Means of all reverse optima as the bumps move apart."""
    go = require("plotly.graph_objects", "app")
    figure = go.Figure()
    for best, name, symbol in ((True, "global optimum", "circle"), (False, "local optimum", "circle-open")):
        points = [(b.half_distance, m) for b in demo.textbook.branches for m, is_best in b.means if is_best is best]
        marker = {
            "color": COLORS["reverse_kl"],
            "size": 8,
            "symbol": symbol,
            "line": {"width": 1.5, "color": COLORS["reverse_kl"]},
        }
        figure.add_scatter(x=[p[0] for p in points], y=[round(p[1], 5) for p in points], mode="markers", name=name, marker=marker)
    notes = ((demo.textbook.exists_from, "right"), (demo.textbook.wins_from, "left"))
    for value, side in notes:
        figure.add_vline(x=value, line={"color": COLORS["target"], "dash": "dot"})
        figure.add_annotation(x=value, y=4.6, text=f" {value:.2f} ", showarrow=False, xanchor=side)
    return style(figure, "M, half the distance between the bumps (sd 1)", "mean of q", 380)


def school_effects(demo: Demo) -> Figure:
    """Each school's effect under q, beside what was published."""
    go = require("plotly.graph_objects", "app")
    low, middle, high = demo.schools.effects.tolist()
    names = [f"school {i + 1}" for i in range(len(EFFECTS))]
    figure = go.Figure()
    published = {"type": "data", "array": [2 * e for e in ERRORS], "thickness": 2, "width": 0}
    figure.add_scatter(
        x=list(EFFECTS),
        y=names,
        error_x=published,
        mode="markers",
        name="published effect ± 2 s.e.",
        marker={"color": COLORS["target"], "size": 8},
    )
    spread = {"type": "data", "symmetric": False, "thickness": 3, "width": 0}
    spread["array"] = [round(h - m, 3) for h, m in zip(high, middle, strict=True)]
    spread["arrayminus"] = [round(m - lo, 3) for lo, m in zip(low, middle, strict=True)]
    figure.add_scatter(
        x=[round(m, 3) for m in middle],
        y=[*range(len(names))],
        error_x=spread,
        mode="markers",
        name="under q, 95 %",
        marker={"color": COLORS["reverse_kl"], "size": 9},
    )
    figure.data[0].y = [i + 0.22 for i in range(len(names))]
    style(figure, "effect on the test score", "", 430)
    figure.update_yaxes(tickvals=[i + 0.11 for i in range(len(names))], ticktext=names, autorange="reversed")
    return figure


def mean_of(optimum: Any) -> str:
    """The mean of an optimum, to two decimals."""
    return fixed(textbook.moments(optimum.model)[0])


def fixed(value: float) -> str:
    """Two decimals, with a true minus sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
