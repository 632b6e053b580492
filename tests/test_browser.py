"""The report in a real browser, where one is installed: every chart is drawn, nothing is fetched, nothing is logged."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest

import whichkl as wk
from whichkl.demo import run_demo, write_demo

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; CHROMIUM_PATH names one")]


def opened(page, profile, *more):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=8000", *more]
    return subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("width", [390, 1200])
def test_every_chart_of_the_demo_is_drawn_and_nothing_is_logged(tmp_path, width):
    page, _ = write_demo(run_demo(), tmp_path)
    result = opened(page, tmp_path / "profile", f"--window-size={width},900")
    charts = result.stdout.count('data-testid="chart"')
    assert charts >= 7
    assert len(re.findall(r'<svg class="main-svg"', result.stdout)) >= charts
    assert 'data-ready="true"' in result.stdout
    assert "CONSOLE" not in result.stderr


@pytest.mark.parametrize("width", [390, 1200])
def test_every_chart_of_a_study_is_drawn_and_nothing_is_logged(tmp_path, width):
    measures = ["jeffreys", "forward_kl", "reverse_kl", "coverage", "calibration"]
    study = wk.compare(wk.problems.many_well(4), seeds=6, metrics=measures, draws=500)
    page = wk.report(study, tmp_path / "r.html")
    result = opened(page, tmp_path / "profile", f"--window-size={width},900")
    charts = result.stdout.count('data-testid="chart"')
    assert charts >= 2 + 5 + 4 + 2
    assert len(re.findall(r'<svg class="main-svg"', result.stdout)) >= charts
    assert "CONSOLE" not in result.stderr


def test_markup_in_names_starts_no_script(tmp_path):
    names = ["</script><script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">"]
    fit = wk.fit(wk.Target(samples=np.random.default_rng(0).normal(size=(60, 2)), names=names))
    result = opened(wk.report(fit, tmp_path / "r.html"), tmp_path / "profile")
    assert 'data-ready="true"' in result.stdout
    assert "<title>taken" not in result.stdout


@pytest.mark.parametrize("width", [390, 1200])
def test_a_notebooks_picture_is_drawn_and_nothing_is_logged(tmp_path, width):
    page = tmp_path / "notebook.html"
    outputs = [wk.fit(wk.problems.petals()), wk.fit(wk.problems.bimodal(), objective="reverse_kl")]
    page.write_text(f"<!doctype html><meta charset=utf-8>{''.join(one._repr_html_() for one in outputs)}")
    result = opened(page, tmp_path / "profile", f"--window-size={width},900")
    assert len(re.findall(r'<svg class="main-svg"', result.stdout)) >= 2
    assert "CONSOLE" not in result.stderr
