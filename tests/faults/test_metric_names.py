"""Metric names: a metric of the user's own can't overwrite a column of the scorecard, nor another metric."""

import functools

import numpy as np
import pytest

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError
from whichkl.study.measures import FIELDS, MEASURES

ROWS = np.random.default_rng(0).normal(size=(60, 2))
TAKEN = [*FIELDS, *(name for name in MEASURES if name not in FIELDS), "details", "training", "khat_up_to", "mmd_reliable"]


def metric(name, value=1.0):
    def own(model, draws):
        return value

    own.__name__ = name
    return own


def compare(*metrics):
    return wk.compare(ROWS, "gaussian", seeds=1, metrics=["forward_kl", *metrics])


@pytest.mark.parametrize("name", TAKEN)
def test_a_metric_with_the_name_of_a_column_is_refused(name):
    said = rf"Cannot measure by `{name}` \(.*test_metric_names.py, line \d+\): a column .*`{name}`"
    with pytest.raises(InputError, match=said):
        compare(metric(name, 123.0))


@pytest.mark.parametrize("name", ["mine", "metric", "<lambda>"])
def test_two_metrics_of_one_name_are_refused(name):
    with pytest.raises(InputError, match=rf"it has the name of `{name}`.*Rename one of them"):
        compare(metric(name), metric(name, 2.0))


def test_a_metric_given_twice_and_two_without_a_name_are_refused():
    one = metric("mine")
    with pytest.raises(InputError, match="it has the name of `mine`"):
        compare(one, one)
    with pytest.raises(InputError, match="it has the name of `metric`"):
        compare(functools.partial(one), functools.partial(one))


def test_metrics_with_names_of_their_own_keep_their_columns():
    (row,) = compare(metric("mine", 1.0), metric("yours", 2.0), functools.partial(metric("ours", 3.0))).rows
    assert (row["mine"], row["yours"], row["metric"]) == (1.0, 2.0, 3.0)
    assert row["status"] == "converged" and row["seed"] == 0 and 1 < row["forward_kl"] < 5


STUDY = 'target: "Normal(0, 1)"\nfamilies: gaussian\nobjectives: forward_kl\nseeds: 1\ndraws: 200\n'
REFUSED = {
    "column": ("- forward_kl\n- m.py:status\n", "line 8: Cannot measure by `status`", "m.py, line 1"),
    "two files": ("- m.py:mine\n- n.py:mine\n", "line 8: Cannot measure by `mine`", "m.py, line 2"),
    "two folders": ("- m.py:mine\n- sub/m.py:mine\n", "line 8: Cannot measure by `mine`", "sub/m.py"),
    "another name for a function": ("- m.py:alias\n", "line 7: Cannot measure by `seed`", "m.py, line 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_study_in_a_file_is_refused_with_the_line_and_both_names(case, tmp_path):
    (tmp_path / "sub").mkdir()
    own = [f"def {name}(model, draws): return 7.0" for name in ("status", "mine", "seed")]
    (tmp_path / "m.py").write_text("\n".join([*own, "alias = seed"]))
    for other in ("n.py", "sub/m.py"):
        (tmp_path / other).write_text("def mine(model, draws): return 2.0\n")
    metrics, *said = REFUSED[case]
    (tmp_path / "s.yaml").write_text(f"{STUDY}metrics:\n{metrics}")
    done = whichkl("compare", "s.yaml", "--out", "o", cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "o").exists()
    assert all(one in done.stderr for one in said), done.stderr


def test_a_study_in_a_file_fills_a_column_for_each_metric(tmp_path):
    (tmp_path / "m.py").write_text("def mine(model, draws): return 1.0\n")
    (tmp_path / "n.py").write_text("def yours(model, draws): return {'a': 2.0}\n")
    (tmp_path / "s.yaml").write_text(f"{STUDY}metrics: [forward_kl, m.py:mine, n.py:yours]\n")
    assert whichkl("compare", "s.yaml", "--out", "o", cwd=tmp_path).returncode == 0
    (row,) = wk.study.Study.load(tmp_path / "o").rows
    assert (row["mine"], row["yours.a"]) == (1.0, 2.0)
