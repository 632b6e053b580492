"""The package itself: its names, its laziness, its examples and its README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import programs
import whichkl as wk

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHOWN = {
    "samples_only": ["(access: samples)", "Minimise forward KL: no other direction is possible.", "family_too_small"],
    "log_density_only": ["reverse_kl over Gaussian", "ELBO", "reverse_kl − log Z"],
    "both": ["forward_kl over", "reverse_kl over", "3 distinct optima", "modes_missing"],
    "neither": ["(access: nothing)", "Neither direction is possible yet", "Cannot fit this target"],
}
"""What the example of each of the four accesses prints."""


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


def test_the_public_names_are_few_and_all_there():
    assert len(wk.__all__) <= 16
    assert sorted(wk.__all__) == wk.__all__
    for name in wk.__all__:
        assert getattr(wk, name).__doc__
    assert set(wk.__all__) <= set(dir(wk))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wk.nothing  # noqa: B018


def test_a_public_name_stays_a_function_whatever_is_imported_first():
    code = "import whichkl.reporting, whichkl.fitting, whichkl.plots, whichkl.advice, whichkl as wk\n"
    assert (
        run(code + "assert callable(wk.report) and callable(wk.fit) and callable(wk.plot) and callable(wk.advise)").returncode
        == 0
    )


def test_importing_loads_nothing_and_changes_no_global_state():
    assert run("import sys, whichkl; assert 'torch' not in sys.modules and 'numpy' not in sys.modules").returncode == 0
    code = """
import torch, numpy as np, logging, random
def state():
    D = torch.distributions.Distribution
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), D._Distribution__validate_args
            if hasattr(D, '_Distribution__validate_args') else D._validate_args, torch.random.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(), np.geterr(), random.getstate(), logging.root.level)
before = state()
import whichkl as wk
for name in wk.__all__:
    getattr(wk, name)
wk.fit(wk.problems.bimodal(), objective="reverse_kl")
wk.fit(wk.problems.petals(), wk.families.Mixture(2))
wk.plot(wk.fit(wk.problems.eight_schools()))
assert state() == before
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_first_fit_waits_for_no_library_that_it_does_not_use():
    code = "import sys, torch, whichkl as wk\n"
    code += "wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2))\n"
    code += "wk.fit(torch.randn(200, 2))\n"
    code += "wk.fit(wk.problems.bimodal(), objective='reverse_kl')\n"
    slow = ("sympy", "scipy.special", "scipy.stats", "scipy.optimize", "sklearn", "pyarrow", "plotly", "pandas", "jax")
    code += f"slow = set({slow}) & set(sys.modules)\n"
    code += "assert not slow, slow"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_loss_of_a_language_model_loads_no_solver_and_no_family():
    code = "import sys\nimport whichkl.distillation.language.objective, whichkl.distillation.language.partial_losses\n"
    code += (
        "wrong = [name for name in sys.modules if name.startswith(('whichkl.solvers', 'whichkl.families', 'whichkl.targets'))]\n"
    )
    done = run(code + "assert not wrong, wrong")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(path, tmp_path):
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    result = programs.run(str(path), cwd=tmp_path, strict=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout and all(text in result.stdout for text in SHOWN.get(path.stem, ()))


def test_the_readmes_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    code = "\n".join(blocks)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_the_code_of_every_docs_page_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    if any("transformers" in block for block in blocks):
        pytest.importorskip("transformers")
    result = programs.run("-c", "\n".join(blocks), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
