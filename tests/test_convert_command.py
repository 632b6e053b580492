"""`whichkl convert` and the questions of `whichkl advise`: files in, files and a command out; a real terminal asks."""

import json
import os
import select
import shlex
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import whichkl as wk
from programs import whichkl
from whichkl.commands.observables import observables
from whichkl.conversions.table import CONVERSIONS


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(2000, 2)), columns=["x1", "x2"])
    frame.to_csv(tmp_path / "frames.csv", index=False)
    frame.assign(ok=(rng.random(2000) < 1 / (1 + np.exp(-2 * frame.x1))).astype(int)).to_parquet(tmp_path / "draws.parquet")
    (tmp_path / "f.py").write_text("def f(x):\n    return x ** 2\n")
    return tmp_path


def following(run):
    """Return the command that a run proposes."""
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("Next: ")]
    return shlex.split(line.removeprefix("Next: "))[1:]


def test_moments_become_weighted_samples_that_fit_reads(folder):
    made = whichkl(
        *("convert", "moments", "frames.csv", "--of", "x1, x1^2, x1*x2", "--values", "0.7,0.9,0.3", "--out", "w.csv"), cwd=folder
    )
    assert made.returncode == 0, made.stderr
    rows = pd.read_csv(folder / "w.csv")
    assert list(rows) == ["x1", "x2", "weight"] and len(rows) == 2000
    w = rows.weight / rows.weight.sum()
    found = [w @ rows.x1, w @ rows.x1**2, w @ (rows.x1 * rows.x2)]
    np.testing.assert_allclose(found, [0.7, 0.9, 0.3], atol=1e-8)
    assert "KL(q‖r) is" in made.stdout
    fitted = whichkl(*following(made), "--json", cwd=folder)
    assert fitted.returncode == 0, fitted.stderr
    result = json.loads(fitted.stdout)
    np.testing.assert_allclose(result["parameters"]["loc"], [w @ rows.x1, w @ rows.x2], atol=1e-6)
    assert result["origin"]["source"] == "3 moments and 2,000 draws of a reference."
    again = whichkl(*("convert", "moments", "frames.csv", "--of", "x1", "--values", "0.1", "--out", "w.csv"), cwd=folder)
    assert again.returncode == 2 and "there is something of this name" in again.stderr


def test_moments_of_a_function_with_errors_as_json(folder):
    run = whichkl(
        *("convert", "moments", "frames.csv", "--of", "f.py:f", "--values", "1.5,1.2", "--stderr", "0.1,0.1", "--json"),
        *("--out", "w.parquet"),
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["rows"] == 2000 and result["out"] == "w.parquet" and result["origin"]["reliable"]
    assert json.loads((folder / "w.parquet.origin.json").read_text()) == {**result["origin"], "weights": "weight"}
    assert list(pd.read_parquet(folder / "w.parquet")) == ["x1", "x2", "weight"]


def test_weights_that_convert_wrote_are_read_by_fit_and_estimate(folder):
    made = whichkl(
        "convert", "moments", "frames.csv", "--columns", "x1", "--of", "x1", "--values", "1", "--out", "w.csv", cwd=folder
    )
    assert made.returncode == 0, made.stderr
    loc = json.loads(whichkl("fit", "w.csv", "--json", cwd=folder).stdout)["parameters"]["loc"]
    np.testing.assert_allclose(loc, [1.0], atol=1e-6)
    (folder / "plain.csv").write_text((folder / "w.csv").read_text())  # without an origin file, as a table of somebody else
    found = [
        json.loads(whichkl("estimate", "--p", path, "--q", "Normal(1,1)", *options, "--json", cwd=folder).stdout)
        for path, options in (("w.csv", []), ("plain.csv", ["--p-weights", "weight"]))
    ]
    assert found[0]["value"] == found[1]["value"] and abs(found[0]["value"]) < 0.1 + 4 * found[0]["stderr"]
    assert any("of the 2,000 weighted rows of p were used" in note for note in found[0]["notes"])
    named = whichkl("estimate", "--p", "Normal(0,1)", "--q", "Normal(1,1)", "--q-weights", "weight", cwd=folder)
    assert named.returncode == 2 and "it isn't a file of samples" in named.stderr


def test_labels_keep_the_draws_that_passed(folder):
    run = whichkl("convert", "labels", "draws.parquet", "--passed", "ok", "--out", "passed.csv", cwd=folder)
    assert run.returncode == 0, run.stderr
    draws = pd.read_parquet(folder / "draws.parquet")
    np.testing.assert_allclose(pd.read_csv(folder / "passed.csv"), draws[draws.ok == 1][["x1", "x2"]])
    fitted = whichkl(*following(run), cwd=folder)
    assert fitted.returncode == 0 and "--weights" not in following(run)


def test_an_origin_in_doubt_stays_in_doubt_and_a_damaged_one_is_refused(folder):
    run = whichkl("convert", "moments", "frames.csv", "--of", "x1,x2", "--values", "1.7,1.7", "--out", "w.csv", cwd=folder)
    assert "Below 10 %" in " ".join(run.stdout.split())
    fitted = json.loads(whichkl(*following(run), "--json", cwd=folder).stdout)
    assert "target_in_doubt" in fitted["findings"]
    (folder / "w.csv.origin.json").write_text('{"source": 1')
    damaged = whichkl(*following(run), cwd=folder)
    assert damaged.returncode == 5 and "w.csv.origin.json" in damaged.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("moments", "frames.csv", "--of", "x1,x1^2", "--values", "0.7,0.3"), 3, "moment `x1^2` is 0.3, and the draws"),
        (("moments", "frames.csv", "--of", "x1,x1^2", "--values", "0.7,0.3"), 3, "given the other moments"),
        (("moments", "frames.csv", "--of", "x3", "--values", "0.7"), 2, "there is no column `x3`, but `x1`, `x2`"),
        (("moments", "frames.csv", "--of", "x1,x1", "--values", "0.7,0.7"), 2, "appears twice"),
        (("moments", "frames.csv", "--of", ",", "--values", "0.7"), 2, "names nothing"),
        (("moments", "frames.csv", "--of", "x1", "--values", "a"), 2, "isn't numbers"),
        (("moments", "frames.csv", "--of", "x1", "--values", "0.1", "--stderr", "-1"), 2, "below 0"),
        (("moments", "frames.csv", "--of", "x1", "--values", "0.1", "--out", "w.txt"), 2, "its suffix is `.txt`"),
        (("moments", "none.csv", "--of", "x1", "--values", "0.1"), 2, "no such file"),
        (("labels", "draws.parquet", "--passed", "x1"), 2, "neither true nor false"),
        (("labels", "draws.parquet", "--passed", "no"), 2, "there is no column `no`"),
        (("labels", "draws.parquet", "--passed", "ok", "--columns", "ok"), 2, "no column is left"),
    ],
)
def test_what_is_no_evidence_is_refused_and_nothing_is_written(folder, arguments, code, said):
    before = sorted(folder.iterdir())
    run = whichkl("convert", *arguments, cwd=folder)
    assert run.returncode == code and said in " ".join(run.stderr.split()), run.stderr
    assert sorted(folder.iterdir()) == before


def test_weights_need_a_file_of_samples(folder):
    for arguments, said in (
        (("frames.csv", "--weights", "w"), "no column `w`"),
        (("Normal(0,1)", "--weights", "w"), "already has its density"),
        ((".", "--weights", "x1"), "Name one file"),
        (("--log-prob", "f.py:f", "--dim", "1", "--weights", "w"), "no samples to weight"),
    ):
        run = whichkl("fit", *arguments, cwd=folder)
        assert run.returncode == 2 and said in run.stderr


def test_observables_are_products_of_powers_of_columns():
    x = np.array([[2.0, 3.0], [5.0, 7.0]])
    found = observables(["a", "a^2", "a**2", "a * b^3", "b*b"], x, ["a", "b"])
    np.testing.assert_allclose(found, np.c_[x[:, 0], x[:, 0] ** 2, x[:, 0] ** 2, x[:, 0] * x[:, 1] ** 3, x[:, 1] ** 2])
    assert observables(["a*b", "a^2"], x, ["a*b", "a^2"]).tolist() == x.tolist()


@pytest.mark.parametrize("name", [one.name for one in CONVERSIONS])
def test_flags_do_what_the_questions_do(name, folder):
    (wanted,) = [one for one in CONVERSIONS if one.name == name]
    run = whichkl("advise", "--left", name, cwd=folder)
    assert run.returncode == 0 and wanted.call in run.stdout and wanted.command in run.stdout
    others = [one.call for one in CONVERSIONS if one.name != name]
    assert not any(call in run.stdout for call in others)
    assert json.loads(whichkl("advise", "--left", name, "--json", cwd=folder).stdout)["conversions"] == [vars(wanted)]


def test_flags_that_contradict_each_other_are_refused(folder):
    for arguments, said in (
        (("--left", "nonsense"), "Choose among simulator, comparisons, moments, labels, weights"),
        (("--left", "moments", "--access", "samples"), "an access is given"),
        (("frames.csv", "--left", "moments"), "an access is given"),
    ):
        run = whichkl("advise", *arguments, cwd=folder)
        assert run.returncode == 2 and said in run.stderr


def test_every_line_of_the_page_names_what_exists():
    for one in CONVERSIONS:
        assert one.call in str(wk.advise(wk.Target(dim=2)))
        assert one.command == "" or one.command.startswith("whichkl ")


def conversation(*answers):
    """Run `whichkl advise` on a terminal of its own, answer its questions, and return its exit code and all that it shows."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    command = [sys.executable, "-m", "whichkl", "advise"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown, left = b"", list(answers)
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                read = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not read:
                break
            shown += read
            if left and shown.endswith(b"] "):
                os.write(ours, left.pop(0).encode())
    finally:
        process.kill() if process.poll() is None and left else None
        os.close(ours)
    return process.wait(60), shown.decode()


def test_a_terminal_asks_and_ends_with_the_line_that_does_it():
    code, shown = conversation("maybe\n", "n\n", "no\n", "9\n", "3\n")
    assert code == 0 and "Please answer y or n." in shown and "a number from 0 to 5" in shown
    moments = next(one for one in CONVERSIONS if one.name == "moments")
    assert shown.rstrip().endswith(f"Next: {moments.command}") and moments.call in shown
    code, shown = conversation("n\n", "n\n", "Labels\n")
    assert code == 0 and "Next: whichkl convert labels" in shown
    code, shown = conversation("y\n", "y\n")
    assert code == 0 and shown.rstrip().endswith("Next: whichkl fit SAMPLES.csv --log-prob FILE.py:FUNCTION")


def test_an_input_that_ends_is_refused_with_the_flags():
    code, shown = conversation("\x04")
    assert code == 2 and "whichkl advise --access samples,log_prob" in " ".join(shown.split())


def test_comparisons_in_two_files_become_draws(folder):
    rng = np.random.default_rng(1)
    a, b = rng.uniform(-3, 3, size=(2, 600, 2))
    first = rng.random(600) < 1 / (1 + np.exp((a**2).sum(1) / 2 - (b**2).sum(1) / 2))
    for name, points in (("w.csv", np.where(first[:, None], a, b)), ("l.csv", np.where(first[:, None], b, a))):
        pd.DataFrame(points, columns=["x", "y"]).to_csv(folder / name, index=False)
    made = whichkl("convert", "comparisons", "w.csv", "l.csv", "--rows", 500, "--out", "draws.csv", cwd=folder)
    assert made.returncode == 0, made.stderr
    rows = pd.read_csv(folder / "draws.csv")
    assert list(rows) == ["x", "y"] and len(rows) == 500 and "noise" in made.stdout
    np.testing.assert_allclose(rows.std(), 1.0, atol=0.35)  # N(0, 1) each, from 600 answers
    assert whichkl(*following(made), "--json", cwd=folder).returncode == 0
    pd.DataFrame(a, columns=["x", "z"]).to_csv(folder / "z.csv", index=False)
    refused = whichkl("convert", "comparisons", "w.csv", "z.csv", cwd=folder)
    assert refused.returncode == 2 and "Give both the same columns" in refused.stderr


def test_simulations_in_a_table_become_pairs_that_fit_reads(folder):
    rng = np.random.default_rng(2)
    rate, shift = rng.gamma(2.0, size=800), rng.normal(size=800)
    frame = pd.DataFrame({"rate": rate, "data": shift + rng.normal(size=800) * rate, "shift": shift})
    frame.to_csv(folder / "sims.csv", index=False)
    laws = ("--prior", "rate=Gamma(2,1)", "--prior", "shift=Normal(0, 1)")
    made = whichkl("convert", "simulations", "sims.csv", *laws, "--out", "pairs.csv", cwd=folder)
    assert made.returncode == 0, made.stderr
    assert list(pd.read_csv(folder / "pairs.csv")) == ["data", "rate", "shift"]
    command = following(made)
    assert (
        command[:2] == ["fit", "pairs.csv"]
        and "--given" in command
        and command[command.index("--support") + 1].startswith("rate=")
    )
    command[command.index("--family") + 1] = "linear_gaussian"
    assert whichkl(*command, "--json", cwd=folder).returncode == 0
    for more, said in (
        (("--prior", "speed=Normal(0,1)"), "there is no column `speed`"),
        (("--prior", "Normal(0,1)"), "it doesn't name a parameter"),
        ((*laws, "--prior", "rate=Gamma(1,1)"), "`rate` appears twice"),
        ((*laws, "--proposal", "speed"), "there is no column `speed`"),
        ((*laws, "--prior", "data=Normal(0,1)"), "no column is left for the data"),
    ):
        refused = whichkl("convert", "simulations", "sims.csv", *more, cwd=folder)
        assert refused.returncode == 2 and said in refused.stderr


@pytest.fixture
def failing(folder):
    """Simulations from a proposal of which a sixth failed, with the log densities of the proposal."""
    rng = np.random.default_rng(3)
    rate, shift = rng.gamma(2.0, size=1200), 1.5 * rng.normal(size=1200)
    data = shift + rng.normal(size=(2, 1200)) * rate
    data[0, rng.random(1200) < 0.3 * (rate > 2)] = np.nan
    log_q = stats.gamma(2.0).logpdf(rate) + stats.norm(0, 1.5).logpdf(shift)
    frame = pd.DataFrame({"rate": rate, "a": data[0], "b": data[1], "shift": shift})
    frame.to_csv(folder / "failing.csv", index=False)
    frame.assign(log_q=log_q).to_csv(folder / "evaluated.csv", index=False)
    frame.assign(log_q=log_q - 1).to_csv(folder / "unnormalised.csv", index=False)
    frame.assign(rate=frame.rate.where(frame.index != 7)).to_csv(folder / "torn.csv", index=False)
    return folder


LAWS = ("--prior", "rate=Gamma(2,1)", "--prior", "shift=Normal(0, 1)")


def test_failed_simulations_are_counted_and_a_proposal_is_a_law_or_a_column(failing):
    frame = pd.read_csv(failing / "failing.csv")
    failed = int(frame.a.isna().sum())
    rows = []
    for table, proposal in (("failing.csv", "shift=Normal(0, 1.5)"), ("evaluated.csv", "log_q")):
        out = f"of_{table}"
        run = whichkl("convert", "simulations", table, *LAWS, "--proposal", proposal, "--out", out, "--json", cwd=failing)
        assert run.returncode == 0, run.stderr
        origin = json.loads(run.stdout)["origin"]
        assert origin["left_out"][0].startswith(f"{failed} of 1,200 simulations") and origin["reliable"], origin
        assert "If the simulator alone fails" in origin["left_out"][0] and "failures depend on `rate`" in origin["left_out"][0]
        assert "draws of the proposal" in origin["assumed"][0] and "The weights prior/proposal leave" in origin["trust"]
        rows.append(pd.read_csv(failing / out))
    law, column = rows
    kept = frame[frame.a.notna()]
    assert list(law) == list(column) == ["a", "b", "rate", "shift", "weight"]
    np.testing.assert_allclose(law[["rate", "shift", "a", "b"]], kept[["rate", "shift", "a", "b"]])
    np.testing.assert_allclose(law.weight, column.weight, rtol=1e-6)
    log_ratio = stats.norm(0, 1).logpdf(kept["shift"]) - stats.norm(0, 1.5).logpdf(kept["shift"])
    np.testing.assert_allclose(law.weight, np.exp(log_ratio - log_ratio.max()), rtol=1e-6)


@pytest.mark.parametrize(
    ("table", "more", "code", "said"),
    [
        ("failing.csv", (), 0, "look like draws of the prior"),  # the proposal isn't named
        ("unnormalised.csv", ("--proposal", "log_q"), 0, "The mean of prior/proposal is 2."),
        ("torn.csv", (), 2, "column `rate` is missing or NaN in 1 cell"),
        ("torn.csv", ("--proposal", "shift=Normal(0,1.5)", "--missing", "drop"), 0, "of 1,199 simulations"),
        ("failing.csv", ("--proposal", "shift=Uniform(-9,9)"), 0, "The weights prior/proposal leave"),
        ("failing.csv", ("--proposal", "shift=Uniform(0,9)"), 2, "its density is 0 at"),
    ],
)
def test_what_is_wrong_with_a_table_of_simulations_is_told(failing, table, more, code, said):
    run = whichkl("convert", "simulations", table, *LAWS, *more, cwd=failing)
    assert run.returncode == code and said in " ".join((run.stdout + run.stderr).split())
