"""convert: evidence → a target with its origin, which everything that is made of the target shows."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import whichkl as wk
from programs import whichkl
from whichkl.conversions.convert import Evidence
from whichkl.targets.origin import Origin
from whichkl.targets.origin_file import origin_bytes

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


@pytest.mark.parametrize("given", [None, 3, [1, 2], "words", Words, torch.zeros(3, 2), wk.Target(dim=1)])
def test_what_is_no_evidence_is_refused_with_the_way_out(given):
    with pytest.raises(wk.InputError, match=r"Cannot .*advise\(Target\(dim=[d1]\)\)"):
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


COIN = Origin("30 answers.", ("The noise is 1.",), ("The temperature.",), ("5 ties.",), "A coin's.", False, up_to="temperature")
"""The origin of a first conversion, whose doubt and temperature every later one keeps."""


@pytest.fixture
def first():
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    target = wk.Target(samples=x, log_prob=lambda x: -x.square().sum(1) / 2, sampler=lambda n: torch.randn(n, 1).double())
    target.origin = COIN
    return target


def inherits(target):
    origin = target.origin
    parts = zip((origin.assumed, origin.unknown, origin.left_out), (COIN.assumed, COIN.unknown, COIN.left_out), strict=True)
    kept = all(set(own) <= set(found) for found, own in parts) and COIN.source in origin.source and COIN.trust in origin.trust
    return kept and not origin.reliable and origin.up_to == "temperature"


@pytest.mark.parametrize("kind", ["moments", "values", "labels", "model", "prior", "comparisons"])
def test_a_second_conversion_keeps_the_doubt_and_the_temperature_of_the_first(kind, first):
    x, noise = first.samples, torch.randn(400, 1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    evidence = {
        "moments": lambda: wk.Moments(of=lambda x: x[:, 0], values=[0.1], reference=first),
        "values": lambda: wk.Moments(of=x, values=[0.1], reference=first),
        "labels": lambda: wk.Labels(draws=first, passed=x[:, 0] > 0),
        "model": lambda: wk.Labels(draws=x, passed=x[:, 0] > 0, model=first),
        "prior": lambda: wk.Simulations(prior=first, parameters=x, data=x + noise),
        "comparisons": lambda: wk.Comparisons(winners=first, losers=3 * noise),
    }[kind]()
    target = wk.convert(evidence)
    assert inherits(target) and len(target.origin.assumed) > len(COIN.assumed)
    if kind == "moments":
        fit = wk.fit(target)
        assert fit.trust.startswith("Use neither") and "temperature" in fit.value.up_to and "A coin's." in fit.value.notes[-1]
    if kind == "model":  # its density is divided by no P(pass), whatever the first one was divided by
        assert wk.fit(target, objective="reverse_kl").value.up_to == "log_z, temperature"


def test_a_sound_second_conversion_of_a_sound_first_one_stays_sound(first):
    first.origin = dataclasses.replace(COIN, reliable=True, up_to=None)
    target = wk.convert(wk.Labels(draws=first, passed=first.samples[:, 0] > 0, model=first))
    assert target.origin.reliable and target.origin.up_to is None
    assert target.origin.source.count(COIN.source) == 1 and target.origin.trust.count(COIN.trust) == 1
    plain = wk.convert(wk.Labels(draws=first.samples, passed=first.samples[:, 0] > 0, model=Normal(0.0, 1.0)))
    assert "was made of" not in plain.origin.source


def test_a_file_of_the_first_conversion_is_one_too(first, tmp_path):
    path = tmp_path / "c.csv"
    np.savetxt(path, first.samples.numpy(), header="x1", comments="")
    (tmp_path / "c.csv.origin.json").write_bytes(origin_bytes(COIN, None))
    assert inherits(wk.Target(samples=path, log_weights=np.zeros(400)))
    assert inherits(wk.convert(wk.Moments(of=lambda x: x, values=0.1, reference=path)))
    run = whichkl("convert", "moments", "c.csv", "--of", "x1", "--values", "0.1", "--out", "w.csv", cwd=tmp_path)
    assert run.returncode == 0 and "not reliable: The `reference`: A coin's." in run.stdout, run.stderr
    assert inherits(wk.Target(samples=tmp_path / "w.csv"))


def raising(x):
    return x.nothing


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        (lambda x: wk.Moments(of="x1", values=[0.1], reference=x), "`of` is 'x1', and names of columns .* Pass a function"),
        (lambda x: wk.Moments(of=["x1"], values=[0.1], reference=x), "names of columns"),
        (lambda x: wk.Moments(of=raising, values=[0.1], reference=x), r"it raised AttributeError: .* \(.*test_convert.py:\d+\)"),
        (lambda x: wk.Comparisons(winners=x.log(), losers=x), "Drop those rows from both `winners=` and `losers=`.$"),
        (lambda x: wk.Comparisons(winners=wk.Target(samples=x, weights=x[:, 0].abs()), losers=x), "they have weights"),
        (lambda x: wk.Comparisons(winners=wk.Target(samples=x.log(), missing="drop"), losers=x), "rows were left out"),
    ],
)
def test_evidence_that_cannot_be_used_names_what_can_be_done(evidence, said):
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(wk.InputError, match=said):
        wk.convert(evidence(x))
