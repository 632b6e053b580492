"""What can be seen at the start is checked at the start; what fails after the work never takes the result with it."""

import json
import shutil

import numpy as np
import pytest

import whichkl as wk
from programs import run, whichkl
from whichkl._checks import ResourceError
from whichkl.commands.results_folder import check_results_folder

MODEL = """
import torch
from pathlib import Path
from torch import nn
def f(x):
    Path("called").touch()
    return -x.square().sum(-1)
def net():
    Path("called").touch()
    return nn.Linear(2, 2)
def data():
    return torch.randn(60, 2)
"""
FIT = ("fit", "--log-prob", "m.py:f", "--dim", "2", "--out", "o")
DISTILL = ("distill", "--teacher", "m.py:net", "--student", "m.py:net", "--data", "m.py:data", "--epochs", "1", "--out", "o")
COMPARE = ("compare", "s.yaml", "--out", "o")
DEMO = ("demo", "--out", "o")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "s.yaml").write_text("target: x.npy\nfamilies: [gaussian]\nseeds: 1\nmetrics: [forward_kl]\n")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 2)))
    return tmp_path


def tree(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("command", "taken", "code"),
    [
        (FIT, "o/fit/notes.txt", 2),
        (FIT, "o/fit", 2),
        (FIT, "o/report.html/", 2),
        (FIT, "o", 2),
        (DISTILL, "o/student/notes.txt", 2),
        (DISTILL, "o/student", 2),
        (DISTILL, "o/report.html/", 2),
        (COMPARE, "o/report.html/", 2),
        (COMPARE, "o/report.md/", 2),
        (COMPARE, "o/table.csv/", 2),
        (COMPARE, "o/study.json/", 2),
        (DEMO, "o/report.json/", 2),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else str(value),
)
def test_a_place_that_is_taken_is_seen_before_the_work(folder, command, taken, code):
    if taken.endswith("/"):
        (folder / taken).mkdir(parents=True)
    else:
        (folder / taken).parent.mkdir(parents=True, exist_ok=True)
        (folder / taken).write_text("mine")
    before = tree(folder)
    result = whichkl(*command, cwd=folder)
    assert result.returncode == code, result.stderr
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert not (folder / "called").exists()
    after = {name: data for name, data in tree(folder).items() if "__pycache__" not in name}
    assert after == before


@pytest.mark.parametrize("module", ["plotly", "jinja2"])
@pytest.mark.parametrize("command", [FIT, DISTILL, COMPARE, DEMO], ids=lambda one: one[0])
def test_a_package_that_the_report_needs_is_missed_before_the_work(folder, command, module):
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv = {['whichkl', *command]!r}; "
    result = run("-c", code + "from whichkl.__main__ import main; main()", cwd=folder)
    assert result.returncode == 2, result.stderr
    assert f"import `{module}`" in result.stderr and "Run: pip install jinja2" in result.stderr
    assert not (folder / "called").exists() and not (folder / "o").exists()


def test_a_package_that_is_missing_doesnt_matter_without_a_report(folder):
    code = f"import sys; sys.modules['plotly'] = None; sys.argv = {['whichkl', *FIT[:-2]]!r}; "
    assert run("-c", code + "from whichkl.__main__ import main; main()", cwd=folder).returncode == 0


def test_pydantic_is_missed_before_a_study(folder):
    code = f"import sys; sys.modules['pydantic'] = None; sys.argv = {['whichkl', *COMPARE]!r}; "
    result = run("-c", code + "from whichkl.__main__ import main; main()", cwd=folder)
    assert result.returncode == 2 and "import `pydantic`" in result.stderr


def test_a_disk_that_is_nearly_full_is_seen_before_the_work(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(ResourceError, match="its disk has 2.0 MB left"):
        check_results_folder(tmp_path / "new" / "o", "report.html")


LIMIT = """
import resource, runpy, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.argv = sys.argv[1:]
runpy.run_module("whichkl", run_name="__main__", alter_sys=True)
"""


def with_small_files(*arguments, cwd):
    """Run the command where no file can grow beyond a megabyte: weights can be saved, and reports can't."""
    pytest.importorskip("resource")
    return run("-c", LIMIT, "whichkl", *arguments, cwd=cwd)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_fit_whose_report_fails_is_printed_and_saved(folder, as_json):
    result = with_small_files(*FIT, *["--json"] * as_json, cwd=folder)
    assert result.returncode == 4, result.stderr
    if as_json:
        assert json.loads(result.stdout)["objective"] == "reverse_kl"
    else:
        assert result.stdout.startswith("reverse_kl over Gaussian") and "Report:" not in result.stdout
    said, error = result.stderr.splitlines()
    assert said == "The fit is saved in `o/fit`."
    assert error.startswith("error: Cannot write `o/report.html`: ")
    assert wk.Fit.load(folder / "o" / "fit").status == "converged"


def test_a_distillation_whose_report_fails_is_printed_and_saved(folder):
    result = with_small_files(*DISTILL, cwd=folder)
    assert result.returncode == 4, result.stderr
    assert result.stdout.startswith("Distilled by")
    assert result.stderr.splitlines()[0] == "The student is saved in `o/student`."
    assert (folder / "o" / "student" / "distillation.json").is_file()


def test_a_study_whose_report_fails_is_printed_and_kept(folder):
    result = with_small_files(*COMPARE, cwd=folder)
    assert result.returncode == 4, result.stderr
    assert "Table: o/table.csv" in result.stdout
    assert result.stderr.splitlines()[0] == "The cells and tables are saved in `o`."
    again = whichkl(*COMPARE, "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["cells"] == 1


def test_a_fit_that_cannot_be_saved_is_printed(folder):
    (folder / "m.py").write_text(
        MODEL
        + "def g(x):\n    Path('o/fit').mkdir(parents=True, exist_ok=True)\n    Path('o/fit/mine').touch()\n    return f(x)\n"
    )
    result = whichkl("fit", "--log-prob", "m.py:g", "--dim", "2", "--out", "o", cwd=folder)
    assert result.returncode == 2
    assert result.stdout.startswith("reverse_kl over Gaussian")
    assert result.stderr.count("\n") == 1 and "holds something else, `mine`" in result.stderr
    assert not (folder / "o" / "report.html").exists()


def test_what_succeeds_is_unchanged(folder):
    result = whichkl(*FIT, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "Report: o/report.html"
    assert sorted(path.name for path in (folder / "o").iterdir() if not path.name.startswith(".")) == ["fit", "report.html"]
