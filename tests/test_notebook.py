"""Results as notebooks show them: the sentence, the table and the picture, with nothing fetched and every name as text."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import whichkl as wk
from whichkl.families import GeneralizedLinear, Mixture
from whichkl.reporting import notebook

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 2))
Y = (X[:, 0] + RNG.logistic(size=200) > 0).astype(float)
EVIL = ["</script><script>alert(1)</script>", '<img src=x onerror="alert(2)">']


def own(html):
    """The HTML without its scripts, whose source names sites in comments."""
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def kl(teacher, student):
    return torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


RESULTS = {
    "fit": lambda: wk.fit(X),
    "mixture": lambda: wk.fit(wk.problems.petals(), Mixture(2)),
    "conditional": lambda: wk.fit(wk.Target(samples=(X, Y)), GeneralizedLinear("bernoulli")),
    "reverse": lambda: wk.fit(wk.problems.bimodal(), objective="reverse_kl"),
    "study": lambda: wk.compare(wk.problems.bimodal(), seeds=2, metrics=["forward_kl", "reverse_kl"], draws=500),
    "advice": lambda: wk.advise(X),
    "no advice": lambda: wk.advise(wk.Access(0)),
    "estimate": lambda: wk.estimate(p=X, q=X + 1),
    "audit": lambda: wk.audit(kl),
    "summary": lambda: wk.fit(X).summary(),
    "distillation": lambda: wk.distill(
        teacher=torch.nn.Linear(2, 3), student=torch.nn.Linear(2, 3), data=(torch.randn(300, 2), torch.arange(300) % 3), epochs=2
    ),
}
DRAWN = {"fit", "mixture", "conditional", "reverse", "study", "distillation"}


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_has_its_sentence_and_table_and_fetches_nothing(name):
    html = RESULTS[name]()._repr_html_()
    assert "<table" in html and ('class="lead"' in html or name == "summary")
    assert ("Plotly.newPlot" in html) == (name in DRAWN)
    assert "://" not in own(html) and not re.search(r"<(link|img|iframe|script[^>]*src)", own(html))
    assert html.count("<div") == html.count("</div>") and html.count("<script>") == html.count("</script>")


def test_markup_in_names_stays_text():
    fit = wk.fit(wk.Target(samples=X, names=EVIL))
    html = fit._repr_html_()
    assert "<img" not in own(html) and "alert(1)</script>" not in html and "&lt;img src=x" in html


def test_the_table_of_a_fit_is_in_the_notebook_and_in_the_report(tmp_path):
    fit = wk.fit(X)
    mean = fit.summary().cells()[0][1]
    assert f">{mean}<" in fit._repr_html_()
    assert f">{mean}<" in wk.report(fit, tmp_path / "r.html").read_text()


def test_without_plotly_there_is_no_picture(monkeypatch):
    fit = wk.fit(X)
    real = importlib.import_module

    def without(name, *rest):
        if name.split(".")[0] == "plotly":
            raise ModuleNotFoundError("No module named 'plotly'", name="plotly")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    html = fit._repr_html_()
    assert "<table" in html and "Plotly" not in html and "converged" in html


def test_a_kernel_gets_the_script_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr(notebook, "_PLOTLY_HERE", set())
    fit = wk.fit(X)
    first, second = fit._repr_html_(), fit._repr_html_()
    assert len(first) > 3_000_000 > 100_000 > len(second)
    ids = re.findall(r'id="(whichkl-\w+)"', first + second)
    assert len(set(ids)) == len(ids) == 2


def test_many_rows_show_the_first_twenty():
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=50), "gaussian:diagonal")
    html = fit._repr_html_()
    assert ">x20<" in html and ">x21<" not in html and "The first 20 of 50 rows" in html


def test_results_do_not_import_what_draws_them():
    code = "import sys, whichkl as wk; wk.fit, wk.advise, wk.audit, wk.compare, wk.estimate\n"
    code += "print([one for one in sys.modules if one.startswith(('whichkl.reporting', 'whichkl.plots'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("families", [None, ["gaussian", "mixture:2", "mixture:3", "student_t", "gaussian:diagonal"]])
def test_a_study_prints_on_a_screen(families):
    study = wk.compare(X, families, ["forward_kl"], seeds=2, draws=500)
    assert len(repr(study)) <= 300 and f"{1 if families is None else 5} arm" in repr(study)
    lines = str(study).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
