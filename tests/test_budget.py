"""Budget: solvers whose rounds are long end within them, and cells are given out in the order of the plan."""

import whichkl as wk
from whichkl.evaluations import Evaluations
from whichkl.study.engines import _Bundles, _Sizes


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
    sizes = _Sizes()
    bundles = _Bundles(list(range(1_000)), sizes)
    assert bundles.take(2) == (0,)  # nothing is known of a cell's time yet
    sizes.learn([0.1])
    assert bundles.take(2) == tuple(range(1, 11))
    bundles.put_back((5, 6))
    assert [bundles.take(2), bundles.take(2)] == [(5,), (6,)]
    rest = []
    while (bundle := bundles.take(2)) is not None:
        rest += bundle
    assert rest == list(range(11, 1_000))
