"""Draw comparisons.png: python docs/images/comparisons.py (needs chromium, and a minute)."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from plotly.subplots import make_subplots

import whichkl as wk
from whichkl.plots.style import AXIS, COLORS

PAIRS, SHOWN = 2_000, 150
BLUE, GREY, ORANGE = (COLORS[name] for name in ("forward_kl", "target", "reverse_kl"))
D = torch.float64


def moon(x):
    return -((x.norm(dim=-1) - 2) / 0.5).square() / 2 - ((x[:, 0] - 2) / 0.9).square() / 2


def main():
    g = torch.Generator().manual_seed(1)
    a, b = 7 * torch.rand(2, PAIRS, 2, generator=g, dtype=D) - 3.5
    wins = (torch.rand(PAIRS, generator=g, dtype=D) < torch.sigmoid(moon(a) - moon(b)))[:, None]
    winners, losers = torch.where(wins, a, b), torch.where(wins, b, a)
    target = wk.convert(wk.Comparisons(winners=winners, losers=losers))
    print(target)
    fit = wk.fit(target, wk.families.Mixture(4), objective="reverse_kl")
    print(fit)
    titles = (f"{SHOWN} of {PAIRS:,} answers", "The density of all answers", "Draws of the fit to it")
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.06)
    for won, lost in zip(winners[:SHOWN], losers[:SHOWN], strict=True):
        figure.add_scatter(
            x=[lost[0], won[0]], y=[lost[1], won[1]], mode="lines", line={"color": GREY, "width": 0.5}, row=1, col=1
        )
    for points, color in ((losers, ORANGE), (winners, BLUE)):
        dots = {"color": color, "size": 5}
        figure.add_scatter(x=points[:SHOWN, 0], y=points[:SHOWN, 1], mode="markers", marker=dots, row=1, col=1)
    line = torch.linspace(-3.5, 3.5, 201, dtype=D)
    x = torch.cartesian_prod(line, line)
    for values, color, width in ((moon(x), "#333", 1.5), (target.log_prob(x).detach(), BLUE, 2)):
        z = (values - values.max()).exp().view(201, 201).T
        lines = {"start": 0.1, "end": 0.9, "size": 0.4, "coloring": "none"}
        figure.add_contour(x=line, y=line, z=z, contours=lines, line={"color": color, "width": width}, row=1, col=2)
    torch.manual_seed(0)
    draws = np.asarray(fit.model.sample((1_500,)))
    dots = {"color": BLUE, "size": 2.5, "opacity": 0.6}
    figure.add_scatter(x=draws[:, 0], y=draws[:, 1], mode="markers", marker=dots, row=1, col=3)
    figure.update_xaxes(**AXIS, range=[-3.5, 3.5], title="x1").update_yaxes(**AXIS, range=[-3.5, 3.5])
    figure.update_yaxes(title="x2", row=1, col=1)
    figure.update_layout(
        template="plotly_white", width=1200, height=420, showlegend=False, margin={"t": 40, "l": 10, "r": 10, "b": 10}
    )
    figure.update_traces(showscale=False, selector={"type": "contour"})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        out = Path(__file__).with_suffix(".png")
        shot = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        subprocess.run([*shot, "--window-size=1220,440", f"--screenshot={out}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
