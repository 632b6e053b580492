"""What is said of a fit: one sentence of trust first, suggestions that work, and texts that don't contradict each other."""

import html
import re

import numpy as np
import pytest
import torch

import whichkl as wk
from programs import whichkl
from whichkl import families
from whichkl.commands.wording import typed_in_shell
from whichkl.families.named import family_named, name_in
from whichkl.plots.rows import margins
from whichkl.reporting.fit_report import fit_page

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(400, 2))
NOISE = RNG.normal(size=400)
COUNTS = RNG.geometric(0.3, 1000).astype(float)


def mixture(x):
    return torch.logsumexp(torch.stack([-(x - 6).square().sum(-1) / 2, -(x + 6).square().sum(-1) / 2]), 0)


def near(x):
    return -x.square().sum(-1) - 0.1 * x[:, 0].exp()


def flat_topped(x):
    return -(x.square() ** 2).sum(-1)


SITUATIONS = {
    "weights all count": (wk.Target(log_prob=near, dim=3), "gaussian", "Use the fit: it is"),
    "weights can be trusted": (wk.Target(log_prob=flat_topped, dim=3), "gaussian", "Use the corrected draws"),
    "a mode is missed": (wk.Target(log_prob=mixture, dim=1), "gaussian", "Use neither the fit nor its weights"),
    "rows are followed": (Z, "gaussian", "Use the fit: nothing"),
    "rows aren't followed": (np.r_[Z - 5, Z + 5], "gaussian:diagonal", "Use the fit as a rough picture only"),
    "no row was held out": (None, "gaussian", "Nothing was checked on unseen draws"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_one_sentence_of_trust_stands_first(situation):
    target, family, sentence = SITUATIONS[situation]
    fit = wk.fit(Z, family, judge=False) if target is None else wk.fit(target, family)
    assert fit.trust.startswith(sentence), fit.trust
    assert fit.trust.count(". ") == 0 and fit.trust.endswith(".")
    assert " ".join(str(fit).split()).split(": converged ")[1].startswith(fit.trust)
    assert fit_page(fit).sections[0].lead.startswith(fit.trust)
    assert html.escape(fit.trust) in fit._repr_html_()


def test_expectations_keep_weights_that_nearly_all_count():
    """The README's example: k̂ 1.2 of weights of which 99.5 % count."""
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1) - x[:, 0].exp(), dim=3))
    assert fit.diagnostics.ess > 0.99 * 10_000
    found = fit.expect(lambda x: x[:, 0])
    assert found.method == "importance weights"
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    p = torch.exp(-grid.square() - grid.exp())
    assert abs(float(found.value) - float(grid @ p / p.sum())) < 4 * float(found.stderr)


SUGGESTED = {
    "dependent columns": (np.c_[Z, Z.sum(1)], "product:normal"),
    "correlated columns": (np.c_[Z[:, 0], Z.sum(1)], "product:normal"),
    "z-scored counts": ((COUNTS - COUNTS.mean()) / COUNTS.std(), "product"),
    "dependent categories": (np.c_[RNG.choice(3, 400), np.zeros(400)].cumsum(1), "product:categorical"),
    "two bumps": (np.r_[Z - 4, Z + 4], "gaussian"),
    "three bumps": (np.r_[Z - 8, Z, Z + 8], "mixture:2"),
    "numbers and bits that depend": (np.c_[Z[:, 0], Z[:, 0] > 0], "product"),
    "heavy tails": (RNG.standard_t(1.5, (400, 2)), "gaussian"),
}


@pytest.mark.parametrize("data", SUGGESTED)
def test_families_that_findings_suggest_can_be_fitted(data):
    rows, family = SUGGESTED[data]
    fit = wk.fit(rows, family)
    for text in fit.explanations:
        if (name := name_in(text)) is not None:
            wk.fit(rows, family_named(name), judge=False)
    if data == "dependent columns":
        assert "after you drop one of `x1`, `x2`, `x3`" in " ".join(fit.explanations)
        wk.fit(rows[:, :2], "gaussian", judge=False)


def test_a_saved_fit_keeps_its_suggestions(tmp_path):
    fit = wk.fit(*SUGGESTED["dependent columns"])
    fit.save(tmp_path / "fit")
    assert wk.Fit.load(tmp_path / "fit").explanations == fit.explanations
    assert wk.Fit.load(tmp_path / "fit").trust == fit.trust


REFUSED = {
    "dependent columns": (np.c_[Z, Z.sum(1)], "gaussian"),
    "fractions as counts": (Z[:, :1], "product:poisson"),
    "negative as gamma": (Z[:, :1], "product:gamma"),
    "codes with a gap": (np.array([0.0, 1.0, 3.0] * 30), families.Categorical()),
    "several columns": (RNG.choice(3, (90, 2)), families.Categorical()),
    "bits given x": (wk.Target(samples=(Z, (Z[:, 0] + NOISE > 0) * 1.0)), None),
    "counts given x": (wk.Target(samples=(Z, RNG.poisson(np.exp(Z[:, 0] + 3)) * 1.0)), None),
    "numbers given x": (wk.Target(samples=(Z, Z[:, 0] + NOISE)), None),
}


@pytest.mark.parametrize("data", REFUSED)
def test_families_that_refusals_suggest_can_be_fitted(data):
    rows, family = REFUSED[data]
    with pytest.raises(wk.InputError) as caught:
        wk.fit(rows, family)
    advice = str(caught.value).split(": ", 1)[1].split(". ", 1)[1]
    written = re.findall(r"\w+\([^()]*\)", advice)
    margins_named = re.findall(r"Use one of ([\w, ]+) there", advice)
    quick = ("Gaussian", "LinearGaussian", "GeneralizedLinear", "Product", "Categorical")  # networks take long
    known = {name: getattr(families, name) for name in quick}
    tried = [eval(one, {}, known) for one in written if one.split("(")[0] in quick]  # noqa: S307
    tried += [f"product:{name}" for one in margins_named for name in one.split(", ")]
    assert tried, advice
    for one in tried:
        wk.fit(rows, one, judge=False)


def test_advice_on_pairs_names_a_solver_that_fit_takes():
    for y in (Z[:, 1] + NOISE, (Z[:, 1] + NOISE > 0) * 1.0, RNG.poisson(np.exp(Z[:, 1])) * 1.0):
        target = wk.Target(samples=(Z, y))
        advice = wk.advise(target)
        assert wk.fit(target, advice.family, judge=False).solver == advice.best.solver
    assert "one distribution, not q(y|x)" in wk.advise(wk.Target(samples=(Z, NOISE)), "gaussian").missing["forward_kl"]


def test_moments_without_a_formula_are_refused_in_words():
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.sum(-1), dim=2, support="positive"))
    for name in ("mean", "variance", "stddev"):
        with pytest.raises(wk.InputError, match=r"Cannot give the .* of this model: .* Use the fit's `summary\(\)`"):
            getattr(fit.model, name)


@pytest.mark.parametrize("family", ["gaussian", "mixture:2", "product"])
def test_margins_of_whole_numbers_have_the_mass_of_the_model(family):
    rows = np.random.default_rng(0).poisson(3, (300, 2)) * 1.0
    for figure in margins(wk.fit(rows, family, judge=False)):
        bars, model = figure.data
        assert sum(model.y) == pytest.approx(1, abs=0.1) and max(model.y) > max(bars.y) / 3


def test_colours_are_named_as_they_are_drawn():
    for name, word in (("reverse_kl", "orange"), ("forward_kl", "blue"), ("jeffreys", "violet")):
        fit = wk.fit(torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)), objective=name, judge=False)
        assert f"Grey is the data p, {word} the model q." in [section.lead for section in fit_page(fit).sections]


def test_a_gap_that_speaks_against_no_fit_is_said_with_doubt():
    fits = [wk.fit(np.random.default_rng(seed).standard_t(4, (200, 1)), "gaussian") for seed in range(12)]
    for fit in fits:
        if "family_too_small" not in fit.findings:
            assert "Not calibrated" not in str(fit)


def test_the_constant_is_on_the_side_of_the_divergence():
    assert str(wk.Estimate("reverse_kl", -1.5, 0.1, "log_z")).startswith("reverse_kl − log Z = -1.50 ± 0.10 nats")
    assert str(wk.Estimate("forward_kl", 1.5, 0.1, "log_z")).startswith("forward_kl + log Z = 1.50 ± 0.10 nats")
    assert str(wk.Estimate("reverse_kl", 1.5, 0.1)).startswith("reverse_kl = 1.50 ± 0.10 nats")


def test_findings_on_the_command_line_can_be_typed(tmp_path):
    (tmp_path / "p.py").write_text(
        "import torch\n\ndef log_prob(x):\n"
        "    return torch.logsumexp(torch.stack([-(x - 6).square().sum(-1) / 2, -(x + 6).square().sum(-1) / 2]), 0)\n"
    )
    shown = whichkl("fit", "--log-prob", "p.py:log_prob", "--dim", "1", cwd=tmp_path).stdout
    assert "fit.diagnostics" not in shown and "Mixture(" not in shown.split("\n", 1)[1]
    option = re.search(r"`--family (\S+)`", shown)
    assert option is not None
    assert whichkl("fit", "--log-prob", "p.py:log_prob", "--dim", "1", "--family", option[1], cwd=tmp_path).returncode == 0
    assert typed_in_shell("a\nPass `support=`, or try Mixture(components=2, covariance='full', law='gaussian').") == (
        "a\nPass `--support`, or try `--family mixture:2`."
    )
