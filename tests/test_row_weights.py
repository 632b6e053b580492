"""Weights of rows in a table: a column that is named, or that the origin of a converted file names, is no data."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Independent, Normal

import whichkl as wk
from programs import whichkl

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(RNG.normal(size=(1500, 2)), columns=["x1", "x2"])
FRAME["weight"] = np.exp(FRAME.x1 - FRAME.x1.max())
"""Draws of N(0, I) with the weights of N((1, 0), I)."""
WORTH = "The 1,500 weighted rows are worth "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file that `whichkl convert` wrote, and a copy without its origin."""
    home = tmp_path_factory.mktemp("converted")
    FRAME[["x1", "x2"]].to_csv(home / "frames.csv", index=False)
    made = whichkl("convert", "moments", "frames.csv", "--of", "x1", "--values", "1", "--out", "w.csv", cwd=home)
    assert made.returncode == 0, made.stderr
    assert "Wrote w.csv: 1,500 rows of x1, x2, weight; and w.csv.origin.json." in made.stdout
    (home / "copy.csv").write_bytes((home / "w.csv").read_bytes())
    return home


def test_python_reads_the_weights_and_the_origin_of_a_converted_file(folder):
    fit = wk.fit(folder / "w.csv")
    assert fit.names == ("x1", "x2") and fit.advice.origin.source == "1 moment and 1,500 draws of a reference."
    torch.testing.assert_close(fit.model.mean[0], torch.tensor(1.0, dtype=torch.float64))
    printed = json.loads(whichkl("fit", "w.csv", "--json", cwd=folder).stdout)
    assert printed["parameters"]["loc"] == pytest.approx(fit.model.mean.tolist())
    shown = " ".join(str(fit).split())
    assert WORTH in shown and "of equal weight (ESS" in shown
    assert WORTH in " ".join(whichkl("fit", "w.csv", cwd=folder).stdout.split())


def test_what_is_left_out_or_named_wins_over_the_origin(folder):
    path = folder / "w.csv"
    plain = wk.Target(samples=path, drop="weight")
    assert plain.weights is None and plain.origin is None and plain.notes == ()  # draws of the reference
    assert wk.Target(samples=path, columns=["x2"]).weights is not None
    assert wk.Target(samples=path, weights=np.ones(1500)).names == ("x1", "x2")
    with pytest.raises(wk.InputError, match="column `weight` as data: it holds the weights"):
        wk.Target(samples=path, columns=["x1", "weight"])


def test_a_copy_without_its_origin_says_what_its_weights_are_taken_for(folder):
    fit = wk.fit(folder / "copy.csv", judge=False)
    assert fit.names == ("x1", "x2", "weight")
    (note,) = wk.Target(samples=folder / "copy.csv").notes
    assert note.startswith("the column `weight` is data here") and note in fit.diagnostics.notes
    assert "`Target(samples=…, weights='weight')`" in note and "`Target(samples=…, drop='weight')`" in note
    shown = " ".join(whichkl("fit", "copy.csv", cwd=folder).stdout.split())
    assert "pass `--weights weight`; if it is neither, `--drop weight`" in shown
    same = wk.fit(wk.Target(samples=folder / "copy.csv", weights="weight"), judge=False)
    torch.testing.assert_close(same.model.mean, wk.fit(folder / "w.csv", judge=False).model.mean)
    estimated = whichkl("estimate", "--p", "copy.csv", "--q", "copy.csv", "--divergence", "energy", cwd=folder).stdout
    assert "of p is data here" in estimated and "--q-weights weight" in estimated


@pytest.mark.parametrize("name", ["weight", "Weights", "log_weight", "sample_weight", "importance weight"])
def test_names_that_sound_like_weights_are_noted_for_tables_alone(name):
    (note,) = wk.Target(samples=FRAME.rename(columns={"weight": name})).notes
    assert (f"log_weights={name!r}" in note) == name.startswith("log")
    assert wk.Target(samples=FRAME[["weight"]]).notes == ()  # no data besides it
    assert wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2, names=["height", name]).notes == ()
    assert wk.Target(samples=FRAME.rename(columns={"weight": "birth_weight_kg"})).notes == ()


def test_weights_are_named_in_frames_arrays_and_files_and_follow_the_rows_that_stay(tmp_path):
    wanted = wk.Target(samples=FRAME[["x1", "x2"]], weights=FRAME.weight)
    log = FRAME.assign(weight=np.log(FRAME.weight) + 5)
    array = {"samples": FRAME.to_numpy(), "names": ["x1", "x2", "weight"]}
    for given in (
        {"samples": FRAME, "weights": "weight"},
        {**array, "weights": "weight"},
        {"samples": log, "log_weights": "weight"},
    ):
        found = wk.Target(**given)
        assert found.names == ("x1", "x2") and torch.equal(found.samples, wanted.samples)
        torch.testing.assert_close(found.weights / found.weights.sum(), wanted.weights / wanted.weights.sum())
    holes = FRAME.assign(x2=FRAME.x2.where(FRAME.index % 7 > 0))
    holes.to_parquet(tmp_path / "holes.parquet")
    few = wk.Target(samples=tmp_path / "holes.parquet", weights="weight", missing="drop")
    kept = torch.as_tensor(FRAME.weight[FRAME.index % 7 > 0].tolist(), dtype=torch.float64)
    torch.testing.assert_close(few.weights / few.weights.sum(), kept / kept.sum())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"samples": FRAME.to_numpy(), "weights": "weight"}, "neither a file nor a DataFrame"),
        ({"samples": (FRAME[["x1"]], FRAME[["x2"]]), "weights": "weight"}, "neither a file nor a DataFrame"),
        ({"samples": FRAME, "weights": "mass"}, "there is no column `mass`"),
        ({"samples": FRAME, "weights": "x1"}, "finite, non-negative numbers"),
        ({"samples": FRAME.assign(weight=FRAME.weight.where(FRAME.index != 3)), "weights": "weight"}, "Write one number per row"),
        ({"samples": FRAME, "weights": "weight", "log_weights": "x1"}, "each gives the weights of all rows"),
        ({"samples": ".", "weights": "weight"}, "Name one file"),
    ],
)
def test_weights_that_no_column_holds_are_refused(given, said):
    with pytest.raises(wk.InputError, match=said):
        wk.Target(**given)


def test_an_origin_that_is_damaged_or_of_another_file_is_refused(folder, tmp_path):
    FRAME[["x1", "x2"]].to_csv(tmp_path / "w.csv", index=False)
    origin = tmp_path / "w.csv.origin.json"
    origin.write_bytes((folder / "w.csv.origin.json").read_bytes())
    with pytest.raises(wk.InputError, match=r"origin.json` says that they are in the column `weight`.*Convert again, or remove"):
        wk.Target(samples=tmp_path / "w.csv")
    run = whichkl("fit", "w.csv", cwd=tmp_path)
    assert run.returncode == 2 and "Cannot use the weights of `w.csv`" in run.stderr
    origin.write_text('{"source": 1')
    with pytest.raises(wk.IntegrityError, match=r"w\.csv\.origin\.json"):
        wk.Target(samples=tmp_path / "w.csv")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of simulations that `whichkl convert` wrote: data y, z and parameters rate, shift."""
    home = tmp_path_factory.mktemp("pairs")
    rate, shift = RNG.gamma(2.0, size=400), RNG.normal(size=400)
    frame = pd.DataFrame({"y": shift + RNG.normal(size=400), "rate": rate, "z": rate + RNG.normal(size=400), "shift": shift})
    frame.to_csv(home / "runs.csv", index=False)
    laws = ("--prior", "rate=Gamma(2,1)", "--prior", "shift=Normal(0,1)")
    assert whichkl("convert", "simulations", "runs.csv", *laws, "--out", "pairs.csv", cwd=home).returncode == 0
    return home


def test_the_data_of_converted_pairs_are_given_and_what_is_named_wins(pairs):
    path = pairs / "pairs.csv"
    target = wk.Target(samples=path)
    assert (target.context_names, target.names) == (("y", "z"), ("rate", "shift"))
    assert wk.fit(path, wk.families.LinearGaussian()).names == ("rate", "shift")
    with pytest.raises(wk.InputError, match="no `family=` of y given x"):
        wk.fit(path)
    assert wk.Target(samples=path, given=["z"]).names == ("y", "rate", "shift")
    assert wk.Target(samples=path, drop="y").context_names == ("z",)
    assert wk.Target(samples=path, columns=["y", "rate"]).context_names == ("y",)
    assert wk.Target(samples=path, columns=["y", "z"]).names == ("y", "z")
    assert wk.Target(samples=path, drop=["y", "z"]).names == ("rate", "shift")
    with pytest.raises(wk.InputError, match="divergence of pairs"):  # y alone would be compared
        wk.estimate(p=path, q=path)
    run = whichkl("fit", "pairs.csv", cwd=pairs)
    assert run.returncode == 2 and "Use `--family linear_gaussian`" in run.stderr
    run = whichkl("fit", "pairs.csv", "--family", "linear_gaussian", "--json", cwd=pairs)
    assert run.returncode == 0 and json.loads(run.stdout)["names"] == ["rate", "shift"], run.stderr
    run = whichkl("convert", "moments", "pairs.csv", "--of", "rate", "--values", "2", cwd=pairs)
    assert run.returncode == 2 and "Pass `--drop y,z`" in run.stderr


def test_estimates_of_weighted_rows_keep_rows_by_their_weights(folder):
    shifted = Independent(Normal(torch.tensor([1.0, 0.0], dtype=torch.float64), 1.0), 1)
    found = wk.estimate(p=folder / "w.csv", q=shifted)
    assert any("of the 1,500 weighted rows of p were used" in note for note in found.notes)
    assert abs(found.value) < 0.1 + 4 * found.stderr
    one = np.zeros(1500)
    one[0] = 1.0
    with pytest.raises(wk.InputError, match=r"1 of the 1,500 weighted rows of p are left"):
        wk.estimate(p=wk.Target(samples=FRAME[["x1", "x2"]], weights=one), q=shifted)


def test_a_conversion_of_a_converted_file_takes_its_weights_or_refuses_them(folder):
    again = whichkl("convert", "moments", "w.csv", "--of", "x2", "--values", "0.5", "--out", "again.csv", cwd=folder)
    assert again.returncode == 0, again.stderr
    rows = pd.read_csv(folder / "again.csv")
    w = rows.weight / rows.weight.sum()
    assert list(rows) == ["x1", "x2", "weight"] and w @ rows.x2 == pytest.approx(0.5) and abs(w @ rows.x1 - 1) < 0.1
    for command in (("labels", "w.csv", "--passed", "x1"), ("comparisons", "w.csv", "frames.csv")):
        run = whichkl("convert", *command, cwd=folder)
        assert run.returncode == 2 and "weight" in run.stderr


def test_trust_names_few_effective_rows():
    x = torch.randn(2_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    few = wk.fit(wk.Target(samples=x, weights=(1.5 * x[:, 0]).exp()))
    ess = math.floor(few.value.ess)
    assert 2 * ess < 2_000 and f"these 2,000 rows are worth only {few.value.ess:,.0f} of equal weight" in few.trust
    assert "worth" not in wk.fit(wk.Target(samples=x, weights=(0.2 * x[:, 0]).exp())).trust


def test_the_command_takes_log_weights(tmp_path):
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.savetxt(tmp_path / "lr.csv", np.c_[x, x[:, 0] - 700], delimiter=",", header="x,lr", comments="")
    means = [
        json.loads(whichkl("fit", "lr.csv", *more, "--json", cwd=tmp_path).stdout)["summary"]["rows"][0]["mean"]
        for more in (["--log-weights", "lr"], ["--drop", "lr"])
    ]
    assert abs(means[0] - float((x[:, 0].softmax(0) * x[:, 0]).sum())) < 1e-6 and means[0] > means[1] + 0.5
    refused = whichkl("fit", "lr.csv", "--weights", "lr", cwd=tmp_path)
    assert refused.returncode == 2 and "pass logarithms as `--log-weights`" in refused.stderr
