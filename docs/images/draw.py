"""The pictures of the pages on conversions: `python docs/images/draw.py` draws them by Plotly and a headless Chromium."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from plotly.subplots import make_subplots
from torch import Tensor
from torch.distributions import Normal

import whichkl as wk
from whichkl.plots.style import AXIS, COLORS, SOFT

HERE = Path(__file__).parent
WIDE, HIGH = 900, 300


def curve(figure: Any, x: Tensor, y: Tensor, name: str, color: str, column: int) -> None:
    """Draw a density."""
    fill = {"fill": "tozeroy", "fillcolor": SOFT["target"]} if color == "target" else {}
    style = {"color": COLORS[color], "width": 2.4}
    figure.add_scatter(x=x.tolist(), y=y.tolist(), name=name, mode="lines", line=style, row=1, col=column, **fill)


def bars(figure: Any, values: Tensor, weights: Tensor, name: str, column: int) -> None:
    """Draw a histogram of weighted draws as a density."""
    edges = torch.linspace(-4, 4, 49, dtype=torch.float64)
    mass = torch.histogram(values, edges, weight=weights / weights.sum()).hist / (8 / 48)
    color = {"color": COLORS["forward_kl"], "opacity": 0.35}
    figure.add_bar(x=(edges[1:] - 1 / 12).tolist(), y=mass.tolist(), name=name, marker=color, width=1 / 6, row=1, col=column)


def moments() -> Any:
    """A reference, and the nearest laws that have a mean, a mean and a variance."""
    figure = make_subplots(1, 2, subplot_titles=("mean 0.7", "mean 0.7, variance 0.5"))
    grid = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None]
    cases = ((lambda x: x, [0.7]), (lambda x: torch.cat([x, x**2], 1), [0.7, 0.99]))
    for column, (of, values) in enumerate(cases, 1):
        target = wk.convert(wk.Moments(of=of, values=values, reference=Normal(0.0, 1.0)))
        curve(figure, grid[:, 0], Normal(0.0, 1.0).log_prob(grid[:, 0]).exp(), "the reference r", "target", column)
        bars(figure, target.samples[:, 0], target.weights, "its draws, weighted", column)
        curve(figure, grid[:, 0], target.log_prob(grid).exp(), "the target q", "forward_kl", column)
        figure.layout.annotations[column - 1].text += f": KL(q‖r) = {target.origin.kl:.2f} nats"
    return figure


def neither() -> Any:
    """Labels: the model, the draws that passed, and the density that both accesses describe; weights of another law's draws."""
    figure = make_subplots(1, 2, subplot_titles=("draws that passed", "draws of another distribution"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 1, generator=generator, dtype=torch.float64)
    passed = torch.rand(10_000, generator=generator) < torch.sigmoid(4 * (x[:, 0].abs() - 1))
    target = wk.convert(wk.Labels(draws=x, passed=passed, model=Normal(0.0, 1.0)))
    grid = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None]
    normal = Normal(0.0, 1.0).log_prob(grid[:, 0]).exp()
    density = target.log_prob(grid).exp()
    curve(figure, grid[:, 0], normal, "what was drawn from", "target", 1)
    bars(figure, target.samples[:, 0], torch.ones(len(target.samples), dtype=torch.float64), "samples of the target", 1)
    curve(figure, grid[:, 0], density / torch.trapezoid(density, grid[:, 0]), "the target", "forward_kl", 1)
    p = Normal(1.0, 0.6)
    weighted = wk.Target(samples=x, log_weights=p.log_prob(x)[:, 0] + x[:, 0].square() / 2)
    curve(figure, grid[:, 0], normal, "what was drawn from", "target", 2)
    bars(figure, weighted.samples[:, 0], weighted.weights, "samples of the target", 2)
    curve(figure, grid[:, 0], p.log_prob(grid[:, 0]).exp(), "the target", "forward_kl", 2)
    return figure


def write(name: str, figure: Any) -> None:
    """Render a figure to a PNG; equal names have one entry in the legend."""
    seen = set[str]()
    for trace in figure.data:
        trace.showlegend = trace.name not in seen
        seen.add(trace.name)
    layout = {"template": "simple_white", "width": WIDE, "height": HIGH, "margin": {"l": 40, "r": 10, "t": 40, "b": 30}}
    figure.update_layout(**layout, bargap=0, barmode="overlay", font={"size": 12}, legend={"orientation": "h", "y": -0.12})
    figure.update_xaxes(**AXIS)
    figure.update_yaxes(**AXIS, rangemode="tozero")
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chrome"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        figure.write_html(page, include_plotlyjs=True, config={"staticPlot": True})
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
        ]
        command += ["--force-device-scale-factor=1.5", f"--window-size={WIDE + 16},{HIGH + 16}", "--virtual-time-budget=8000"]
        subprocess.run([*command, f"--screenshot={HERE / name}.png", page.as_uri()], check=True, capture_output=True)  # noqa: S603


if __name__ == "__main__":
    for drawn in (moments, neither):
        write(drawn.__name__, drawn())
