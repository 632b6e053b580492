"""The posterior that needs no folder: its density by torch's own distributions, and the draws of its example by its density."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Bernoulli, Normal

import whichkl as wk
from whichkl.problems.real_data import breast_cancer_rows

D = torch.float64
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "study_posteriors.py"


def test_breast_cancer_is_bernoulli_labels_under_normal_coefficients():
    pytest.importorskip("sklearn")
    x, y, names = breast_cancer_rows()
    p = wk.problems.breast_cancer()
    assert x.shape == (569, 31)
    assert list(p.names) == names
    torch.testing.assert_close(x[:, 1:].mean(0), torch.zeros(30, dtype=D), atol=1e-12, rtol=0)
    torch.testing.assert_close(x[:, 1:].square().mean(0), torch.ones(30, dtype=D))
    u = 0.3 * torch.randn(5, 31, generator=torch.Generator().manual_seed(0), dtype=D)
    truth = Bernoulli(logits=u @ x.T).log_prob(y).sum(1) + Normal(0, torch.ones(31, dtype=D)).log_prob(u).sum(1)
    constant = p.log_prob(u) - truth
    torch.testing.assert_close(constant, constant[:1].expand(5), atol=1e-9, rtol=0)


def test_the_examples_draws_of_it_fulfil_steins_identity(tmp_path, monkeypatch):
    """E_p[xᵢ ∂ᵢ log p] = −1 in every coordinate, and E_p ∂ᵢ log p = 0."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WHICHKL_POSTERIORS", raising=False)
    monkeypatch.setattr(sys, "argv", ["study_posteriors.py", "--only", "nothing"])
    p = runpy.run_path(str(EXAMPLE))["breast_cancer"](480)
    x, (_, score) = p.samples, p.value_and_score(p.samples)
    centred = (x - x.mean(0)) * score
    for value, truth in ((score, 0.0), (centred, -1.0)):
        islands = value.view(8, 60, 31).mean(1)  # which never mixed
        t = (islands.mean(0) - truth) / (islands.std(0) / 8**0.5)
        assert float(t.abs().max()) < 10  # Student's t with 7 degrees of freedom: 62 of them pass that in 1 of 800 runs
