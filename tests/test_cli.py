"""The command line in real subprocesses: what it prints, its exit codes, and that nothing is half-written."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import PoissonRegressor

from programs import run, whichkl
from whichkl import Target
from whichkl._checks import InputError
from whichkl.commands.fit import shown_parameters
from whichkl.families import Flow, Gaussian

MODEL = """
import torch, numpy as np
def log_prob(x):
    return -0.5 * (x - 1).square().sum(-1)
def arrays(x):
    return -0.5 * np.sum(np.square(x - 1), axis=-1)
def density(x):
    return torch.exp(log_prob(x))
def empty(x):
    return torch.full_like(x[:, 0], -torch.inf)
def broken(x):
    return undefined
"""


def test_columns_are_fitted_given_others_from_a_file_and_from_a_folder_of_them(tmp_path):
    rng = np.random.default_rng(0)
    age, dose = rng.normal(50, 9, 400), rng.uniform(0, 2, 400)
    frame = pd.DataFrame({"age": age, "visits": rng.poisson(np.exp(0.01 * age + 0.3 * dose)), "dose": dose})
    (tmp_path / "parts").mkdir()
    frame.to_parquet(tmp_path / "all.parquet", index=False)
    frame.to_csv(tmp_path / "all.csv", index=False)
    for i in range(2):
        frame[200 * i : 200 * (i + 1)].to_parquet(tmp_path / "parts" / f"{i}.parquet", index=False)
    family = ("--family", "generalized_linear:poisson")
    wanted = {"all.csv": ("--json",), "parts": ("--json", "--out", "out")}
    runs = [whichkl("fit", name, "--given", "age, dose", *family, *more, cwd=tmp_path) for name, more in wanted.items()]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    found = [json.loads(run.stdout) for run in runs]
    assert found[0]["names"] == ["visits"]
    weights = [np.array(one["parameters"]["weight"]) for one in found]
    theirs = PoissonRegressor(alpha=0, tol=1e-10).fit(frame[["age", "dose"]], frame["visits"]).coef_
    np.testing.assert_allclose(weights[0][0], theirs, rtol=1e-4)
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-9)
    assert (tmp_path / "out" / "report.html").is_file()
    assert whichkl("fit", "parts", "--given", "age,dose", cwd=tmp_path).stderr.count("--family generalized_linear:")
    for given, said in (
        ("weight", "there is no column `weight`, but `age`"),
        ("age,age", "appears twice"),
        ("age,visits,dose", "left for y"),
    ):
        with pytest.raises(InputError, match=said):
            Target(samples=tmp_path / "all.parquet", given=[one.strip() for one in given.split(",")])
    refused = whichkl("fit", "all.parquet", "--given", "weight", *family, cwd=tmp_path)
    assert refused.returncode == 2 and "there is no column `weight`, but `age`" in refused.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    x = np.random.default_rng(0).normal(size=(100, 2))
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "x.csv").write_text("a,b\n" + "\n".join(f"{p},{q}" for p, q in x) + "\n")
    (tmp_path / "nan.csv").write_text("a,b\n1,2\n3,nan\n5,6\n")
    (tmp_path / "text.csv").write_text("a,b\n1,2\n3,x\n")
    (tmp_path / "few.csv").write_text("a,b\n1,2\n3,5\n")
    (tmp_path / "flat.csv").write_text("a,b\n1,2\n3,2\n4,2\n5,2\n")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "empty.csv").write_text("")
    return tmp_path


BAD = [
    (["fit", "nowhere.csv"], 2, "there is no such file"),
    (["fit", "nan.csv"], 2, "in 1 cell (line 3, `nan`). Run `whichkl fit nan.csv --out out --missing drop`."),
    (
        ["fit", "text.csv"],
        2,
        "column `b` holds text in 1 cell (line 3, `x`). Run `whichkl fit text.csv --out out --drop b`",
    ),
    (["fit", "few.csv"], 2, "needs at least 3 rows"),
    (["fit", "flat.csv"], 2, "column `b` is constant"),
    (["fit", "ragged.csv"], 2, "line 3 has 1 fields"),
    (["fit", "empty.csv"], 2, "the file is empty"),
    (["fit", "x.csv", "--family", "flaw"], 2, "Choose among"),
    (["fit", "x.csv", "--objective", "reverse_kl"], 3, "Use `ForwardKL`, or pass `--log-prob`"),
    (["fit", "--log-prob", "model.py:log_prob"], 2, "Pass `--dim`"),
    (["fit", "--log-prob", "model.py", "--dim", "2"], 2, "FILE.py:FUNCTION"),
    (["fit", "--log-prob", "model.py:nothing", "--dim", "2"], 2, "its functions are arrays, broken, density"),
    (["fit", "--log-prob", "none.py:f", "--dim", "2"], 2, "there is no such file"),
    (["fit", "--log-prob", "model.py:density", "--dim", "2"], 3, "a density, not its log"),
    (["fit", "--log-prob", "model.py:empty", "--dim", "2"], 3, "-inf at all 256 start points"),
    (["fit", "--log-prob", "model.py:broken", "--dim", "2"], 3, "NameError: name 'undefined' is not defined"),
    (["fit"], 2, "neither samples nor a log density are given"),
    (["advise", "--access", "density"], 2, "isn't a known one"),
    (["advise", "x.csv", "--access", "samples"], 2, "Drop one of them"),
    (["fit", "x.csv", "--nonsense"], 2, "No such option"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bad_input_gets_one_line_and_writes_nothing(folder, arguments, code, message):
    before = sorted(folder.iterdir())
    extra = ["--out", "out"] if arguments[0] == "fit" else []
    result = whichkl(*arguments, *extra, cwd=folder)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_debug_shows_the_traceback(folder):
    result = whichkl("fit", "nan.csv", "--debug", cwd=folder)
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_fit_writes_a_report_and_a_fit_that_loads(folder):
    result = whichkl("fit", "x.csv", "--out", "out", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["objective"] == "forward_kl"
    assert told["parameters"]["loc"] == pytest.approx(np.load(folder / "x.npy").mean(0).tolist())
    assert (folder / "out" / "report.html").stat().st_size > 1_000_000
    import whichkl as wk

    assert wk.Fit.load(folder / "out" / "fit").names == ("a", "b")


@pytest.mark.parametrize("function", ["log_prob", "arrays"])
def test_fit_takes_a_log_density_from_a_file(folder, function):
    result = whichkl("fit", "--log-prob", f"model.py:{function}", "--dim", "3", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["objective"] == "reverse_kl"
    assert told["parameters"]["loc"] == pytest.approx([1, 1, 1], abs=1e-5)


def test_samples_and_a_log_density_together_are_both(folder):
    result = whichkl("advise", "x.npy", "--log-prob", "model.py:log_prob", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "let an experiment on your task decide" in " ".join(result.stdout.split())
    fitted = whichkl("fit", "x.npy", "--log-prob", "model.py:log_prob", "--objective", "reverse_kl", cwd=folder)
    assert fitted.returncode == 0, fitted.stderr
    assert "natural_gradient: converged" in fitted.stdout


def test_advise_speaks_text_and_json(folder):
    text = whichkl("advise", "--access", "log_prob", cwd=folder)
    assert "Minimise reverse KL" in text.stdout
    told = json.loads(whichkl("advise", "x.csv", "--json", cwd=folder).stdout)
    assert (told["best"], list(told["missing"])) == ("forward_kl", ["reverse_kl"])
    assert "Cheapest access" in whichkl("advise", cwd=folder).stdout


def test_help_and_version_load_no_torch(folder):
    probe = "import sys, runpy; sys.argv = ['whichkl', *{!r}]\ntry:\n runpy.run_module('whichkl', run_name='__main__')\n"
    probe += "except SystemExit:\n pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    for flag in (["--help"], ["--version"], ["distill", "--help"]):
        result = subprocess.run([sys.executable, "-c", probe.format(flag)], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_a_missing_extra_names_the_install_line(folder):
    hide = "import sys; sys.modules['typer'] = None; sys.argv = ['whichkl']; from whichkl.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("Run: pip install jinja2 plotly pyarrow pydantic pyyaml rich typer.")
    assert "Traceback" not in result.stderr
    for module, call in (("pyarrow", "wk.Target.of('x.csv')"), ("plotly", "wk.plot(wk.fit(wk.problems.bimodal()))")):
        hide = f"import sys, whichkl as wk; sys.modules.update(dict.fromkeys([{module!r}, '{module}.graph_objects']))"
        code = f"{hide}\ntry:\n {call}\nexcept ValueError as e:\n print(e)"
        result = run("-c", code, cwd=folder)
        assert "pip install jinja2 plotly pyarrow" in result.stdout, result.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write, as Linux's /proc is")
def test_a_folder_that_cannot_be_written_is_exit_four(folder):
    result = whichkl("fit", "x.csv", "--out", "/proc/whichkl", cwd=folder)
    assert result.returncode == 4
    assert "Traceback" not in result.stderr


def test_an_output_that_is_a_file_is_refused_and_stays(folder):
    (folder / "taken").write_text("mine")
    result = whichkl("fit", "x.csv", "--out", "taken", cwd=folder)
    assert result.returncode == 2
    assert "`taken` is a file" in result.stderr
    assert (folder / "taken").read_text() == "mine"


@pytest.mark.slow  # CI runs `make demo`, and test_demo.py looks at what it makes
def test_demo_writes_both_files_and_a_table(folder):
    result = whichkl("demo", "--out", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    for word in ("forward KL", "reverse KL", "ELBO", "family too small", "what is left", "comparisons", "out/report.html"):
        assert word in result.stdout
    assert json.loads((folder / "out" / "report.json").read_text())["units"] == "nats"
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("family", "solver", "shown"),
    [
        (Flow(), "sticking_the_landing", set()),
        (Flow(), "stochastic", set()),
        (Gaussian(), "natural_gradient", {"loc", "scale_tril"}),
    ],
)
def test_parameters_are_printed_unless_the_family_is_a_network(family, solver, shown):
    """A flow has thousands of weights, whichever solver fitted it."""
    model = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    diagnostics = SimpleNamespace(optima=[SimpleNamespace(model=model)])
    assert set(shown_parameters(SimpleNamespace(family=family, solver=solver, diagnostics=diagnostics))) == shown


def test_fit_and_advise_take_a_distribution(tmp_path):
    mixture = "0.7*Normal(-3,1) + 0.3*Normal(3,1)"
    found = whichkl("fit", mixture, "--family", "mixture:2", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    rows = {row["name"]: row for row in json.loads(found.stdout)["summary"]["rows"]}
    assert abs(rows["x1"]["mean"] + 1.2) < 1e-3 and abs(rows["x1[0]"]["weight"] - 0.7) < 1e-3
    printed = whichkl("fit", "Normal(2, 3)", cwd=tmp_path).stdout
    assert "97.5 %" in printed and "2.000  3.000" in printed
    one = whichkl("fit", mixture, "--objective", "reverse_kl", cwd=tmp_path).stdout
    command = shlex.split(one.strip().splitlines()[-1].removeprefix("The family to try: "))
    assert command == ["whichkl", "fit", mixture, "--objective", "reverse_kl", "--family", "mixture:2"]
    assert "family_too_small" not in whichkl(*command[1:], cwd=tmp_path).stdout
    saved = whichkl("fit", "Normal(2, 3)", "--out", "out", cwd=tmp_path)
    assert saved.returncode == 0 and "whichkl score" not in saved.stdout  # there is no file of rows to score
    assert "possible" in whichkl("advise", "Gamma(2, 1)", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Normal(0,1)", "--support", "positive"], "Leave `--support` out"),
        (["Nrmal(0,1)"], "isn't a known distribution"),
        (["Normal(0,-1)"], "Give arguments in their range"),
        (["data(1).csv"], "there is no such file"),
    ],
)
def test_a_distribution_that_cannot_be_fitted_is_refused(tmp_path, arguments, says):
    refused = whichkl("fit", *arguments, cwd=tmp_path)
    assert refused.returncode == 2 and says in refused.stderr


def test_a_file_is_read_whatever_its_name_looks_like(tmp_path):
    (tmp_path / "Normal(0,1)").mkdir()
    (tmp_path / "Normal(0,1)" / "a.csv").write_text("a\n" + "\n".join(f"{i % 7}.5" for i in range(40)))
    found = whichkl("fit", "Normal(0,1)", "--json", cwd=tmp_path)
    assert json.loads(found.stdout)["names"] == ["a"], found.stderr
