"""The textbook experiment: two bumps, one Gaussian, both directions, every optimum, and where reverse KL covers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, Uniform

from whichkl._checks import require
from whichkl.diagnostics import model_target
from whichkl.divergences import Estimate
from whichkl.divergences.exact import quadrature
from whichkl.families import Gaussian, Mixture
from whichkl.fitting import Fit, fit
from whichkl.plots.fitted import density
from whichkl.plots.style import AXIS, COLORS, Figure, add_area, add_line, add_points, new_figure, style
from whichkl.problems import bimodal
from whichkl.solvers import NaturalGradient
from whichkl.targets import Target

CASES = ((3.0, 0.5), (2.0, 0.5), (3.0, 0.7))
Table = dict[tuple[str, str], Estimate]
"""(fit, divergence) → value, exact; fits and divergences are named forward_kl and reverse_kl."""
Means = list[tuple[float, bool]]
"""The mean of each optimum, and whether it is the global one."""
_SOLVER = NaturalGradient(max_iterations=30)


@dataclass(frozen=True)
class Case:
    """One target with both fits, and both divergences at each fit."""

    half_distance: float
    left_weight: float
    target: Target
    forward: Fit
    reverse: Fit
    table: Table
    entropy: float
    cross_entropy: float

    @property
    def label(self) -> str:
        """The target in words, N(m, s) with the standard deviation."""
        m, w = f"{self.half_distance:g}", self.left_weight
        left, right = ("½", "½") if w == 0.5 else (f"{w:g}", f"{1 - w:g}")
        return f"{left} N(−{m}, 1) + {right} N({m}, 1)"

    def to_dict(self) -> dict[str, object]:
        """Return the numbers as JSON can hold them."""
        mean, variance = moments(self.forward.model)
        optima = []
        for one in self.reverse.diagnostics.optima:
            at, spread = moments(one.model)
            is_fit = one.model is self.reverse.model
            q = model_target(one.model, self.target)
            forward = self.table["reverse_kl", "forward_kl"] if is_fit else quadrature.kl(self.target, q)
            values = {"mean": at, "sd": math.sqrt(spread), "reverse_kl": one.loss, "forward_kl": forward.value}
            optima.append({**values, "global": one.is_global})
        return {
            "target": self.label,
            "forward_fit": {"mean": mean, "variance": variance},
            "reverse_optima": optima,
            "divergences": _named(self.table),
            "entropy_p": self.entropy,
            "cross_entropy_at_forward_fit": self.cross_entropy,
        }


@dataclass(frozen=True)
class Textbook:
    """The results of the textbook experiment."""

    cases: list[Case]
    branches: dict[float, Means]
    """The reverse-KL optima of ½N(−M,1)+½N(M,1) by M."""
    exists_from: float
    """The M from which a one-bump optimum exists."""
    wins_from: float
    """The M from which it is the global one."""
    finite: Estimate
    infinite: Estimate
    capacity: dict[int, Table]
    """Both divergences at both fits of a mixture, by its number of components."""

    def to_dict(self) -> dict[str, object]:
        """Return the numbers as JSON can hold them; infinities as text."""
        capacity = [{"components": components, **_named(table)} for components, table in self.capacity.items()]
        seeking = {"one_bump_optimum_exists_from": self.exists_from, "one_bump_optimum_is_global_from": self.wins_from}
        infinite = [self.finite.to_dict(), self.infinite.to_dict()]
        cases = [case.to_dict() for case in self.cases]
        return {"cases": cases, "mode_seeking": seeking, "infinite": infinite, "capacity": capacity}


def cases() -> Iterator[Case]:
    """Fit the three targets of the textbook picture."""
    for half_distance, weight in CASES:
        target = Target.of(bimodal(half_distance, weight))
        forward, reverse = fit(target, objective="forward_kl"), fit(target, objective="reverse_kl")
        x, w = quadrature.expectation_rule(target)
        entropy = -float(w @ target.log_prob(x))
        cross_entropy = -float(w @ forward.model.log_prob(x))
        yield Case(half_distance, weight, target, forward, reverse, divergences(target, forward, reverse), entropy, cross_entropy)


def divergences(target: Target, forward: Fit, reverse: Fit) -> Table:
    """Both divergences at both fits, by quadrature."""
    table = {}
    for name, one in (("forward_kl", forward), ("reverse_kl", reverse)):
        q = model_target(one.model, target)
        table[name, "forward_kl"] = quadrature.kl(target, q)
        table[name, "reverse_kl"] = quadrature.kl(q, target, "reverse_kl")
    return table


def integrands(case: Case, which: str, x: Tensor) -> tuple[list[float], list[float]]:
    """P log(p/q) and q log(q/p) on a grid, at the forward or the reverse fit; their areas are the two divergences."""
    model: Distribution = (case.forward if which == "forward_kl" else case.reverse).model
    log_p, log_q = case.target.log_prob(x[:, None]), model.log_prob(x[:, None])
    return (log_p.exp() * (log_p - log_q)).tolist(), (log_q.exp() * (log_q - log_p)).tolist()


def branches() -> dict[float, Means]:
    """Every reverse-KL optimum as the two bumps move apart."""
    return {m: _optima(m) for m in torch.linspace(1.0, 4.0, 31, dtype=torch.float64, device="cpu").tolist()}


def _optima(half_distance: float) -> Means:
    optima = _SOLVER.solve(Target.of(bimodal(half_distance)), Gaussian(), seed=0).optima
    return [(moments(one.model)[0], one.is_global) for one in optima]


def thresholds() -> tuple[float, float]:
    """Return the M where a one-bump optimum first exists, and where it first beats the centred one, to 0.0005."""
    exists = _bisect(lambda means: any(abs(m) > 0.5 for m, _ in means), 2.0, 2.8)
    return exists, _bisect(lambda means: any(abs(m) > 0.5 and best for m, best in means), 2.5, 3.2)


def infinity() -> tuple[Estimate, Estimate]:
    """KL(U‖N) and KL(N‖U) for U = Uniform(0, 1), N = N(0, 1): finite one way, infinite the other, with the reason."""
    one = torch.tensor(1.0, dtype=torch.float64, device="cpu")
    uniform, normal = Target.of(Uniform(0 * one, one)), Target.of(Normal(0 * one, one))
    return quadrature.kl(uniform, normal), quadrature.kl(normal, uniform, "reverse_kl")


def capacity(one: Case) -> dict[int, Table]:
    """Both directions with one Gaussian, as in this case, and with two."""
    fits = (fit(one.target, Mixture(2), objective=name) for name in ("forward_kl", "reverse_kl"))
    return {1: one.table, 2: divergences(one.target, *fits)}


def _named(table: Table) -> dict[str, float]:
    return {f"{divergence} at the {fitted} fit": value.value for (fitted, divergence), value in table.items()}


def moments(model: Distribution) -> tuple[float, float]:
    """Mean and variance of a one-dimensional model."""
    return float(model.mean[0]) + 0.0, float(model.variance[0])


def _bisect(holds: Callable[[Means], bool], low: float, high: float) -> float:
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(_optima(middle)) else (middle, high)
    return round((low + high) / 2, 4)


def case_curves(case: Case, x: Tensor) -> Figure:
    """Draw the target, the forward fit and every reverse optimum."""
    figure, grid = new_figure(), x.tolist()
    add_area(figure, grid, case.target.log_prob(x[:, None]).exp().tolist(), "target p")
    add_line(figure, grid, density(case.forward.model, x), "forward_kl", "forward fit", width=2.5)
    for one in case.reverse.diagnostics.optima:
        name = f"reverse at {mean_of(one)} ({'global' if one.is_global else 'local'})"
        dash = "solid" if one.is_global else "dash"
        add_line(figure, grid, density(one.model, x), "reverse_kl", name, width=2.5, dash=dash)
    return style(figure, "x", "density")


def integrand_curves(case: Case, x: Tensor) -> Figure:
    """Draw the integrands of both divergences, at the forward and at the reverse fit."""
    titles = ("at the forward fit", "at the reverse fit")
    figure = require("plotly.subplots", "app").make_subplots(rows=2, cols=1, subplot_titles=titles, vertical_spacing=0.16)
    names = {"forward_kl": "p log(p/q), area KL(p‖q)", "reverse_kl": "q log(q/p), area KL(q‖p)"}
    for row, which in enumerate(names, 1):
        for (color, name), y in zip(names.items(), integrands(case, which, x), strict=True):
            place = {"row": row, "col": 1, "legendgroup": name, "showlegend": row == 1, "fill": "tozeroy"}
            add_line(figure, x.tolist(), y, color, name, width=2.5, **place)
    style(figure, "", "nats per unit of x", 520)
    figure.update_layout(margin={"t": 40}, legend={"y": 1.07}, xaxis2={**AXIS, "title": "x"})
    figure.update_layout(yaxis2={**AXIS, "title": "nats per unit of x"})
    return figure


def bifurcation(book: Textbook) -> Figure:
    """Draw the means of all reverse optima as the bumps move apart."""
    figure = new_figure()
    for is_best, name, symbol in ((True, "global optimum", "circle"), (False, "local optimum", "circle-open")):
        points = [(m, mean) for m, means in book.branches.items() for mean, best in means if best is is_best]
        marker = {"line": {"width": 1.5, "color": COLORS["reverse_kl"]}}
        at, means = zip(*points, strict=True)
        add_points(figure, at, means, "reverse_kl", name, symbol=symbol, marker=marker)
    for value, side in ((book.exists_from, "right"), (book.wins_from, "left")):
        figure.add_vline(x=value, line={"color": COLORS["target"], "dash": "dot"})
        figure.add_annotation(x=value, y=4.6, text=f" {value:.2f} ", showarrow=False, xanchor=side)
    return style(figure, "M, half the distance between the bumps (sd 1)", "mean of q", 380)


def normal(model: Any) -> str:
    """Write a one-dimensional model as N(mean, standard deviation)."""
    mean, variance = moments(model)
    return f"N({fixed(mean)}, {math.sqrt(variance):.2f})"


def mean_of(optimum: Any) -> str:
    """Write the mean of an optimum to two decimals."""
    return fixed(moments(optimum.model)[0])


def fixed(value: float) -> str:
    """Write two decimals, with a true minus sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
