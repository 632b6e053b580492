"""The main job: the report's figures against the known truths."""

import json
import math

import pytest

from whichkl.demo import STEPS, run_demo, write_demo

CASES = {
    "½ N(−3, 1) + ½ N(3, 1)": {
        "forward": (0.0, 10.0, 0.461995),
        "reverse": [(-2.98431, 1.02337, 0.688769, True), (2.98431, 1.02337, 0.688769, True), (0.0, 2.74377, 0.840621, False)],
    },
    "½ N(−2, 1) + ½ N(2, 1)": {"forward": (0.0, 5.0, 0.171999), "reverse": [(0.0, 2.04701, 0.226508, True)]},
    "0.7 N(−3, 1) + 0.3 N(3, 1)": {
        "forward": (-1.2, 8.56, 0.466189),
        "reverse": [(-2.99054, 1.01467, 0.354034, True), (2.97337, 1.03793, 1.196682, False)],
    },
}


@pytest.fixture(scope="module")
def demo():
    steps = []
    result = run_demo(steps.append)
    assert steps == list(range(len(STEPS)))
    return result


@pytest.fixture(scope="module")
def numbers(demo, tmp_path_factory):
    page, data = write_demo(demo, tmp_path_factory.mktemp("out"))
    text = page.read_text()
    assert text.count('data-testid="chart"') >= 7
    return json.loads(data.read_text()), text


def test_textbook_figures_agree_with_the_test_bed(numbers):
    cases = {case["target"]: case for case in numbers[0]["textbook"]["cases"]}
    assert cases.keys() == CASES.keys()
    for name, truth in CASES.items():
        case = cases[name]
        mean, variance, forward = truth["forward"]
        assert case["forward_fit"]["mean"] == pytest.approx(mean, abs=1e-9)
        assert case["forward_fit"]["variance"] == pytest.approx(variance, abs=1e-9)
        assert case["divergences"]["forward_kl at the forward_kl fit"] == pytest.approx(forward, abs=6e-7)
        assert case["cross_entropy_at_forward_fit"] - case["entropy_p"] == pytest.approx(forward, abs=6e-7)
        optima = sorted(case["reverse_optima"], key=lambda o: o["mean"])
        for found, (at, sd, loss, best) in zip(optima, sorted(truth["reverse"]), strict=True):
            assert found["mean"] == pytest.approx(at, abs=6e-6)
            assert found["sd"] == pytest.approx(sd, abs=6e-6)
            assert found["reverse_kl"] == pytest.approx(loss, abs=6e-7)
            assert found["global"] is best
    far = cases["½ N(−3, 1) + ½ N(3, 1)"]
    assert far["divergences"]["forward_kl at the reverse_kl fit"] == pytest.approx(7.86, abs=5e-3)


def test_mode_seeking_begins_where_it_is_known_to(numbers):
    seeking = numbers[0]["textbook"]["mode_seeking"]
    assert seeking["one_bump_optimum_exists_from"] == pytest.approx(2.41, abs=0.006)
    assert seeking["one_bump_optimum_is_global_from"] == pytest.approx(2.80, abs=0.006)


def test_one_kl_is_infinite_and_the_reason_is_said(demo, numbers):
    assert demo.textbook.finite.value == pytest.approx(1.085605, abs=6e-7)
    assert demo.textbook.infinite.value == math.inf
    assert demo.textbook.infinite.finite == "infinite"
    assert "of the mass of p lies outside the support of q, at x < 0 and 1 < x" in demo.textbook.infinite.notes[0]
    assert numbers[0]["textbook"]["infinite"][1]["value"] == "inf"
    assert "65.9% of the mass" in numbers[1]


def test_a_mixture_of_two_dissolves_the_difference(demo):
    one, two = demo.textbook.capacity.values()
    assert one["reverse_kl", "forward_kl"].value - one["forward_kl", "forward_kl"].value > 7
    assert all(abs(estimate.value) < 1e-6 for estimate in two.values())


def test_petals_are_fitted_by_forward_kl_between_the_groups(demo):
    fit = demo.petals.fit
    assert fit.advice.best.objective.name == "forward_kl"
    assert fit.value.up_to == "entropy_p"
    assert 0 < fit.value.stderr < 0.2
    low, high = demo.petals.gap
    assert (low, high) == (1.9, 3.0)
    assert demo.petals.gap_mass > 0.15
    assert demo.petals.richer[0].value.value < fit.value.value - 4 * fit.diagnostics.richer_gain.stderr


def test_schools_are_fitted_by_reverse_kl(demo):
    fit = demo.schools.fit
    assert fit.advice.best.objective.name == "reverse_kl"
    assert fit.status == "converged"
    assert fit.diagnostics.elbo.stderr < 0.05
    assert fit.diagnostics.khat < 0.7
    spread = demo.schools.effects[2] - demo.schools.effects[0]
    assert bool((spread > 5).all())


def test_both_directions_are_scored_on_unseen_draws_against_exact_values(demo):
    for one in demo.both:
        exact = demo.textbook.cases[0].table
        name = one.fit.objective.name
        assert abs(one.forward.value - exact[name, "forward_kl"].value) < 4 * one.forward.stderr
        assert abs(one.reverse.value - exact[name, "reverse_kl"].value) < 4 * one.reverse.stderr
        total = exact[name, "forward_kl"].value + exact[name, "reverse_kl"].value
        assert abs(one.jeffreys.value - total) < 4 * one.jeffreys.stderr
        assert one.jeffreys.up_to is None
    forward, reverse = demo.both
    assert forward.coverage > reverse.coverage + 0.3
    assert reverse.precision > forward.precision


def test_neither_is_converted_and_has_ways_on(numbers):
    assert numbers[0]["neither"]["best"] is None
    assert numbers[0]["neither"]["forward_kl"]["value"] < 0.05
    assert numbers[0]["neither"]["origin"]["up_to"] == "temperature" and "temperature" in numbers[1]
    assert len(numbers[0]["neither"]["conversions"]) >= 5
    assert "Cheapest access to acquire" in numbers[1]


def test_the_fourth_section_is_decided_by_a_study(demo, numbers):
    verdict = demo.study.verdict
    assert verdict.outcome == "depends"
    assert {one.need: one.winner for one in verdict.choices} == {
        "overall": "gaussian · forward_kl",
        "coverage": "gaussian · forward_kl",
        "precision": "gaussian · reverse_kl",
        "calibration": "gaussian · forward_kl",
    }
    by = {(one.need, one.other): one.difference for one in verdict.comparisons}
    # exact: 7.86 − 0.462 and 0.938 − 0.689 nats
    assert by["coverage", "gaussian · reverse_kl"] == pytest.approx(7.398, abs=0.5)
    assert by["precision", "gaussian · forward_kl"] == pytest.approx(0.249, abs=0.1)
    assert verdict.sentence in numbers[1]
    assert numbers[0]["study"]["verdict"]["outcome"] == "depends"
