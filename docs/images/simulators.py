"""Draw simulators.png: python docs/images/simulators.py (needs chromium, and a minute)."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from plotly.subplots import make_subplots

import whichkl as wk
from whichkl.goodness.transform import levels
from whichkl.plots.style import AXIS, COLORS, SOFT

SD = 0.1
OBSERVED, UNLIKE = [0.5, 0.2], [1.6, 1.6]
BLUE, GREY, ORANGE = (COLORS[name] for name in ("forward_kl", "target", "reverse_kl"))


def simulate(theta):
    mean = torch.stack([theta.sum(1).abs(), theta[:, 0] - theta[:, 1]], 1)
    return mean + SD * torch.randn_like(mean)


def exact(x, y):
    """The posterior density at OBSERVED on a grid, up to a constant."""
    first, second = np.meshgrid(x, y)
    gap = (np.abs(first + second) - OBSERVED[0]) ** 2 + (first - second - OBSERVED[1]) ** 2
    return np.exp(-gap / (2 * SD**2))


def main():
    prior = torch.distributions.Uniform(-torch.ones(2), torch.ones(2))
    target = wk.convert(wk.Simulator(prior=prior, simulate=simulate), n=10_000)
    fit = wk.fit(target, wk.families.Flow())
    print(fit)
    p = [target.origin.unlikeness(x) for x in (OBSERVED, UNLIKE)]
    torch.manual_seed(0)
    theta = fit.model([OBSERVED]).sample((1_500,))[:, 0]
    titles = ("Simulated data, two observations", "Posterior of the blue one", "Calibration on unseen simulations")
    figure = make_subplots(1, 3, subplot_titles=titles, horizontal_spacing=0.08)
    dots = {"color": GREY, "size": 2.5, "opacity": 0.5}
    some = target.context[:3_000]
    figure.add_scatter(x=some[:, 0], y=some[:, 1], mode="markers", marker=dots, row=1, col=1)
    for x, color, value in ((OBSERVED, BLUE, p[0]), (UNLIKE, ORANGE, p[1])):
        figure.add_scatter(x=x[:1], y=x[1:], mode="markers", marker={"color": color, "size": 11}, row=1, col=1)
        label = {"text": f"<b>p = {value:.1g}</b>", "font": {"color": color}, "bgcolor": "white", "showarrow": False}
        figure.add_annotation(x=x[0], y=x[1] - 0.3, **label, row=1, col=1)
    grid = np.linspace(-1, 1, 241)
    lines = {"start": 0.1, "end": 0.9, "size": 0.4, "coloring": "none"}
    figure.add_scatter(x=theta[:, 0], y=theta[:, 1], mode="markers", marker={**dots, "color": BLUE, "size": 3}, row=1, col=2)
    figure.add_contour(x=grid, y=grid, z=exact(grid, grid), contours=lines, line={"color": "#333", "width": 1.5}, row=1, col=2)
    z = levels()
    first = fit.diagnostics.calibration.columns[0]
    low, high = (np.asarray(end) - z for end in first.band)
    figure.add_scatter(x=z, y=high, line={"width": 0}, row=1, col=3)
    figure.add_scatter(x=z, y=low, line={"width": 0}, fill="tonexty", fillcolor=SOFT["target"], row=1, col=3)
    for one, dash in zip(fit.diagnostics.calibration.columns, ("solid", "dash", "dot"), strict=True):
        line = {"color": ORANGE if one.differs else BLUE, "dash": dash, "width": 2}
        figure.add_scatter(x=z, y=np.asarray(one.curve) - z, line=line, name=one.name, showlegend=True, row=1, col=3)
    figure.update_traces(showlegend=False, selector=lambda trace: trace.name is None)
    figure.update_xaxes(**AXIS).update_yaxes(**AXIS)
    for column, (x, y) in enumerate((("x1", "x2"), ("theta1", "theta2"), ("u", "share below u, less u")), 1):
        figure.update_xaxes(title=x, row=1, col=column).update_yaxes(title=y, row=1, col=column)
    figure.update_yaxes(range=[-0.06, 0.06], row=1, col=3)
    legend = {"x": 0.99, "y": 0.98, "xanchor": "right", "bgcolor": "rgba(255,255,255,0.7)"}
    margin = {"t": 40, "l": 10, "r": 10, "b": 10}
    figure.update_layout(template="plotly_white", width=1200, height=400, legend=legend, margin=margin)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        out = Path(__file__).with_suffix(".png")
        shot = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        subprocess.run([*shot, "--window-size=1220,420", f"--screenshot={out}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()
