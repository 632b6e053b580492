"""Verdicts: no winner among equals, a winner where there is one, and failed cells that count."""

import json
import math

import numpy as np
import pytest

import whichkl as wk
from whichkl._checks import InputError
from whichkl.study.measures import Need
from whichkl.study.paired import holm, paired, sign_flip
from whichkl.study.verdict import Verdict, decide

JEFFREYS = (Need("overall", ("jeffreys",), "closeness", absolute=1e-9, relative=0.0),)


def rows_of(values, status=None, column="jeffreys", **more):
    """Rows of a study: `values` by arm is a list over seeds; None stands for a failed cell."""
    found = []
    for arm, mine in values.items():
        for seed, value in enumerate(mine):
            row = {"family": "gaussian", "objective": arm, "seed": seed, "evaluations": 1000, "error": None}
            row |= {"status": "failed", "error": "ValueError: no"} if value is None else {"status": "converged", column: value}
            found.append({**row, **{name: one[arm] if isinstance(one, dict) else one for name, one in more.items()}})
    return found


def test_identical_arms_seldom_have_a_winner():
    random, winners = np.random.default_rng(20), 0
    for _ in range(400):
        shared, own = random.normal(size=(10, 4)), random.normal(size=(2, 10, 4))
        rows = [
            {"family": "gaussian", "objective": arm, "seed": seed, "status": "converged", "evaluations": 1.0}
            | dict(zip(("jeffreys", "forward_kl", "reverse_kl", "interval_gap"), 10 + shared[seed] + own[i, seed], strict=True))
            for seed in range(10)
            for i, arm in enumerate("ab")
        ]
        winners += decide(rows).outcome in ("winner", "depends")
    # 29 is what a chance of 5 % in each study leaves behind in 97 % of such experiments
    assert 0 < winners <= 29


@pytest.mark.parametrize("seeds", [8, 10, 20])
def test_a_difference_of_four_standard_errors_is_found(seeds):
    random, found = np.random.default_rng(21), 0
    for _ in range(400):
        noise = random.normal(size=(seeds, 2))
        gap = 4 * math.sqrt(2 / seeds)  # four standard errors of the mean of paired differences, whose sd is √2
        rows = rows_of({"a": list(5 + noise[:, 0]), "b": list(5 + gap + noise[:, 1])})
        verdict = decide(rows, JEFFREYS)
        found += verdict.outcome == "winner" and verdict.winners == ("gaussian · a",)
    assert found >= 0.8 * 400


def test_under_six_seeds_there_is_no_verdict_whatever_the_difference():
    verdict = decide(rows_of({"a": [1.0] * 5, "b": [100.0] * 5}))
    assert verdict.outcome == "too_few_seeds"
    assert not verdict.winners
    assert "it needs at least 6 seeds, and this study has 5." in verdict.sentence
    assert decide(rows_of({"a": [1.0 + s / 9 for s in range(6)], "b": [100.0 - s for s in range(6)]})).outcome == "winner"


def test_failed_cells_are_counted_and_pairs_are_those_that_both_finished():
    good = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0, 1.1, 0.9, 1.0]
    verdict = decide(rows_of({"a": [None, None, *good[2:]], "b": [one + 1 for one in good]}))
    assert verdict.outcome == "winner"
    assert "failed in 2 of 10 seeds" in verdict.sentence
    assert [one.pairs for one in verdict.comparisons] == [8]
    arm = verdict.arms[0]
    assert (arm.cells, arm.finished, arm.failed, arm.error) == (10, 8, 2, "ValueError: no")
    assert "gaussian · b" in verdict.front  # better in mean, but it failed more often: it doesn't dominate
    few = decide(rows_of({"a": [*[None] * 5, *good[5:]], "b": good}))
    assert few.outcome == "too_few_seeds"
    assert "5 cells failed" in few.sentence


def test_where_all_cells_of_all_but_one_arm_failed_there_is_nothing_to_compare():
    verdict = decide(rows_of({"a": [1.0] * 8, "b": [None] * 8}))
    assert verdict.outcome == "failed"
    assert "only gaussian · a finished" in verdict.sentence
    assert decide(rows_of({"a": [None] * 8, "b": [None] * 8})).outcome == "failed"


def test_needs_that_disagree_are_an_outcome_of_their_own():
    random = np.random.default_rng(3)
    rows = rows_of(
        {"forward_kl": list(0.5 + 0.01 * random.normal(size=8)), "reverse_kl": list(7 + random.normal(size=8))},
        column="forward_kl",
    )
    for row in rows:
        row["reverse_kl"] = (2.0 if row["objective"] == "forward_kl" else 0.5) + 0.01 * row["seed"] * (
            row["objective"] == "forward_kl"
        )
    verdict = decide(rows)
    assert verdict.outcome == "depends"
    assert {one.need: one.winner for one in verdict.choices} == {
        "coverage": "gaussian · forward_kl",
        "precision": "gaussian · reverse_kl",
    }
    assert set(verdict.front) == {"gaussian · forward_kl", "gaussian · reverse_kl"}
    assert verdict.sentence.startswith("It depends on what you need: for coverage take gaussian · forward_kl; for precision take")


def test_a_difference_that_does_not_matter_names_no_winner():
    verdict = decide(rows_of({"a": [1 + s / 1e5 for s in range(10)], "b": [1.004 + s / 1e5 + s % 2 / 1e5 for s in range(10)]}))
    (one,) = verdict.comparisons
    assert one.p_adjusted < 1e-6
    assert one.kind == "equal"
    assert verdict.outcome == "no_detectable_difference"
    assert "equal for practical purposes" in verdict.sentence


def test_among_equals_the_cheapest_is_named():
    random = np.random.default_rng(5)
    rows = rows_of({"a": list(random.normal(size=9)), "b": list(random.normal(size=9))}, evaluations={"a": 9000.0, "b": 100.0})
    verdict = decide(rows)
    assert verdict.outcome == "no_detectable_difference"
    assert verdict.front == ("gaussian · b",)
    assert "gaussian · b is the cheapest" in verdict.sentence


def test_infinite_values_are_compared_by_their_sign():
    verdict = decide(rows_of({"a": [1.0] * 8, "b": [math.inf] * 8}, column="forward_kl"))
    assert verdict.outcome == "winner"
    assert verdict.comparisons[0].difference == math.inf
    both = decide(rows_of({"a": [math.inf] * 8, "b": [math.inf] * 8}, column="forward_kl"))
    assert both.outcome == "no_detectable_difference"
    some = decide(rows_of({"a": [1.0] * 8, "b": [math.inf, *[1.0] * 7]}, column="forward_kl"))
    assert some.outcome == "no_detectable_difference"


def test_columns_up_to_different_constants_are_never_mixed():
    rows = rows_of({"a": [1.0] * 8, "b": [2.0] * 8}, column="forward_kl", forward_kl_up_to={"a": None, "b": "entropy_p"})
    verdict = decide(rows)
    assert verdict.outcome == "too_few_seeds"
    assert "different constants" in str(verdict)


def test_more_can_be_better_and_the_needs_are_the_users():
    need = (Need("reach", ("coverage",), "reach", less_is_better=False),)
    verdict = decide(
        rows_of({"a": [0.9 + s / 1000 for s in range(8)], "b": [0.5 - s / 1000 for s in range(8)]}, column="coverage"), need
    )
    assert verdict.winners == ("gaussian · a",)
    assert verdict.comparisons[0].difference == pytest.approx(0.4 + 2 * 3.5 / 1000)
    assert verdict.comparisons[0].low <= verdict.comparisons[0].difference <= verdict.comparisons[0].high


def test_a_verdict_survives_json_and_is_the_same_twice():
    random = np.random.default_rng(1)
    rows = rows_of(
        {"a": list(random.normal(size=14)), "b": [None, math.inf, *random.normal(size=12)], "c": list(random.normal(size=14) + 3)}
    )
    verdict = decide(rows)
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False))) == verdict == decide(rows)
    with pytest.raises(InputError, match="Cannot read a verdict"):
        Verdict.from_dict({"outcome": "winner"})
    with pytest.raises(InputError, match="has seed 0 twice"):
        decide([*rows, rows[0]])


def test_tests_agree_with_their_definitions():
    from itertools import product

    from scipy import stats

    d = np.random.default_rng(2).normal(0.4, 1, size=9)
    assert paired(d[:, None]).p[0] == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    means = [abs(float(np.dot(signs, d))) for signs in product((-1, 1), repeat=9)]
    assert sign_flip(d) == np.mean(np.array(means) >= abs(d.sum()) - 1e-12)
    assert sign_flip(np.ones(20)) == pytest.approx(1 / 4096)
    assert holm(np.array([0.04, 0.01, 0.02])).tolist() == pytest.approx([0.04, 0.03, 0.04])


def test_a_study_has_its_verdict():
    study = wk.compare(wk.problems.bimodal(), seeds=6, metrics=["forward_kl", "reverse_kl", "jeffreys"], draws=500)
    verdict = study.verdict
    assert verdict.outcome == "depends"
    assert {one.need: one.winner for one in verdict.choices if one.need != "overall"} == {
        "coverage": "gaussian · forward_kl",
        "precision": "gaussian · reverse_kl",
    }
