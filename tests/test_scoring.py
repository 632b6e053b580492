"""Scores of new rows: against formulas, by name, outside the support, streamed as in memory, on the command line."""

import json
import math
import shlex

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from scipy.special import ndtr

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError
from whichkl.families import Gaussian, LinearGaussian, Product
from whichkl.files.writing import written_new

RNG = np.random.default_rng(0)
X = RNG.standard_normal((400, 2)) * [1.0, 3.0] + [0.0, 10.0]
NEW = np.array([[0.0, 10.0], [8.0, 10.0], [0.0, -20.0], [1.0, 12.0]])


@pytest.fixture(scope="module")
def gaussian():
    return wk.fit(pd.DataFrame(X, columns=["a", "b"]), Gaussian())


def within(share, exact, draws, sigmas=5):
    """Whether a share of draws is its probability, up to its own error."""
    return abs(share - exact) <= sigmas * math.sqrt(max(exact * (1 - exact), 1 / draws) / draws)


def test_log_densities_are_the_models_and_ranks_are_the_shares_of_its_draws(gaussian):
    scores = gaussian.score(NEW)
    log_q = gaussian.model.log_prob(torch.from_numpy(NEW))
    torch.testing.assert_close(scores.log_density, log_q)
    peak = gaussian.model.log_prob(gaussian.model.mean)
    for rank, value in zip(scores.rank.tolist(), log_q.tolist(), strict=True):
        assert within(
            rank, math.exp(value - float(peak)), scores.draws
        )  # of a Gaussian on the plane, P(log q(y) ≤ t) = e^(t − peak)
    assert scores.rank[1] == 0 and "below 1/10,000 it is 0" in str(scores)


def test_the_same_seed_gives_the_same_scores_and_no_random_state_changes(gaussian):
    before = torch.random.get_rng_state()
    first, again, other = gaussian.score(NEW), gaussian.score(NEW), gaussian.score(NEW, seed=1)
    assert torch.equal(first.rank, again.rank) and not torch.equal(first.rank, other.rank)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drivers_are_the_columns_whose_value_costs_most():
    fit = wk.fit(X, Product("normal"))
    rows = fit.score(NEW).top(4)
    assert [row.place for row in rows[:2]] == ["row 2", "row 1"]
    assert [row.drivers[0].column for row in rows[:2]] == ["x2", "x1"]
    for row in rows:
        for one in row.drivers:
            law = fit.model.laws[fit.names.index(one.column)]
            best = law.log_prob(law.loc) - law.log_prob(torch.tensor(one.value, dtype=torch.float64))
            # the best of 200 draws lies nearer than 0.05 sd to the mode but for a chance of 4e-4
            assert float(best) - 0.05**2 / 2 <= one.gain <= float(best) + 1e-12


def test_columns_are_found_by_name_others_are_ignored_and_missing_ones_named(gaussian):
    frame = pd.DataFrame({"note": ["u"] * 4, "b": NEW[:, 1], "a": NEW[:, 0]})
    scores = gaussian.score(frame)
    assert torch.equal(scores.log_density, gaussian.score(NEW).log_density)
    assert scores.notes == ("columns that the fit doesn't have were ignored: `note`",)
    with pytest.raises(InputError, match="there is no column `a`, but `note`, `b`"):
        gaussian.score(frame[["note", "b"]])
    with pytest.raises(InputError, match="they have 3 columns, and the fit has 2: a, b"):
        gaussian.score(np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"column `b` is missing or NaN in 1 cell \(row 1\)"):
        gaussian.score(np.array([[0.0, 1.0], [0.0, np.nan]]))


def test_advice_about_cells_is_for_scoring(gaussian, tmp_path):
    gaussian.save(tmp_path / "fit")
    (tmp_path / "new.csv").write_text("a,b\n1,2\n,3\n")
    (tmp_path / "text.csv").write_text("a,b\n1,2\n,x\n3,y\n")
    with pytest.raises(InputError, match="column `b` holds text in 2 cells .*`missing='drop'`, or correct these cells"):
        gaussian.score(tmp_path / "text.csv")
    refused = whichkl("score", "fit", "new.csv", cwd=tmp_path)
    assert "Run `whichkl score fit new.csv --missing drop`." in refused.stderr
    done = whichkl("score", "fit", "new.csv", "--missing", "drop", cwd=tmp_path)
    assert "Rows left out, since a cell is missing: 1 of 2." in done.stdout


def test_rows_outside_the_support_have_log_density_minus_infinity_and_rank_0():
    fit = wk.fit(wk.Target(samples=np.exp(X), support="positive"), Gaussian())
    scores = fit.score([[1.0, 100.0], [-1.0, 100.0]])
    assert scores.log_density[1] == -math.inf and scores.rank[1] == 0 and scores.rank[0] > 0
    (row,) = scores.top(2)[:1]
    assert row.place == "row 1" and row.drivers[0].column == "x1" and row.drivers[0].gain == math.inf
    assert "1 outside the support" in str(scores)


def test_each_of_several_columns_outside_the_support_is_named():
    fit = wk.fit(wk.Target(samples=np.exp(X), support="positive"), Gaussian())
    (row,) = fit.score([[-1.0, -2.0]]).rows
    assert row.driven_by == "x1 = -1 (+inf), x2 = -2 (+inf)"
    (row,) = fit.score([[-1.0, 1.0]]).rows
    assert row.drivers[0].column == "x1" and all(one.column != "x2" or one.gain < math.inf for one in row.drivers)


def test_a_column_of_another_name_is_not_scored():
    frame = pd.DataFrame(X, columns=["a", "b"])
    fit = wk.fit(frame["a"])
    assert torch.equal(fit.score(frame["a"]).log_density, fit.score(X[:, 0]).log_density)
    with pytest.raises(InputError, match="there is no column `a`, but `b`"):
        fit.score(frame["b"])


def test_scores_of_y_given_x_find_x_by_name_and_rank_at_each_rows_own_x(tmp_path):
    noise = RNG.standard_normal(400)
    frame = pd.DataFrame({"dose": X[:, 0], "effect": 2 * X[:, 0] + noise})
    fit = wk.fit(wk.Target(samples=frame, given="dose"), LinearGaussian())
    fit.save(tmp_path / "fit")
    fit = wk.Fit.load(tmp_path / "fit")
    scores = fit.score(frame[["effect", "dose"]].head(40))
    law = fit.model(torch.from_numpy(X[:40, :1]))
    y = torch.tensor(frame.effect[:40].tolist(), dtype=torch.float64)
    torch.testing.assert_close(scores.log_density, law.log_prob(y if law.event_shape == () else y[:, None]))
    z = ((y - law.mean.reshape(-1)) / law.stddev.reshape(-1)).abs().numpy()
    assert all(within(rank, exact, 1_000) for rank, exact in zip(scores.rank.tolist(), 2 * ndtr(-z), strict=True))
    assert {one.column for row in scores.rows for one in row.drivers} == {"effect"}


def test_ranks_of_categories_count_draws_that_are_equal():
    x = np.repeat([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0]], [60, 30, 10], 0)
    fit = wk.fit(x[:, :1], Product("categorical"))
    for code, exact in ((0.0, 1.0), (1.0, 0.4), (2.0, 0.1)):
        scores = fit.score([[code]] * 3)
        assert within(float(scores.rank[0]), exact, scores.draws) and len(set(scores.rank.tolist())) == 1


def test_only_as_many_rows_as_were_kept_are_shown(gaussian):
    scores = gaussian.score(X, top=3)
    lowest = scores.log_density.argsort()[:3].tolist()
    assert [row.place for row in scores.top(3)] == [f"row {i}" for i in lowest]
    with pytest.raises(InputError, match="Pass `top=5` to `score`"):
        scores.top(5)
    with pytest.raises(InputError, match="whole number of at least 0"):
        gaussian.score(X, top=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gaussian):
    folder = tmp_path_factory.mktemp("scoring")
    gaussian.save(folder / "fit")
    (folder / "parts").mkdir()
    for i in range(2):
        table = pa.table({"b": X[200 * i : 200 * (i + 1), 1], "a": X[200 * i : 200 * (i + 1), 0]})
        pyarrow.parquet.write_table(table, folder / "parts" / f"{i}.parquet", row_group_size=30)
    return folder


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_files_are_streamed_and_all_scores_written(folder, gaussian, kind):
    done = whichkl("score", "fit", "parts", "--top", "3", "--json", "--out", f"scores.{kind}", cwd=folder)
    assert done.returncode == 0, done.stderr
    said, whole = json.loads(done.stdout), gaussian.score(X, top=3)
    assert (said["rows"], said["resolution"]) == (400, 1e-4)
    worst = int(whole.log_density.argmin())
    assert said["top"][0]["place"] == f"row {worst % 200} of {worst // 200}.parquet"
    assert [one["log_density"] for one in said["top"]] == pytest.approx([one.log_density for one in whole.rows], rel=1e-12)
    path = folder / f"scores.{kind}"
    readers = {"csv": pyarrow.csv.read_csv, "parquet": pyarrow.parquet.read_table}
    table = pd.read_json(path) if kind == "json" else readers[kind](path).to_pandas()
    assert list(table.columns) == ["file", "row", "log_density", "rank"]
    assert (table.file == np.repeat(["0.parquet", "1.parquet"], 200)).all() and (table.row == np.tile(range(200), 2)).all()
    np.testing.assert_allclose(table.log_density, whole.log_density, rtol=1e-12)
    np.testing.assert_allclose(table["rank"], whole.rank)
    again = whichkl("score", "fit", "parts", "--out", f"scores.{kind}", cwd=folder)
    assert again.returncode == 2 and "there is something of this name. Name another file" in again.stderr


def test_a_file_of_scores_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), written_new(tmp_path / "s.csv") as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


SALES = 300


@pytest.fixture
def sales(tmp_path):
    rng = np.random.default_rng(1)
    rows = zip(
        pd.date_range("2026-01-01", periods=SALES).strftime("%Y-%m-%d"),
        rng.choice(["Lima", "Oslo", "Rome"], SALES),
        np.exp(rng.normal(7, 1, SALES)),
        rng.normal(40, 10, SALES),
        strict=True,
    )
    lines = [f'{d},{c},"{a:,.2f}",{"" if i % 30 == 7 else f"{g:.1f}"}' for i, (d, c, a, g) in enumerate(rows)]
    lines[100] = '2026-04-11,Rome,"9,876,543.00",41.0'
    (tmp_path / "sales.csv").write_text("day,city,amount,age\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_a_table_as_it_is_takes_three_commands_each_typed_from_the_message_before(sales):
    refused = whichkl("fit", "sales.csv", "--out", "out", cwd=sales)
    assert refused.returncode == 2 and refused.stdout == ""
    said = refused.stderr
    assert "column `day` holds dates or times in 300 cells (lines 2, 3, 4, …, such as `2026-01-01`)" in said
    assert "column `city` holds text in 300 cells (lines 2, 3, 4, …" in said
    assert "column `amount` has thousands separators" in said
    assert "column `age` is missing or NaN in 10 cells (lines 9, 39, 69, …)" in said
    command = shlex.split(said.split("Run `")[1].split("`")[0])
    assert command == shlex.split("whichkl fit sales.csv --out out --categories city --drop day --missing drop --thousands ,")
    fitted = whichkl(*command[1:], cwd=sales)
    assert fitted.returncode == 0, fitted.stderr
    assert "rows left out, since a cell is missing: 10 of 300" in fitted.stdout
    assert "`city` holds 3 categories: categorical" in fitted.stdout
    command = shlex.split(fitted.stdout.strip().splitlines()[-1].removeprefix("The strangest rows: "))
    shown = whichkl(*command[1:], cwd=sales)
    assert shown.returncode == 0, shown.stderr
    places = [line.split()[1] for line in shown.stdout.splitlines() if line.strip().startswith("line ")]
    assert len(places) == 20 and places[0] == "102"
    assert "amount = 9.87654e+06" in shown.stdout and "The 20 strangest of 290 rows" in shown.stdout
    assert "Columns that the fit doesn't have were ignored: `day`." in shown.stdout


def test_a_label_that_the_fit_does_not_know_is_outside_the_support(sales):
    options = {"categories": ["city"], "drop": ["day"], "missing": "drop", "thousands": ","}
    fit = wk.fit(wk.Target(samples=sales / "sales.csv", **options))
    frame = pd.DataFrame({"city": ["Rome", "Paris"], "amount": [900.0, 900.0], "age": [40.0, 40.0]})
    scores = fit.score(frame)
    assert scores.log_density[0] > -20 and scores.log_density[1] == -math.inf
    assert scores.rows[0].driven_by.startswith("city = 'Paris', unknown to the fit")
    assert scores.rows[1].values["city"] == "Rome"
    codes = fit.score(np.array([[7.0, 900.0, 40.0], [0.5, 900.0, 40.0], [2.0, 900.0, 40.0]]))
    assert [row.values["city"] for row in codes.rows] == ["a label unknown to the fit"] * 2 + ["Rome"]


def test_every_label_that_the_fit_does_not_know_is_shown_as_it_was_written(sales, tmp_path):
    target = wk.Target(samples=sales / "sales.csv", categories=["city"], drop=["day"], missing="drop", thousands=",")
    fit, names = wk.fit(target, judge=False), [f"town {i}\x1b[31m" + "!" * 100 * (i == 0) for i in range(1_200)]
    path = tmp_path / "new.csv"
    pd.DataFrame({"city": names, "amount": 900.0, "age": 40.0}).to_csv(path, index=False)
    shown = [row.values["city"] for row in fit.score(path, top=1_200).rows]
    assert shown[0].startswith("'town 0\\x1b[31m!!!") and len(shown[0]) < 100
    assert shown[1:1_000] == [f"{name!r}, unknown to the fit" for name in names[1:1_000]]
    assert set(shown[1_000:]) == {"a label unknown to the fit"}


def test_the_command_scores_files_alone(gaussian, tmp_path):
    gaussian.save(tmp_path / "fit")
    refused = whichkl("score", "fit", "0.5*Normal(0,1) + 0.5*Normal(2,1)", cwd=tmp_path)
    assert refused.returncode == 2 and "there is no such file or folder" in refused.stderr
    (tmp_path / "one.csv").write_text("a,b\n1,2\n")
    assert "of 1 row " in whichkl("score", "fit", "one.csv", cwd=tmp_path).stdout
