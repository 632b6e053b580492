"""Advice: the four cells, from the two declarations alone."""

import pytest
import torch

import whichkl as wk
from whichkl import Access
from whichkl.families import Gaussian, Mixture
from whichkl.objectives import OBJECTIVES

CELLS = [
    (Access.SAMPLES, "samples", ["forward_kl"]),
    (Access.SAMPLER, "samples", ["forward_kl"]),
    (Access.LOG_PROB, "log_prob", ["reverse_kl", "forward_kl"]),
    (Access.LOG_PROB | Access.NORMALIZED | Access.DIFFERENTIABLE, "log_prob", ["reverse_kl", "forward_kl"]),
    (Access.SAMPLES | Access.LOG_PROB, "both", ["forward_kl", "reverse_kl", "jeffreys", "renyi"]),
    (Access.SAMPLER | Access.LOG_PROB | Access.NORMALIZED, "both", list(OBJECTIVES)),
    (Access(0), "neither", []),
    (Access.SCORE, "log_prob", ["reverse_kl"]),
    (Access.SAMPLES | Access.SCORE, "both", ["forward_kl", "reverse_kl", "jeffreys", "renyi"]),
]


@pytest.mark.parametrize("family", [Gaussian(), Gaussian("diagonal"), Mixture(2)], ids=str)
@pytest.mark.parametrize(("access", "cell", "possible"), CELLS, ids=str)
def test_access_decides(access, cell, possible, family):
    advice = wk.advise(access, family)
    assert access.cell == cell
    assert [option.objective.name for option in advice.options] == possible
    shown = [name for name, one in OBJECTIVES.items() if cell == "both" or not one.is_between]
    assert sorted([*possible, *advice.missing]) == sorted(shown)
    for name, why in advice.missing.items():
        assert OBJECTIVES[name].requires.label in why
    assert (advice.best is None) == (not possible)
    assert bool(advice.conversions) == (not possible)
    assert bool(advice.cheapest) == (not possible)
    page = str(advice)
    assert advice.situation in page.replace("\n", " ")
    assert max(len(line) for line in page.splitlines()) <= 96


def test_neither_names_what_could_be_converted_and_the_cheapest_access():
    advice = wk.advise(wk.Target(dim=3))
    text = " ".join(str(advice).split())
    for word in ("simulator", "Bradley–Terry", "moments", "weights", "pass/fail", "at least 4 draws"):
        assert word in text


def test_a_target_exposes_what_it_has():
    target = wk.Target(samples=torch.randn(9, 2), log_prob=lambda x: -x.square().sum(-1), support=None, normalized=False)
    assert target.access == Access.SAMPLES | Access.LOG_PROB | Access.DIFFERENTIABLE
    assert wk.Target(samples=torch.randn(9, 2), normalized=True).access == Access.SAMPLES
    whole = wk.Target.of(wk.problems.bimodal()).access
    assert whole == Access.SAMPLER | Access.LOG_PROB | Access.NORMALIZED | Access.DIFFERENTIABLE
    assert wk.Target(score=lambda x: -x, dim=2).access == Access.SCORE


def test_access_is_read_from_words():
    assert Access.parse("samples, log_prob") == Access.SAMPLES | Access.LOG_PROB
    assert Access.parse("nothing") == Access(0)
    for member in Access:
        assert Access.parse(member.label) == member
