"""Repeated rows: they stay on one side of a split and count once in an error; data that repeat by nature raise no alarm."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import whichkl as wk
from programs import whichkl
from whichkl.diagnostics import cross_fitted_losses
from whichkl.families import Gaussian, LinearGaussian
from whichkl.samples.repeats import repeats_of, row_keys
from whichkl.solvers import ClosedForm
from whichkl.solvers.rows.rows import rows_of

RANDOM = np.random.default_rng(0)
DISTINCT = RANDOM.normal(size=(200, 2))
WEIGHTS = RANDOM.random(200)
LAST = RANDOM.normal(size=200)


def chain(rows=2_000):
    """A Markov chain that rejects six proposals of ten."""
    random, found = np.random.default_rng(1), [np.zeros(2)]
    while len(found) <= rows:
        found.append(found[-1] if random.random() < 0.6 else 0.3 * found[-1] + random.normal(size=2))
    return np.array(found[1:])


def note_of(fit):
    return next((note for note in fit.diagnostics.notes if "of the rows repeat others" in note), None)


# What repeats, and what repeats by nature

REPEATED = {
    "four rows, one after the other": np.repeat(DISTINCT[:4], 75, 0),
    "four rows, in turn": np.tile(DISTINCT[:4], (75, 1)),
    "in single precision": np.repeat(DISTINCT[:4].astype(np.float32), 75, 0),
    "two numbers": np.repeat(DISTINCT[:2, :1], 50, 0),
    "each twice": np.tile(DISTINCT, (2, 1)),
    "a bootstrap": DISTINCT[np.random.default_rng(2).integers(0, 200, 200)],
    "three in a hundred": np.concatenate([RANDOM.normal(size=(1_000, 2)), DISTINCT[:30], DISTINCT[:30]]),
    "a chain that rejects": chain(),
    "many rows": np.tile(DISTINCT, (200, 1)),
    "a class next to a number": np.tile(np.stack([DISTINCT[:, 0], (DISTINCT[:, 1] > 0).astype(float)], 1), (3, 1)),
}
NATURAL = {
    "draws": RANDOM.normal(size=(3_000, 3)),
    "counts": RANDOM.poisson(3, (1_000, 2)).astype(float),
    "large counts": RANDOM.poisson(3_000, (5_000, 1)).astype(float),
    "classes": np.eye(3)[RANDOM.integers(0, 3, 500)],
    "grey levels": RANDOM.integers(0, 4, (5_000, 5)) / 255,
    "one decimal": RANDOM.normal(size=(1_000, 1)).round(1),
    "three decimals": RANDOM.normal(size=(5_000, 1)).round(3),
    "three decimals in single precision": RANDOM.normal(size=(5_000, 1)).round(3).astype(np.float32),
    "many zeros": np.maximum(RANDOM.normal(size=(1_000, 1)), 0),
    "two rows by chance": np.concatenate([RANDOM.normal(size=(1_000, 2)), DISTINCT[:1], DISTINCT[:1]]),
    "many draws": RANDOM.normal(size=(30_000, 2)),
    "many counts": RANDOM.poisson(3, (30_000, 2)).astype(float),
}


@pytest.mark.parametrize("name", REPEATED)
def test_rows_that_repeat_are_found_and_grouped(name):
    x = torch.as_tensor(REPEATED[name])
    found = repeats_of(x)
    number = np.unique(x.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    assert found.count == number.max() + 1
    assert len(np.unique(np.stack([number, found.group.numpy()]), axis=1).T) == found.count
    assert found.in_turn == (
        name in ("four rows, one after the other", "in single precision", "two numbers", "a chain that rejects")
    )
    assert f"{found.count:,} of them distinct" in found.note
    assert ("chains=" in found.note) == found.in_turn


@pytest.mark.parametrize("name", NATURAL)
def test_what_repeats_by_nature_or_by_chance_is_no_alarm(name):
    assert repeats_of(torch.as_tensor(NATURAL[name])) is None


def test_rows_repeat_with_what_they_are_conditioned_on():
    x, y = torch.as_tensor(np.tile(DISTINCT, (3, 1))), torch.as_tensor(RANDOM.normal(size=(600, 1)))
    assert repeats_of(y, x) is None  # a design that is measured three times
    assert repeats_of(torch.as_tensor(np.tile(LAST[:, None], (3, 1))), x).count == 200


@pytest.mark.parametrize("count", [2, 5, 10])
def test_folds_keep_equal_rows_together(count):
    found = repeats_of(torch.as_tensor(REPEATED["a bootstrap"]))
    folds = found.folds(count, 3)
    assert len(folds) == count
    assert sorted(torch.cat(folds).tolist()) == list(range(200))
    groups = [set(found.group[fold].tolist()) for fold in folds]
    assert sum(map(len, groups)) == found.count == len(set().union(*groups))
    assert [len(one) for one in repeats_of(torch.as_tensor(REPEATED["four rows, in turn"])).folds(10, 0)] == [75] * 4


def test_keys_are_those_of_the_numbers():
    x = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    keys = row_keys(x).tolist()
    assert keys[0] == keys[1] == keys[3] != keys[2]
    assert row_keys(x.float()).tolist() == keys
    assert len(row_keys(torch.randn(100_000, 1)).unique()) > 99_000


# What a fit says

FITS = {
    "gaussian": {},
    "mixture": {"family": "mixture:2"},
    "number of components": {"family": "mixture:auto"},
    "student": {"family": "student_t"},
}


@pytest.mark.parametrize("name", FITS)
def test_a_copy_of_the_rows_is_no_more_evidence(name):
    once, often = (wk.fit(np.tile(DISTINCT, (times, 1)), **FITS[name]) for times in (1, 7))
    assert note_of(once) is None and note_of(often).startswith("86% of the rows repeat others (1,400 rows")
    assert often.family == once.family
    assert abs(often.value.value - once.value.value) < once.value.stderr
    assert often.value.stderr == pytest.approx(once.value.stderr, rel=0.3)
    assert often.value.n == 200 and often.value.reliable
    assert often.findings == once.findings


def test_four_rows_are_four_rows():
    fit = wk.fit(REPEATED["four rows, one after the other"])
    assert not fit.value.reliable and fit.value.stderr > 0.2 and fit.value.n == 4
    assert "pass `chains=`" in note_of(fit)
    assert wk.fit(np.tile(DISTINCT[:3], (100, 1))).value.reliable is False


def test_many_rows_are_held_out_by_what_is_in_them():
    fit = wk.fit(np.tile(DISTINCT, (100, 1)))
    held = {tuple(row) for row in fit.diagnostics.held.x.tolist()}
    assert len(held) == len(fit.diagnostics.held) == 40 and "40 distinct rows held out" in fit.value.method
    assert fit.value.n == 40 and 0.08 < fit.value.stderr < 0.3


@pytest.mark.parametrize("family", ["gaussian", "mixture:2"])
def test_rows_of_a_stream_are_held_out_by_what_is_in_them(family, tmp_path):
    np.save(tmp_path / "a.npy", np.tile(DISTINCT, (60, 1)))
    np.save(tmp_path / "b.npy", np.tile(DISTINCT[::-1], (60, 1)))
    fit = wk.fit([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")], family)
    assert "200 of them distinct" in note_of(fit)
    assert 15 < fit.value.n < 70 and fit.value.stderr > 0.05
    assert len(fit.diagnostics.held) == fit.value.n


def test_no_row_is_on_both_sides_where_a_network_holds_rows_out():
    target = wk.Target(samples=np.tile(DISTINCT, (5, 1))).noting_repeats()
    rows = replace(rows_of(target, 0), stride=5)
    kept, held = (replace(rows, held=which).gather().x for which in (False, True))
    assert len(kept) + len(held) == 1_000 and 0 < len(held) < 500
    assert not {tuple(row) for row in kept.tolist()} & {tuple(row) for row in held.tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 4])
def test_a_network_on_few_distinct_rows_is_not_called_reliable(rows):
    fit = wk.fit(np.repeat(DISTINCT[:rows], 75, 0), "flow")
    assert not fit.value.reliable and note_of(fit)


def test_pairs_weights_and_objectives_between():
    tiled = np.tile(DISTINCT, (5, 1))
    pairs = [wk.fit(wk.Target(samples=(x, y)), LinearGaussian()) for x, y in ((DISTINCT, LAST), (tiled, np.tile(LAST, 5)))]
    weighted = [wk.fit(wk.Target(samples=x, weights=w)) for x, w in ((DISTINCT, WEIGHTS), (tiled, np.tile(WEIGHTS, 5)))]
    for once, often in (pairs, weighted):
        assert note_of(once) is None and note_of(often)
        assert often.value.stderr == pytest.approx(once.value.stderr, rel=0.3)
        assert often.value.reliable
    bell = lambda x: -x.square().sum(-1) / 2 - math.log(2 * math.pi)  # noqa: E731
    targets = [wk.Target(samples=x, log_prob=bell, normalized=True) for x in (DISTINCT[:100], np.tile(DISTINCT[:100], (50, 1)))]
    once, often = (wk.fit(target, "gaussian:diagonal", objective="skew_forward_kl:0.5") for target in targets)
    assert note_of(often) and often.value.stderr > 0.3 * once.value.stderr


def test_a_chain_that_rejects_has_its_errors_from_chains_where_they_are_given():
    x = chain()
    alone, known = wk.fit(x), wk.fit(wk.Target(samples=x, chains=4))
    assert "pass `chains=`" in note_of(alone) and note_of(known) is None
    naive = float(torch.as_tensor(x).std()) / math.sqrt(len(x))
    assert alone.value.n < 1_000 and alone.value.stderr > 1.2 * naive
    assert "family_too_small" not in alone.findings


def test_rows_without_repeats_are_dealt_out_as_ever():
    x = torch.as_tensor(DISTINCT)
    plain, noted = (
        cross_fitted_losses(target, Gaussian(), ClosedForm(), 0)
        for target in (wk.Target(samples=x), wk.Target(samples=x).noting_repeats())
    )
    assert torch.equal(plain[0], noted[0]) and plain[2] == noted[2] == "10-fold cross-fitting, 200 rows"
    assert torch.equal(plain[0], torch.randperm(200, generator=torch.Generator().manual_seed(0)))


def test_a_study_splits_distinct_rows():
    (once,), (often,) = (
        wk.compare(np.tile(DISTINCT, (times, 1)), "gaussian", "forward_kl", 1, metrics=["forward_kl"]).rows for times in (1, 50)
    )
    assert often["forward_kl_stderr"] == pytest.approx(once["forward_kl_stderr"], rel=0.5)
    assert "98% of the rows repeat others" in often["notes"] and not once["notes"]


def test_the_command_says_it_too(tmp_path):
    np.savetxt(tmp_path / "x.csv", np.repeat(DISTINCT[:4], 75, 0), delimiter=",", header="a,b", comments="")
    done = whichkl("fit", "x.csv", cwd=tmp_path)
    assert done.returncode == 0
    assert "99% of the rows repeat others (300 rows were compared, 4 of them distinct)" in done.stdout
