"""compare: what a study measures, what it costs, how a pilot halves it, and the same bits on several processes."""

import csv
import io
import math
import multiprocessing
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from rich.console import Console
from torch.distributions import MultivariateNormal, Normal

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.study import FIELDS, MEASURES, Progress, Study
from whichkl.study.comparing import rungs, survivors
from whichkl.study.coverage import coverage
from whichkl.study.held_out import split
from whichkl.study.live import LiveTable
from whichkl.study.plan import family_text, plan_of
from whichkl.study.writers import csv_text, safe, to_mlflow, to_tensorboard
from whichkl.targets.evaluations import Evaluations


def rows(n=400, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unnormalised(p, dim, shift=0.7):
    return wk.Target(log_prob=lambda x: p.log_prob(x) + shift, sampler=lambda n: p.sample((n,)), dim=dim)


# What is measured


@pytest.fixture(scope="module")
def gaussians():
    """p of correlation 0.8 against Gaussians with independent columns: every number of the scorecard has a closed form."""
    p = MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.tensor([[1, 0.8], [0.8, 1]], dtype=torch.float64))
    normalised = wk.compare(p, "gaussian:diagonal", seeds=2, draws=20_000)
    shifted = wk.compare(unnormalised(p, 2), "gaussian:diagonal", seeds=2, draws=20_000)
    return normalised, shifted


def test_both_kls_agree_with_their_closed_forms(gaussians):
    forward, reverse = -0.5 * math.log(1 - 0.64), 0.5 * math.log(1 / 0.36)
    # N(0, I) covers p: KL(p‖q) = −½ log(1 − ρ²); the reverse fit has variances 1 − ρ²: KL(q‖p) = −½ log(1 − ρ²) too.
    by_forward = 1 / 0.36 - 1 + 0.5 * math.log(0.36)
    for row in gaussians[0].rows:
        assert (row["forward_kl_up_to"], row["reverse_kl_up_to"]) == (None, None)
        truth = (forward, by_forward) if row["objective"] == "forward_kl" else (1 / 0.36 - 1 + 0.5 * math.log(0.36), reverse)
        for name, value in zip(("forward_kl", "reverse_kl"), truth, strict=True):
            slack = 0.02 * value if row["objective"] == "forward_kl" else 1e-6  # the forward fit is one to draws
            assert abs(row[name] - value) < 4 * row[f"{name}_stderr"] + slack, (row["objective"], name)
        assert row["jeffreys"] == pytest.approx(row["forward_kl"] + row["reverse_kl"])


def test_up_to_log_z_is_the_same_for_all_cells_and_cancels_in_jeffreys(gaussians):
    normalised, shifted = gaussians
    for a, b in zip(normalised.rows, shifted.rows, strict=True):
        assert (b["forward_kl_up_to"], b["reverse_kl_up_to"]) == ("log_z", "log_z")
        slack = 4 * math.hypot(a["forward_kl_stderr"], b["forward_kl_stderr"]) + 1e-6
        assert abs(b["forward_kl"] - a["forward_kl"] - 0.7) < slack
        slack = 4 * math.hypot(a["reverse_kl_stderr"], b["reverse_kl_stderr"]) + 1e-6
        assert abs(b["reverse_kl"] - a["reverse_kl"] + 0.7) < slack
        assert abs(b["jeffreys"] - a["jeffreys"]) < 4 * math.hypot(a["jeffreys_stderr"], b["jeffreys_stderr"]) + 1e-6


def test_effective_sizes_and_intervals_agree_with_their_truth(gaussians):
    sd = math.sqrt(0.36)
    held = math.erf(1.6448536269514722 * sd / math.sqrt(2))  # of N(0, 1) by the central 90 % of N(0, 0.36)
    for row in gaussians[0].rows:
        if row["objective"] == "reverse_kl":
            assert row["interval_90"] == pytest.approx(held, abs=0.01)
            assert row["interval_gap"] > 0.1
            assert row["coverage"] < 0.85
        else:
            assert row["interval_90"] == pytest.approx(0.9, abs=0.01)
            assert 0.3 < row["ess_q"] < 0.5  # 1 − ρ² = 0.36; its fourth moment is infinite, so that it's biased upwards
        assert row["c2st"] > 0.55
        assert row["c2st_p"] < 0.01
        assert row["missed"] == 0
    assert set(gaussians[0].columns) == set(FIELDS)
    assert all(
        name in cell.details for cell in gaussians[0].cells for name in ("forward_kl", "coverage", "calibration", "optima")
    )


def test_a_model_that_is_the_target_passes_every_test():
    p = Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    (row,) = wk.compare(p, "gaussian", "reverse_kl", seeds=1).rows
    assert abs(row["forward_kl"]) < 1e-9
    assert row["c2st_p"] > 1e-3
    assert abs(row["mmd"]) < 4 * row["mmd_stderr"]
    assert abs(row["coverage"] - (1 - 2**-5)) < 0.02
    assert abs(row["density"] - 1) < 0.06
    assert row["interval_gap"] < 0.03
    assert row["ess_q"] > 0.999
    assert row["missed"] == row["missed_mass"] == 0


def test_modes_that_are_missed_are_counted_and_placed():
    found = wk.compare(wk.problems.bimodal(), "gaussian", seeds=1, metrics=["coverage"])
    forward, reverse = found.cells
    assert forward.details["coverage"]["missed"] == []
    (group,) = reverse.details["coverage"]["missed"]
    assert abs(abs(group["centre"][0]) - 3) < 0.2
    assert abs(group["share"] - 0.5) < 0.05
    assert reverse.row["missed_mass"] == pytest.approx(group["share"], abs=0.03)


def test_coverage_sees_a_model_that_is_too_wide_and_one_that_is_too_narrow():
    x = rows(1500)
    narrow, wide = coverage(x, 0.3 * rows(1500, seed=1), None, None), coverage(x, 5 * rows(1500, seed=1), None, None)
    assert max(narrow.coverage, wide.coverage) < 0.6
    assert wide.density < 0.3 < 0.9 < narrow.density


def test_samples_alone_are_split_anew_for_each_seed_and_never_scored_on_what_was_fitted():
    x = rows(200)
    plan = plan_of(x, "gaussian", seeds=[3, 8])
    shares = []
    for seed in plan.seeds:
        train, held = split(plan, seed)
        assert (len(train.samples), len(held.x)) == (160, 40)
        both = torch.cat([train.samples, held.x])
        assert torch.equal(both[both[:, 0].argsort()], x[x[:, 0].argsort()])
        shares.append(held.x)
    assert not torch.equal(*shares)
    found = wk.compare(x, "gaussian", seeds=[3, 8], metrics=["forward_kl", "reverse_kl"])
    assert all(abs(row["reverse_kl"]) < 4 * row["reverse_kl_stderr"] + 0.1 for row in found.rows)
    assert {row["forward_kl_up_to"] for row in found.rows} == {"entropy_p"}
    assert {row["jeffreys"] for row in found.rows} == {None}
    mean, std = x.mean(0), x.std(0)
    assert all(abs(row["forward_kl"] - (1 + math.log(2 * math.pi))) < 0.6 for row in found.rows), (mean, std)


def test_a_study_of_one_set_of_samples_says_what_its_value_holds_and_that_its_splits_overlap():
    x = rows(300) * rows(300, seed=4).abs()
    study = wk.compare(x, ["gaussian", "student_t"], "forward_kl", seeds=6, metrics=["forward_kl"])
    assert "forward_kl + H(p)" in str(study)
    assert any("parts overlap" in note for note in study.verdict.notes)
    alone = wk.compare(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2), "gaussian", "reverse_kl", seeds=1, draws=200)
    assert "reverse_kl up to log Z" in str(alone)
    fresh = wk.compare(wk.problems.bimodal(), ["gaussian", "mixture:2"], "forward_kl", seeds=6, metrics=["forward_kl"], draws=200)
    assert "H(p)" not in str(fresh)
    assert not any("parts overlap" in note for note in fresh.verdict.notes)


def test_chains_are_held_out_in_stretches_and_weights_are_kept():
    x = rows(400)
    train, held = split(plan_of(wk.Target(samples=x, chains=4), "gaussian", seeds=1), 0)
    assert [int((held.p.chains == i).sum()) for i in range(4)] == [20] * 4
    places = [int((x == row).all(1).nonzero()) for row in held.x]
    assert all(b - a == 1 for a, b in zip(places[:20], places[1:20], strict=False))
    weighted = wk.Target(samples=x, weights=torch.rand(400, dtype=torch.float64))
    (row,) = wk.compare(weighted, "gaussian", seeds=1).rows
    assert row["status"] == "converged"
    assert row["mmd"] is None
    assert len(split(plan_of(weighted, "gaussian", seeds=1), 0)[0].weights) == 320


def test_pairs_are_compared_by_their_cross_entropy():
    x = rows(300)
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 * rows(300, 1, 5)[:, 0]
    found = wk.compare(wk.Target(samples=(x, y)), ["linear_gaussian", "mixture_density_network:1"][:1], seeds=2)
    for row in found.rows:
        assert row["forward_kl"] == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.25), abs=0.25)
        assert row["reverse_kl"] is None
        assert row["c2st"] is not None
        assert row["interval_90"] == pytest.approx(0.9, abs=0.12)


def test_a_log_density_alone_is_scored_by_importance_sampling():
    target = wk.Target(log_prob=lambda x: -(x - 1).square().sum(-1) / 2, dim=2)
    row, forward = wk.compare(target, "gaussian", seeds=1).rows
    assert (row["objective"], forward["objective"]) == ("reverse_kl", "forward_kl")
    assert row["forward_kl"] is not None
    assert forward["forward_kl"] < 0.01
    assert row["reverse_kl"] == pytest.approx(-math.log(2 * math.pi), abs=1e-3)
    assert row["c2st"] is row["coverage"] is row["jeffreys"] is None
    assert row["ess_q"] > 0.99


def test_discrete_targets_are_summed_over():
    target = wk.problems.restricted_boltzmann(visible=6, hidden=3, coupling=1.0)
    for row in wk.compare(target, "product:bernoulli", "reverse_kl", seeds=1).rows:
        assert row["forward_kl_stderr"] == 0 < row["forward_kl"]
        assert row["reverse_kl_up_to"] is None
        assert row["jeffreys"] == pytest.approx(row["forward_kl"] + row["reverse_kl"])


def test_metrics_of_ones_own_get_the_model_and_the_draws():
    def mean_of(model, draws):
        return {"gap": float((model.mean - draws.mean(0)).abs().max()), "n": len(draws)}

    def broken(model, draws):
        return 1 / 0

    (row,) = wk.compare(rows(), "gaussian", seeds=1, metrics=["forward_kl", mean_of, broken]).rows
    assert (row["mean_of.n"], row["broken"]) == (80, None)
    assert row["mean_of.gap"] < 0.6
    assert row["notes"] == "broken wasn't measured (ZeroDivisionError: division by zero)"
    assert row["c2st"] is None


# What it costs


def test_the_target_counts_what_solvers_use():
    calls = {"log_prob": 0, "draws": 0}

    def log_prob(x):
        calls["log_prob"] += len(x)
        return -(x**4).sum(-1)

    def draw(n):
        calls["draws"] += n
        return torch.rand(n, 2, dtype=torch.float64)

    target = wk.Target(log_prob=log_prob, sampler=draw, dim=2)
    forward, reverse = wk.compare(target, "gaussian", seeds=1, metrics=["khat"]).rows
    assert (forward["samples"], forward["log_prob"], forward["score"]) == (65_536, 0, 0)
    assert forward["evaluations"] == 65_536
    assert 0 < reverse["score"] + reverse["log_prob"] <= calls["log_prob"]
    assert calls["draws"] == 65_536 + reverse["samples"] + 10_000 + 64  # those fitted on, held out, and for the fingerprint


def test_rows_count_each_time_that_they_are_read():
    found = wk.compare(rows(500), ["gaussian", "mixture:3"], seeds=1, metrics=["khat"])
    gaussian, mixture = (row["rows"] for row in found.rows)
    assert gaussian == 800  # the first pass finds the centre
    assert mixture % 400 == 0
    assert mixture > 10 * gaussian


@pytest.mark.parametrize("family", ["gaussian", "gaussian:diagonal", "gaussian:low_rank:1", "mixture:3"])
def test_a_budget_ends_reverse_kl_and_says_so(family):
    (row,) = wk.compare(wk.problems.gmm40(), family, "reverse_kl", seeds=1, budget=30_000, metrics=["reverse_kl"]).rows
    assert (row["status"], row["out_of_budget"], row["budget"]) == ("stopped", True, 30_000)
    assert row["notes"].startswith(f"the budget of 30,000 evaluations ran out: {row['evaluations']:,} were used")
    assert 20_000 <= row["evaluations"] < 60_000  # without a budget it's above a million
    assert math.isfinite(row["reverse_kl"])


class Bell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.ones(2))

    def forward(self):
        return torch.distributions.Independent(Normal(self.centre, 1.0), 1)


def test_a_budget_ends_em_and_networks_and_leaves_what_is_cheaper_alone():
    x = rows(2_000) * rows(2_000, seed=4).abs()
    asked = {"objectives": "forward_kl", "seeds": 1, "budget": 20_000, "metrics": ["forward_kl"]}
    closed, em, network = wk.compare(x, ["gaussian", "mixture:3", Bell()], **asked).rows
    assert (closed["status"], closed["out_of_budget"], closed["evaluations"]) == ("converged", False, 3_200)
    for row in (em, network):
        assert (row["status"], row["out_of_budget"]) == ("stopped", True)
        assert 20_000 <= row["evaluations"] < 60_000
        assert math.isfinite(row["forward_kl"])


def test_draws_are_no_more_than_the_budget():
    (row,) = wk.compare(wk.problems.gmm40(), "gaussian", "forward_kl", seeds=1, budget=3_000, metrics=["forward_kl"]).rows
    assert (row["samples"], row["status"]) == (3_000, "converged")


def test_a_cap_ends_with_its_block():
    counts = Evaluations()
    with counts.capped(5):
        counts["score"] += 5
        assert counts.is_spent
        with counts.capped(2) as inner:
            counts["rows"] += 1
            assert not counts.is_spent
        assert inner["rows"] == 1
    assert not counts.is_spent


# Arms, seeds, failures


def test_a_cell_that_fails_is_shown_and_counted():
    found = wk.compare(wk.problems.bimodal(), ["gaussian", "student_t"], "reverse_kl", seeds=2, metrics=["reverse_kl"])
    assert [row["status"] for row in found.rows] == ["converged", "failed"] * 2
    assert found.rows[1]["error"].startswith("TargetError: Cannot use any solver here")
    assert len(found.failed) == 2
    assert "2 of 2" in str(found)
    assert [cell.row["error"] for cell in found.failed] == [found.rows[1]["error"]] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seeds": 0}, "it is neither a number of seeds nor a list"),
        ({"seeds": [1, 1]}, "one is in it twice"),
        ({"budget": 0}, "isn't a whole number of at least 1"),
        ({"families": ["gaussian", "gaussian:full"]}, "Cannot compare `gaussian` with itself"),
        ({"families": []}, "the list is empty"),
        ({"families": "linear_gaussian"}, "Cannot compare on single rows"),
        ({"metrics": ["kl"]}, "Cannot measure `kl`"),
        ({"workers": 0}, "isn't a whole number of at least 1"),
        ({"workers": 2, "cluster": "auto"}, "Give one of them"),
        ({"held_out": 1.5}, "isn't between"),
        ({"draws": 10}, "at least 100"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        wk.compare(rows(), **arguments)


def test_an_objective_that_the_target_cannot_do_is_refused_before_anything_runs():
    told = []
    with pytest.raises(TargetError, match="Cannot compare `reverse_kl` on this target"):
        wk.compare(rows(), objectives=["forward_kl", "reverse_kl"], tell=told.append)
    assert told == []


def test_every_objective_of_the_registry_can_be_compared():
    from whichkl.objectives import OBJECTIVES

    found = wk.compare(wk.problems.bimodal(), "gaussian", list(OBJECTIVES), seeds=1, metrics=["forward_kl", "reverse_kl"])
    assert [row["status"] for row in found.rows] == ["converged"] * len(OBJECTIVES)
    best = {name: min(found.rows, key=lambda row: row[name])["objective"] for name in ("forward_kl", "reverse_kl")}
    assert best["forward_kl"] == "forward_kl"
    least = min(row["reverse_kl"] for row in found.rows)
    assert found.rows[1]["reverse_kl"] == pytest.approx(least, abs=1e-6)


def test_families_are_written_in_the_grammar_that_reads_them():
    from whichkl.families import family_of

    for text in (
        "gaussian",
        "gaussian:diagonal",
        "gaussian:low_rank:2",
        "mixture:3:diagonal",
        "product:normal,gamma",
        "student_t",
    ):
        assert family_text(family_of(text)) == text


def test_the_same_study_twice_has_the_same_rows():
    metrics = ["forward_kl", "c2st", "mmd", "coverage", "calibration"]
    asked = {"families": ["gaussian", "mixture:2"], "seeds": 2, "metrics": metrics}
    assert str(wk.compare(rows(), **asked).rows) == str(wk.compare(rows(), **asked).rows)


def test_a_study_gives_back_its_fits():
    found = wk.compare(rows(), ["gaussian", "mixture:2"], seeds=1, metrics=["forward_kl"])
    fit = found.fit(1)
    assert str(fit.family) == str(wk.families.Mixture(2))
    assert fit.value.value == pytest.approx(found.rows[1]["forward_kl"])
    assert str(found.fit(found.rows[0]["cell"][:10]).family) == str(wk.families.Gaussian())
    with pytest.raises(InputError, match="Cannot find cell"):
        found.fit("no such key")
    with pytest.raises(InputError, match="Cannot find cell 9"):
        found.fit(9)


# Pilot


def test_rungs_double_and_end_with_all_seeds():
    assert rungs(range(2)) == ((0, 1),)
    assert rungs(range(4)) == ((0, 1), (2, 3))
    assert rungs(range(8)) == ((0, 1), (2, 3), (4, 5, 6, 7))


def test_an_arm_that_is_best_for_one_need_survives():
    table = {
        "covers": {"forward_kl": 1.0, "reverse_kl": 9.0},
        "seeks": {"forward_kl": 9.0, "reverse_kl": 1.0},
        "between": {"forward_kl": 2.0, "reverse_kl": 2.0},
        "hopeless": {"forward_kl": 10.0, "reverse_kl": 10.0},
    }
    assert survivors(list(table), list(table.values()), list(table)) == ["covers", "seeks"]
    failing = {**table, "covers": {"forward_kl": None, "reverse_kl": None}}
    assert survivors(list(failing), list(failing.values()), list(failing)) == ["seeks", "between"]


def test_a_pilot_spends_little_on_hopeless_arms(tmp_path):
    x = rows(400) * torch.tensor([1.0, 3.0], dtype=torch.float64) + 6 * (rows(400, 1, 7) > 0)
    families = ["mixture:2", "gaussian", "gaussian:diagonal", "student_t"]
    asked = {"families": families, "seeds": 8, "metrics": ["forward_kl"], "pilot": True, "out": tmp_path}
    told = []
    found = wk.compare(x, **asked, tell=told.append)
    counts = {text: found.table["family"].count(text) for text in families}
    assert counts["mixture:2"] == 8
    assert sorted(counts.values()) == [2, 2, 4, 8]
    assert [count for _, count in found.dropped] == [2, 2, 4]
    assert told[0].of == 32
    assert (told[-1].done, told[-1].of) == (16, 16)
    table = (tmp_path / "table.csv").read_bytes()
    again = wk.compare(x, **asked)
    assert again.dropped == found.dropped
    assert (tmp_path / "table.csv").read_bytes() == table


# Tables


def test_no_cell_of_the_table_is_a_formula():
    for text in ("=1+1", "+cmd", "-2+3", "@sum", "\tx", "\rx", "-", "=", "+1 "):
        assert safe(text) == f"'{text}"
    for text in ("-2.5", "+1e3", "3", "x=1", ""):
        assert safe(text) == text
    read = list(csv.reader(io.StringIO(csv_text({"=a": ["=1", -0.1], "b": [None, True]}))))
    assert read == [["'=a", "b"], ["'=1", ""], ["-0.1", "true"]]


def test_the_table_is_written_as_csv_and_parquet(tmp_path):
    found = wk.compare(rows(), ["gaussian", "mixture:2"], seeds=2, metrics=["forward_kl", "coverage"], out=tmp_path)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["cell"] for row in read] == found.table["cell"]
    assert [float(row["forward_kl"]) for row in read] == found.table["forward_kl"]
    columns = pyarrow.parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert {name: columns[name] for name in ("family", "seed", "coverage", "notes")} == {
        name: found.table[name] for name in ("family", "seed", "coverage", "notes")
    }
    assert list(columns) == found.columns
    assert str(Study.load(tmp_path)) == str(found)


def test_infinities_come_back_as_numbers(tmp_path):
    def infinite(model, draws):
        return math.inf

    wk.compare(rows(), "gaussian", seeds=1, metrics=["forward_kl", infinite], out=tmp_path)
    (row,) = Study.load(tmp_path).rows
    assert row["infinite"] == math.inf
    assert (tmp_path / "table.csv").read_text().splitlines()[1].split(",")[-2] == "inf"


@pytest.mark.parametrize(("writer", "module"), [(to_mlflow, "mlflow"), (to_tensorboard, "tensorboard")])
def test_writers_say_what_to_install(writer, module, tmp_path, monkeypatch):
    found = wk.compare(rows(), "gaussian", seeds=1, metrics=["forward_kl"])
    for name in (module, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"pip install {module}"):
        writer(*((found,) if writer is to_mlflow else (found, tmp_path)))


def logged():
    """A study with a failed arm, a metric that MLflow has no name for, and solvers with and without a curve."""

    def odd(model, draws):
        return {"<b>": 2.0, "never": math.inf}

    target = wk.Target(samples=rows(), log_prob=lambda x: -x.square().sum(-1) / 2)
    return wk.compare(target, ["gaussian", "student_t"], ["forward_kl", "jeffreys:0.3"], seeds=2, metrics=["coverage", odd])


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    study = logged()
    to_tensorboard(study, tmp_path)
    runs = sorted(path.name for path in tmp_path.iterdir())
    assert runs == ["gaussian · forward_kl", "gaussian · jeffreys-0.3", "student_t · forward_kl"]
    read = accumulator.EventAccumulator(str(tmp_path / runs[1]))
    read.Reload()
    mine = [cell for cell in study.cells if cell.row["objective"] == "jeffreys:0.3" and cell.row["status"] != "failed"]
    for name in ("coverage", "odd.<b>", "evaluations"):
        assert {one.step: one.value for one in read.Scalars(name)} == {
            cell.row["seed"]: pytest.approx(cell.row[name], rel=1e-6) for cell in mine
        }
    curve = [one.value for one in read.Scalars("training/seed 1")]
    assert curve == pytest.approx(mine[1].details["training"], rel=1e-5)
    assert "odd.never" not in read.Tags()["scalars"]


def test_mlflow_reads_what_was_logged(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    study = logged()
    to_mlflow(study, "mine")
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    by_cell = {one.data.tags["cell"]: one for one in runs}
    assert len(by_cell) == len(study.cells) == 8
    for cell in study.cells:
        run = by_cell[cell.row["cell"]]
        assert run.data.params["objective"] == cell.row["objective"]
        assert run.info.status == ("FAILED" if cell.row["status"] == "failed" else "FINISHED")
        if cell.row["status"] != "failed":
            assert run.data.metrics["coverage"] == cell.row["coverage"]
            assert run.data.metrics["odd._b_"] == 2.0
            curve = client.get_metric_history(run.info.run_id, "training")
            assert [one.value for one in curve] == cell.details.get("training", [])
    assert mlflow.active_run() is None


def test_the_live_table_shows_arms_failures_and_the_time_left():
    found = wk.compare(wk.problems.bimodal(), ["gaussian", "student_t"], "reverse_kl", seeds=1, metrics=["reverse_kl"])
    now = iter((0.0, 10.0, 10.0, 20.0, 20.0, 20.0, 20.0))
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with LiveTable(console, clock=lambda: next(now)) as live:
        live.tell(Progress(0, 4, 0, 0, None))
        assert live.seconds_left is None
        live.tell(Progress(1, 4, 0, 0, found.cells[0]))
        live.tell(Progress(2, 4, 0, 1, found.cells[1]))
        drawn = Console(file=io.StringIO(), width=120)
        drawn.print(live.drawn())
    text = drawn.file.getvalue()
    assert "student_t · reverse_kl" in text
    assert "2 of 4 cells, 1 failed, about 20 s left" in text


# Several processes


def in_fresh_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        kind, value = receive.recv()
    except EOFError:
        kind, value = "error", "it ended without an answer"
    process.join()
    assert kind == "value", value
    return value


def _report(send, function, arguments):
    import ray.cloudpickle

    torch.set_num_threads(1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    try:
        send.send(("value", function(*arguments)))
    except BaseException:
        send.send(("error", traceback.format_exc()))


def slow_metric(model, draws):
    time.sleep(0.2)
    return float(model.mean[0])


def deadly_metric(model, draws):
    import os

    if float(model.mean[0]) > 0:
        os._exit(1)
    return 0.0


SMALL = {"families": ["gaussian", "mixture:2"], "objectives": "forward_kl", "draws": 200}


def by_workers(out):
    import ray

    x = rows(150)
    found = wk.compare(x, **SMALL, seeds=4, metrics=["forward_kl", slow_metric], workers=2, out=out)
    deadly = wk.compare(x + 9.0, "gaussian", seeds=1, metrics=["forward_kl", deadly_metric], workers=1)
    other = wk.compare(x - 9.0, "gaussian", seeds=1, metrics=["forward_kl", deadly_metric], workers=1)
    return found.rows, ray.is_initialized(), deadly.rows[0], other.rows[0]


@pytest.mark.slow
def test_workers_give_the_same_bytes_and_a_cell_that_kills_its_worker_has_failed(tmp_path):
    pytest.importorskip("ray")
    found, running, deadly, other = in_fresh_process(by_workers, tmp_path / "ray")
    here = wk.compare(rows(150), **SMALL, seeds=4, metrics=["forward_kl", slow_metric], out=tmp_path / "here")
    assert not running
    assert found == here.rows
    assert (tmp_path / "ray" / "table.csv").read_bytes() == (tmp_path / "here" / "table.csv").read_bytes()
    assert other["deadly_metric"] == 0.0
    assert deadly["status"] == "failed"
    assert "its worker died" in deadly["error"]


def lost_node(out):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        gone = []

        def tell(progress):
            if progress.done >= 6 and not gone:
                gone.append(progress.done)
                cluster.remove_node(lost, allow_graceful=False)

        found = wk.compare(rows(150), **SMALL, seeds=12, metrics=["forward_kl", slow_metric], cluster="auto", out=out, tell=tell)
        return found.rows, gone
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_machine_that_is_lost_does_not_lose_the_study(tmp_path):
    pytest.importorskip("ray")
    found, gone = in_fresh_process(lost_node, tmp_path / "ray")
    here = wk.compare(rows(150), **SMALL, seeds=12, metrics=["forward_kl", slow_metric], out=tmp_path / "here")
    assert gone, "the machine was lost while the study ran"
    assert found == here.rows
    assert (tmp_path / "ray" / "table.csv").read_bytes() == (tmp_path / "here" / "table.csv").read_bytes()


def test_measures_fill_the_columns_that_they_say():
    assert len(set(FIELDS)) == len(FIELDS)
    found = wk.compare(wk.problems.bimodal(), "gaussian", "reverse_kl", seeds=1, draws=500)
    filled = {name for name in found.columns if found.rows[0][name] is not None}
    missing = {column for measure in MEASURES.values() for column in measure.fields} - filled
    assert missing == {"forward_kl_up_to", "reverse_kl_up_to"}
    assert np.isfinite([found.rows[0][name] for name in ("c2st", "mmd", "coverage")]).all()


def test_the_docs_describe_every_measure_as_the_table_does():
    text = (Path(__file__).parents[1] / "docs" / "comparing.md").read_text()
    for column in (column for measure in MEASURES.values() for column in measure.columns):
        assert f"| `{column.name}` | {column.words} | {column.unit or '–'} | {column.better or '–'} | {column.meaning} |" in text
