"""convert: evidence → a target with its origin, which everything that is made of the target shows."""

import dataclasses

import pytest
import torch

import whichkl as wk
from whichkl.conversions.convert import Evidence
from whichkl.targets.origin import Origin

ORIGIN = Origin("3 words.", ("One is right.",), ("Which one.",), ("The fourth.",), "Hardly at all.", reliable=False)


class Words:
    """Evidence of a user's own kind."""

    def __init__(self, origin=ORIGIN):
        self.origin = origin

    def as_target(self, *, n, seed):
        x = torch.randn(n or 200, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        target = wk.Target(samples=x)
        target.origin = self.origin
        return target


def test_any_object_that_keeps_the_protocol_is_converted():
    assert isinstance(Words(), Evidence)
    target = wk.convert(Words(), n=100, seed=3)
    assert len(target.samples) == 100
    assert wk.convert(target) is target
    assert torch.equal(target.samples, wk.convert(Words(), n=100, seed=3).samples)


@pytest.mark.parametrize("given", [None, 3, [1, 2], "words", Words, torch.zeros(3, 2)])
def test_what_is_no_evidence_is_refused_with_the_way_out(given):
    with pytest.raises(wk.InputError, match=r"Cannot .*advise\(Target\(dim=d\)\)"):
        wk.convert(given)


def test_the_origin_is_shown_by_the_target_the_advice_the_fit_and_the_report(tmp_path):
    target = wk.convert(Words())
    fit = wk.fit(target)
    page = wk.report(fit, tmp_path / "report.html").read_text()
    for text in (str(target), str(wk.advise(target)), str(fit.advice), page):
        assert all(sentence in text for sentence in ("3 words.", "One is right.", "Which one.", "The fourth.", "Hardly at all."))
    assert wk.advise(target).to_dict()["origin"]["left_out"] == ["The fourth."]


def test_a_doubtful_origin_makes_every_fit_unreliable_and_survives_saving(tmp_path):
    fit = wk.fit(wk.convert(Words()))
    assert "target_in_doubt" in fit.findings and not fit.value.reliable and "Hardly at all." in fit.value.notes
    assert fit.trust.startswith("Use neither")
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert again.advice.origin == ORIGIN and "target_in_doubt" in again.findings
    sound = wk.fit(wk.convert(Words(dataclasses.replace(ORIGIN, reliable=True))))
    assert "target_in_doubt" not in sound.findings and sound.value.reliable
