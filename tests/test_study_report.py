"""The report of a study: verdict first, what failed, markup that stays text, and ten thousand cells."""

import math
import re
import time

import numpy as np
import pytest

import whichkl as wk
from whichkl._checks import InputError
from whichkl.plots.arms import tradeoff
from whichkl.reporting.page import Block, Section, markdown
from whichkl.study import Study
from whichkl.study.ledger import Stored

EVIL = "</script><script>document.title='taken'</script>|<img src=x onerror=alert(1)>"


def own_html(text):
    """The page without its scripts, of which plotly's names sites in comments."""
    return re.sub(r"<script nonce=\"[^\"]+\">.*?</script>", "", text, flags=re.DOTALL)


def made(arms, seeds, value, **more):
    """A study of rows alone: `value(arm, seed)` gives the measures of a cell, or None where it failed."""
    cells = []
    for seed in range(seeds):
        for arm in range(arms):
            row = {
                "cell": f"{seed}-{arm}",
                "family": f"mixture:{arm // 2 + 1}",
                "objective": ("forward_kl", "reverse_kl")[arm % 2],
            }
            row |= {"seed": seed, "status": "converged", "error": None, "evaluations": 1000.0 * (arm + 1), **more}
            measured = value(arm, seed)
            row |= {"status": "failed", "error": EVIL} if measured is None else measured
            optima = [{"loss": 1.0, "converged": True, "is_global": True}, {"loss": 2.0, "converged": True, "is_global": False}]
            details = {"optima": optima, "coverage": {"missed": [{"share": 0.2, "centre": [1.0, 2.0]}]}}
            cells.append(Stored(row["cell"], row, {} if measured is None else details, {}, {}))
    families = [{"family": f"mixture:{arm + 1}"} for arm in range((arms + 1) // 2)]
    config = {"target": {"source": EVIL}, "families": families, "objectives": ["forward_kl", "reverse_kl"]}
    return Study(tuple(cells), {**config, "seeds": list(range(seeds)), "budget": None, "code": {"whichkl": "0.1.0"}})


def measured(arm, seed):
    random = np.random.default_rng((arm, seed))
    forward, reverse = (one * math.exp(0.05 * random.normal()) for one in (1 + arm % 7, 3 - arm % 2))
    return {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse, "interval_gap": 0.1 + arm / 1e4}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    def spread(model, draws):
        return float(model.variance.sqrt())

    study = wk.compare(wk.problems.bimodal(), seeds=6, metrics=["forward_kl", "reverse_kl", "coverage", spread], draws=500)
    page = wk.report(study, tmp_path_factory.mktemp("study") / "deep" / "report.html")
    return study, page.read_text(), page.with_suffix(".md").read_text()


def test_the_verdict_comes_first_in_plain_words(real):
    study, text, plain = real
    page = own_html(text)
    places = [page.index(f"<h2>{name}</h2>") for name in ("The verdict", "The scorecard", "How sure that is", "The fits")]
    assert places == sorted(places)
    assert places[0] < page.index(study.verdict.sentence) < places[1]
    assert study.verdict.sentence.replace("_", "\\_") in plain
    for word in (
        "nothing of p to be missed",
        "The fits",
        "their losses",
        "what it misses",
        "Exact configuration",
        "spread",
        "7.86",
    ):
        assert word in page
        assert word in plain


def test_figures_show_the_trade_and_the_fits_over_the_target(real):
    _, text, _ = real
    assert text.count('data-testid="chart"') >= 2 + 2 + 2 + 2
    assert "target p" in text  # the curve beneath the fits
    assert "://" not in own_html(text)


def test_a_loaded_study_is_reported_without_its_target(tmp_path):
    wk.compare(wk.problems.bimodal(), seeds=1, metrics=["coverage"], draws=500, out=tmp_path / "s")
    text = wk.report(Study.load(tmp_path / "s"), tmp_path / "r.html").read_text()
    assert "The target isn&#39;t available" in text
    assert "No verdict" in text
    assert "at least 6 seeds" in own_html(text)


def test_the_command_line_says_the_verdict_and_writes_the_report(tmp_path):
    from typer.testing import CliRunner

    from whichkl.cli import app

    (tmp_path / "s.yaml").write_text("target: Laplace(0, 1)\nseeds: 6\nmetrics: [calibration]\ndraws: 500\n")
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "s.yaml")])
    assert done.exit_code == 0
    study = Study.load(tmp_path / "s.out")
    assert study.verdict.sentence in done.stdout
    assert study.verdict.sentence in (tmp_path / "s.out" / "report.html").read_text()
    assert (tmp_path / "s.out" / "report.md").exists()


def test_markup_in_names_and_errors_stays_text_and_failed_cells_are_shown(tmp_path):
    study = made(4, 8, lambda arm, seed: None if arm == 1 and seed < 3 else {**measured(arm, seed), EVIL: 1.0})
    text = wk.report(study, tmp_path / "r.html").read_text()
    page, plain = own_html(text), (tmp_path / "r.md").read_text()
    said = "\n".join(line for line in plain.splitlines() if not line.startswith("    "))  # indented lines are code
    for one in (page, said):
        assert "<img" not in one
        assert "<script>" not in one
        assert "failed in 3 of 8 seeds" in one
        assert "Failed cells" in one
    assert "&lt;img src=x" in page
    assert "document.title='taken'</script>" not in text


def test_tables_in_markdown_keep_their_columns():
    section = Section("a", "b", (Block.table(("x|y", "z"), [("1|2", "`<b>`\nnext")], "c"),))
    lines = [line for line in markdown("t", "l", [section], "f").splitlines() if line.startswith("|")]
    assert lines == ["| x\\|y | z |", "| --- | --- |", "| 1\\|2 | \\`&lt;b&gt;\\` next |"]


def test_a_study_without_any_finished_cell_is_reported(tmp_path):
    text = own_html(wk.report(made(2, 6, lambda arm, seed: None), tmp_path / "r.html").read_text())
    assert "every cell failed" in text
    with pytest.raises(InputError, match="Pass what whichkl.fit"):
        wk.report(3, tmp_path / "x.html")


def test_training_curves_are_drawn_where_a_solver_has_them(tmp_path):
    rows = np.random.default_rng(0).normal(size=(300, 2))
    study = wk.compare(rows, families=["flow", "gaussian", "mixture:2"], seeds=1, metrics=["forward_kl"])
    losses = study.cells[0].details["training"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert "training" not in study.cells[1].details
    climbed = study.cells[2].details["training"]
    assert 2 < len(climbed) <= 200
    assert climbed[-1] == pytest.approx(study.cells[2].details["optima"][0]["loss"], abs=1e-3)
    assert "How the loss fell" in wk.report(study, tmp_path / "r.html").read_text()


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("ratio", [1.1, 30.0], ids=["linear", "logarithmic"])
def test_error_bars_lie_inside_the_axes(spread, ratio):
    def measured(arm, seed):
        forward, reverse = ((1 + spread * abs(np.random.default_rng((arm, seed, one)).normal())) for one in (0, 1))
        return {"forward_kl": forward * ratio**arm, "reverse_kl": reverse * ratio**-arm}

    study = made(4, 6, measured)
    figure = tradeoff(study.rows, study.verdict, "forward_kl", "reverse_kl")
    for name, at, bar in (("xaxis", "x", "error_x"), ("yaxis", "y", "error_y")):
        axis = figure.layout[name]
        ends = [10**one if axis.type == "log" else one for one in axis.range]
        assert (axis.type == "log") is (ratio > 2)
        for trace in figure.data:
            value, error = trace[at][0], trace[bar].array[0]
            assert error > 0 and value + error < ends[1] and ends[0] < value - error


@pytest.mark.slow
@pytest.mark.parametrize(("arms", "seeds"), [(1000, 10), (100, 100)])
def test_ten_thousand_cells_are_reported_in_half_a_minute_and_fifteen_megabytes(tmp_path, arms, seeds):
    study, begun = (
        made(arms, seeds, lambda arm, seed: None if (arm, seed) == (5, 2) else measured(arm, seed)),
        time.process_time(),
    )
    page = wk.report(study, tmp_path / "r.html")
    assert time.process_time() - begun <= 30
    assert page.stat().st_size <= 15e6
    assert "of 1,000 arms" in page.read_text() or arms < 1000
