"""Cost: mixtures end soon after their budget, and what is sent to workers doesn't grow with the study."""

import pickle

import torch

import whichkl as wk
from whichkl.study.engines import _Bundles, _Task
from whichkl.study.plan import plan_of
from whichkl.targets.evaluations import Evaluations


def test_a_mixture_ends_soon_after_its_budget():
    asked = {"seeds": 1, "budget": 60_000, "metrics": ["reverse_kl"], "draws": 200}
    (row,) = wk.compare(wk.problems.many_well(8), "mixture:4", "reverse_kl", **asked).rows
    assert row["out_of_budget"]
    assert row["evaluations"] < 110_000  # a round of all starts would take some 250,000


def test_calls_are_cut_only_by_a_budget():
    counts = Evaluations()
    assert counts.calls(1_000, 60) == 60
    with counts.capped(10_000):
        counts["score"] += 4_000
        assert counts.calls(1_000, 60) == 6
        assert counts.calls(10, 60) == 60
        assert counts.calls(0, 60) == 60
        counts["score"] += 9_000
        assert counts.calls(1_000, 60) == 1


def test_bundles_hold_each_cell_once_in_order_and_those_of_a_lost_worker_alone():
    bundles = _Bundles(list(range(1_000)))
    assert bundles.take(2) == (0,)  # nothing is known of a cell's time yet
    bundles.learn([0.1])
    assert bundles.take(2) == tuple(range(1, 11))
    bundles.put_back((5, 6))
    assert [bundles.take(2), bundles.take(2)] == [(5,), (6,)]
    rest = []
    while (bundle := bundles.take(2)) is not None:
        rest += bundle
    assert rest == list(range(11, 1_000))


def test_a_worker_is_sent_the_plan_without_its_cells():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    sizes = []
    for seeds in ([7], list(range(1_000, 1_500))):
        plan = plan_of(x, "gaussian", "forward_kl", seeds)
        assert len(plan.cells) == len(seeds)
        task = pickle.dumps(_Task(plan))
        assert pickle.loads(task).plan.cells == plan.cells  # noqa: S301
        sizes.append(len(task))
    assert sizes[1] < sizes[0] + 4 * 500  # the seeds themselves, of three bytes each


def test_what_lies_between_the_directions_keeps_a_share_of_the_budget_for_itself():
    asked = {"seeds": 1, "budget": 60_000, "metrics": ["reverse_kl"], "draws": 200}
    study = wk.compare(wk.problems.many_well(8), "mixture:4", ["forward_kl", "jeffreys"], **asked)
    forward, between = study.rows
    assert between["out_of_budget"]
    assert between["iterations"] >= 1  # rounds on its own objective, after both directions' optima
    assert between["evaluations"] < 90_000
    assert forward["evaluations"] <= 60_000


def test_a_step_that_the_budget_does_not_hold_ends_it():
    counts = Evaluations()
    assert counts.affords(10**9)
    with counts.capped(100):
        counts["log_prob"] += 60
        assert counts.affords(40)
        assert not counts.is_spent
        with counts.capped(10):
            assert not counts.affords(11)
            assert counts.is_spent
        assert not counts.is_spent
        assert not counts.affords(41)
        assert counts.is_spent
    assert not counts.is_spent
