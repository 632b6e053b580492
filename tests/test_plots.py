"""Figures of a fit next to its data: they show what is there, for every kind of fit, and nothing where nothing is."""

import html
import json

import numpy as np
import pandas as pd
import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError
from whichkl.families import Gaussian, GeneralizedLinear, LinearGaussian, Mixture, Product, StudentT
from whichkl.plots import calibration_curves, components_curve, margins, pairs, plot, predictions
from whichkl.plots.rows import data, margin_curve, margin_steps, regions, rows_and_draws
from whichkl.samples import open_stream

RNG = np.random.default_rng(0)
WIDE = RNG.normal(size=(300, 7))
X = RNG.normal(size=(400, 2))
COIN = (RNG.random(400) < 1 / (1 + np.exp(-2 * X[:, 0]))).astype(float)
KINDS = (X @ [[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]] + RNG.gumbel(size=(400, 3))).argmax(1).astype(float)


def shown(figure):
    return json.loads(figure.to_json())["data"]


@pytest.fixture(scope="module")
def gaussian():
    return wk.fit(WIDE[:, :3], Gaussian())


@pytest.mark.parametrize(
    ("rows", "family", "side"),
    [
        (WIDE[:, :2], Gaussian(), 2),
        (WIDE[:, :5], Mixture(2), 5),
        (WIDE, Gaussian("diagonal"), 5),
        (RNG.standard_t(3, size=(200, 2)), StudentT(), 2),
        (np.column_stack([RNG.poisson(2, 200), RNG.gamma(2, size=200)]), Product(), 2),
    ],
)
def test_pairs_show_every_pair_twice_and_every_margin(rows, family, side):
    figure = pairs(wk.fit(rows, family))
    marks = [one for one in shown(figure) if one["type"] == "scatter" and one["mode"] == "markers"]
    bars = [one for one in shown(figure) if one["type"] == "bar"]
    assert len(bars) == side
    assert len(marks) >= side * (side - 1)
    assert {len(one["x"]) for one in marks if len(one["x"]) > 30} == {min(600, len(rows))}


def test_one_column_has_no_pairs_and_no_rows_have_no_figures(gaussian, tmp_path):
    assert pairs(wk.fit(WIDE[:, :1], Gaussian())) is None
    gaussian.save(tmp_path / "fit")
    loaded = wk.Fit.load(tmp_path / "fit")
    assert data(loaded) is None
    assert pairs(loaded) is None
    assert margins(loaded) == []
    text = html.unescape(wk.report(loaded, tmp_path / "r.html").read_text())
    assert "The rows aren't available" in text


def test_regions_hold_what_they_say():
    x = torch.randn(20_000, 2, dtype=torch.float64)
    trace = regions(x, (-4, 4), (-4, 4), "forward_kl")
    inside = torch.tensor(trace.z)
    centre = torch.tensor(trace.x, dtype=torch.float64)
    radius = (centre[:, None].square() + centre[None].square()).sqrt()
    # a plane normal has half of its mass within √(2 ln 2), nine tenths within √(2 ln 10)
    for share in (0.5, 0.9):
        edge = (2 * np.log(1 / (1 - share))) ** 0.5
        assert float((inside[radius < 0.85 * edge] < share).double().mean()) > 0.99
        assert float((inside[radius > 1.15 * edge] > share).double().mean()) > 0.99


@pytest.mark.parametrize("family", [Gaussian(), StudentT(), Mixture(2)])
def test_the_margins_curve_is_the_models_density(family):
    fit = wk.fit(WIDE[:, :1] * 2 + 5, family)
    both = rows_and_draws(fit)
    x, y = margin_curve(fit, both, 0, both.range(0))
    exact = fit.model.log_prob(torch.tensor(x, dtype=torch.float64)[:, None]).exp().tolist()
    assert y == pytest.approx(exact, abs=2e-3)


def test_a_histograms_area_is_the_share_that_it_shows():
    x = torch.as_tensor(WIDE[:, 0])
    _, heights, width = margin_steps(x, (-1.0, 1.0), False)
    assert sum(heights) * width == pytest.approx(float((x.abs() <= 1).double().mean()), abs=1e-4)
    values, shares, _ = margin_steps(torch.tensor([0.0, 1.0, 1.0, 3.0]), (0, 3), True)
    assert (values, shares) == ([0.0, 1.0, 3.0], [0.25, 0.5, 0.25])


def test_margins_of_weighted_rows_follow_the_weights():
    x = np.concatenate([np.zeros((50, 1)), np.ones((50, 1))])
    target = wk.Target(samples=x, weights=np.repeat([3.0, 1.0], 50))
    bar = shown(margins(wk.fit(target, Product("bernoulli")))[0])[0]
    assert bar["y"] == pytest.approx([0.75, 0.25], abs=0.02)


def test_calibration_curves_come_worst_first_and_within_their_bands(gaussian):
    figures, calibration = calibration_curves(gaussian), gaussian.diagnostics.calibration
    assert len(figures) == len(calibration.columns) == 4
    worst = min(calibration.columns, key=lambda one: (one.p_value, -one.distance))
    assert worst.name in figures[0].layout.title.text
    low, high, curve = (np.array(one["y"]) for one in shown(figures[0]))
    assert bool(((curve >= low - 1e-6) & (curve <= high + 1e-6)).all()) == (worst.p_value > 0.05)
    assert calibration_curves(wk.fit(WIDE[:, :3], Gaussian(), judge=False)) == []


def test_the_curve_over_components_marks_the_chosen_number():
    fit = wk.fit(wk.problems.petals(), Mixture("auto"))
    curve, ring = shown(components_curve(fit))
    assert list(curve["x"]) == [count for count, _ in fit.diagnostics.curve]
    assert list(ring["x"]) == [fit.family.components]
    assert components_curve(wk.fit(wk.problems.petals(), Mixture(2))) is None


def test_reliability_shows_chances_and_how_often_they_came_true():
    fit = wk.fit(wk.Target(samples=(X, COIN)), GeneralizedLinear("bernoulli"))
    (figure,) = predictions(fit)
    _, curve = shown(figure)
    assert np.mean(curve["y"]) == pytest.approx(COIN.mean())
    assert np.abs(np.array(curve["x"]) - curve["y"]).max() < 0.25
    (figure,) = predictions(wk.fit(wk.Target(samples=(X, KINDS)), GeneralizedLinear("categorical")))
    assert np.mean(shown(figure)[1]["y"]) == pytest.approx(1 / 3)


def test_predictions_over_one_x_and_against_what_was_observed():
    y = 2 * X[:, 0] + RNG.normal(size=400)
    (figure,) = predictions(wk.fit(wk.Target(samples=(X[:, :1], y)), LinearGaussian()))
    low, high, rows, middle = shown(figure)
    assert np.polyfit(middle["x"], middle["y"], 1)[0] == pytest.approx(2, abs=0.2)
    assert np.mean(np.array(high["y"]) - low["y"]) == pytest.approx(2 * 1.645, abs=0.4)
    assert len(rows["x"]) == 400
    two = predictions(wk.fit(wk.Target(samples=(X, np.column_stack([y, -y + RNG.normal(size=400)]))), LinearGaussian()))
    assert len(two) == 2
    q, seen = shown(two[0])
    at, error = np.array(q["x"]), q["error_y"]
    inside = (np.array(seen["y"]) <= at + error["array"]) & (np.array(seen["y"]) >= at - np.array(error["arrayminus"]))
    assert 0.83 < inside.mean() < 0.96


def test_conditional_fits_are_plotted_reported_and_refused_without_their_rows(tmp_path):
    fit = wk.fit(wk.Target(samples=(X, COIN)), GeneralizedLinear("bernoulli"))
    assert plot(fit).layout.xaxis.title.text.startswith("chance of")
    assert "how often" in wk.report(fit, tmp_path / "r.html").read_text().lower()
    fit.save(tmp_path / "fit")
    loaded = wk.Fit.load(tmp_path / "fit")
    with pytest.raises(InputError, match="keeps none"):
        plot(loaded)
    assert "The rows aren't available" in html.unescape(wk.report(loaded, tmp_path / "again.html").read_text())
    with pytest.raises(InputError, match="one distribution"):
        predictions(wk.fit(WIDE[:, :1], Gaussian()))


def test_reports_stay_below_eight_megabytes_and_say_what_the_loss_is(tmp_path):
    text = wk.report(wk.fit(RNG.normal(size=(3000, 20)), Gaussian()), tmp_path / "r.html").read_text()
    assert len(text.encode()) < 8_000_000
    assert "The loss is the cross-entropy KL(p‖q) + H(p)" in text
    assert "AUC" in text


def test_names_stay_text_in_every_figure(tmp_path):
    evil = '<img src=x onerror="alert(2)">'
    names = [evil, "</script><script>alert(1)</script>", "c"]
    text = wk.report(wk.fit(wk.Target(samples=WIDE[:, :3], names=names)), tmp_path / "r.html").read_text()
    assert "<img" not in text.split("<main>")[1].split("</main>")[0]
    assert "<script>alert" not in text


def test_a_streams_held_rows_are_drawn(tmp_path):
    np.save(tmp_path / "x.npy", WIDE[:, :2])
    fit = wk.fit(wk.Target(samples=open_stream(tmp_path / "x.npy")), Gaussian())
    held = fit.diagnostics.held
    assert held is not None
    assert fit.target.samples is None
    assert len(data(fit)) == len(held)
    assert pairs(fit) is not None


def test_drawing_moves_no_global_generator(gaussian):
    before = torch.get_rng_state()
    pairs(gaussian)
    margins(gaussian)
    assert torch.equal(before, torch.get_rng_state())


def test_fits_of_one_target_are_drawn_over_each_other():
    both = [wk.fit(wk.problems.bimodal(), objective=name) for name in ("forward_kl", "reverse_kl")]
    line = [one for one in shown(plot(both)) if one["name"] != "target p"]
    assert [one["name"] for one in line] == ["forward_kl", "reverse_kl"]
    assert len({one["line"]["color"] for one in line}) == 2 and line[0]["x"] == line[1]["x"]
    for fit, one in zip(both, line, strict=True):
        at = torch.tensor(one["x"], dtype=torch.float64)[:, None]
        assert np.allclose(fit.model.log_prob(at).exp(), one["y"], rtol=1e-3, atol=1e-6)


def test_legends_name_what_differs_and_colours_are_distinct():
    families = [Gaussian(), Mixture(2), StudentT()]
    fits = [wk.fit(wk.problems.petals(), family, judge=False) for family in families]
    traces = [one for one in shown(plot(fits)) if one.get("name") not in (None, "target p")]
    assert [one["name"].split("(")[0] for one in traces if one["type"] == "contour"] == ["StudentT"]
    assert {one["name"].split("(")[0] for one in traces} == {"Gaussian", "Mixture", "StudentT"}
    lines = [{one["line"]["color"] for one in traces if one["name"].startswith(name)} for name in ("Gaussian", "Mixture")]
    assert lines[0].isdisjoint(lines[1])
    twice = [one["name"] for one in shown(plot([fits[0], fits[0]])) if one.get("name") not in (None, "target p")]
    assert len(set(twice)) == len(twice)


def test_intervals_of_several_fits_are_at_different_heights():
    fits = [wk.fit(WIDE, family, judge=False) for family in (Gaussian(), Gaussian("diagonal"))]
    points = [one for one in shown(plot(fits)) if one["mode"] == "markers"]
    assert len(points) == 2 and not set(points[0]["y"]) & set(points[1]["y"])
    ends = [row["high"] for row in fits[0].summary().rows]
    assert np.allclose(np.add(points[0]["x"], points[0]["error_x"]["array"]), ends, rtol=1e-3)


def test_a_coordinate_of_another_unit_has_an_axis_of_its_own():
    scales = [1.0, 1_000.0, 1.0]
    apart = json.loads(plot(wk.fit(WIDE[:, :3] * scales, judge=False)).to_json())
    assert len([name for name in apart["layout"] if name.startswith("xaxis")]) == 3
    shared = json.loads(plot(wk.fit(WIDE[:, :3], judge=False)).to_json())
    assert len([name for name in shared["layout"] if name.startswith("xaxis")]) == 1


def test_labels_of_categories_are_shown_and_their_codes_have_no_interval():
    table = pd.DataFrame({"city": RNG.choice(["Lima", "Oslo", "<b>"], 300), "a": WIDE[:, 0], "b": WIDE[:, 1]})
    fit = wk.fit(wk.Target(samples=table, categories=["city"]), judge=False)
    assert list(plot(fit).layout.yaxis.ticktext) == ["a", "b"]
    assert list(margins(fit)[0].layout.xaxis.ticktext) == ["&lt;b&gt;", "Lima", "Oslo"]
    assert margins(fit)[1].layout.xaxis.ticktext is None
    assert pairs(fit).layout.xaxis7.ticktext == margins(fit)[0].layout.xaxis.ticktext
    for columns in (["city"], ["city", "a"]):
        few = plot(wk.fit(wk.Target(samples=table[columns], categories=["city"]), judge=False))
        assert list(few.layout.xaxis.ticktext) == ["&lt;b&gt;", "Lima", "Oslo"]


def test_an_optimum_near_0_has_no_minus_sign():
    names = [one["name"] for one in shown(plot(wk.fit(wk.problems.bimodal(), objective="reverse_kl"))) if "name" in one]
    assert "q at 0.00 (local)" in names


def test_a_plane_has_one_scale_unless_spreads_differ_much():
    assert plot(wk.fit(X, judge=False)).layout.yaxis.scaleanchor == "x"
    assert plot(wk.fit(X * [1.0, 50.0], judge=False)).layout.yaxis.scaleanchor is None


def test_what_cannot_be_drawn_together_is_named(gaussian):
    conditional = wk.fit(wk.Target(samples=(X, COIN)), GeneralizedLinear("bernoulli"), judge=False)
    for wrong, says in (
        ([gaussian, wk.fit(X, judge=False)], "one is of x1, x2, x3, another of x1, x2"),
        ([conditional], "conditional"),
        ([gaussian, "fit"], "holds something else"),
        ([], "an empty list"),
        ("fit", "a `str`"),
    ):
        with pytest.raises(InputError, match=says):
            plot(wrong)
