"""Estimates of rows with columns of labels: one code per label on both sides, and the chain rule for columns of numbers."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Categorical

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError

SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def table(shares, n=2000, seed=0, shift=0.0):
    """Rows of a city, and of a number whose mean is `shift` times the place of the city in the alphabet."""
    rng = np.random.default_rng(seed)
    city = rng.choice(list(shares), n, p=list(shares.values()))
    return pd.DataFrame({"city": city, "size": rng.normal(size=n) + shift * (np.array([*map(ord, city)]) - ord("a"))})


def labelled(frame, *columns):
    return wk.Target(samples=frame if not columns else frame[list(columns)], categories=["city"])


def kl(p, q):
    return sum(share * math.log(share / q[label]) for label, share in p.items())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("other", [{"a": 0.2, "b": 0.3, "c": 0.5}, {"c": 0.2, "d": 0.1, "b": 0.3, "a": 0.4}])
def test_a_label_has_the_same_code_on_both_sides(divergence, other):
    p, q = (labelled(table(shares, seed=i), "city") for i, shares in enumerate((SHARES, other)))
    found = wk.estimate(p=p, q=q, divergence=divergence)
    if divergence == "forward_kl":
        assert abs(found.value - kl(SHARES, other)) < 4 * found.stderr < 0.2
    else:
        assert found.reliable == ("d" not in other)
        assert "d" not in other or "atoms that no row of p has" in found.notes[0]


def test_labels_that_no_row_of_the_other_side_has_are_never_taken_for_others():
    p, q = labelled(table({"a": 0.5, "b": 0.5}), "city"), labelled(table({"a": 0.5, "c": 0.5}, seed=1), "city")
    found = wk.estimate(p=p, q=q)  # codes 0 and 1 in both
    assert not found.reliable
    assert found.value > 1


def test_a_fit_keeps_its_codes_and_gives_other_labels_no_chance():
    fit = wk.fit(labelled(table({"b": 0.4, "c": 0.6}), "city"))
    same, more = (labelled(table(shares, seed=1), "city") for shares in ({"c": 0.5, "b": 0.5}, {"a": 0.2, "b": 0.4, "c": 0.4}))
    found = wk.estimate(p=same, q=fit)
    assert abs(found.value - kl({"b": 0.5, "c": 0.5}, {"b": 0.4, "c": 0.6})) < 4 * found.stderr
    assert wk.estimate(p=more, q=fit).value == math.inf


def test_columns_of_numbers_are_compared_within_each_label():
    p, q = labelled(table(SHARES)), labelled(table({"a": 0.4, "b": 0.3, "c": 0.3}, seed=1, shift=0.3))
    truth = kl(SHARES, {"a": 0.4, "b": 0.3, "c": 0.3}) + 0.3 * 0.3**2 / 2 + 0.2 * 0.6**2 / 2
    for divergence in ("forward_kl", "jeffreys"):
        found = wk.estimate(p=p, q=q, divergence=divergence)
        assert found.method.startswith("counting in 3 cells, and nearest neighbours")
        assert divergence != "forward_kl" or abs(found.value - truth) < 4 * found.stderr < 0.2


def test_categories_of_one_side_alone_are_refused():
    with pytest.raises(InputError, match="the columns of categories are `city` in p and none in q"):
        wk.estimate(p=labelled(table(SHARES)), q=np.zeros((100, 2)))
    codes = labelled(table(SHARES), "city")
    assert wk.estimate(p=codes, q=Categorical(probs=torch.tensor([0.5, 0.3, 0.2]))).value < 0.01


def test_the_command_line_reads_labels_as_fit_does(tmp_path):
    for name, shares in (("p", SHARES), ("q", {"a": 0.2, "c": 0.5, "b": 0.3})):
        table(shares, seed=ord(name))[["city"]].to_csv(tmp_path / f"{name}.csv", index=False)
    files = ["--p", str(tmp_path / "p.csv"), "--q", str(tmp_path / "q.csv")]
    refused = whichkl("estimate", *files)
    assert refused.returncode == 2
    assert "--categories city" in refused.stderr
    found = json.loads(whichkl("estimate", *files, "--categories", "city", "--json").stdout)
    assert abs(found["value"] - kl(SHARES, {"a": 0.2, "b": 0.3, "c": 0.5})) < 4 * found["stderr"]
    assert found["other_direction"]["reliable"]
