"""Missing modes: found where there are any, from a log density alone, and nowhere else."""

import json
import math

import pytest
import torch

import whichkl as wk
from whichkl.diagnostics import MissingModes
from whichkl.diagnostics.basins import labels, spread_out
from whichkl.diagnostics.unvisited import unvisited_modes

D = torch.float64


def two(distance, weight=0.5, dim=1, scale=1.0):
    """Two Gaussians at ±distance in every coordinate; the first, at +distance, has the weight."""

    def log_prob(x):
        right = -((x - distance) / scale).square().sum(-1) / 2 + math.log(weight)
        return torch.logaddexp(right, -((x + distance) / scale).square().sum(-1) / 2 + math.log(1 - weight))

    return wk.Target(log_prob=log_prob, dim=dim)


def funnel(scale=3.0, dim=10):
    def log_prob(x):
        inside = x[:, 1:].square().sum(-1) * torch.exp(-x[:, 0])
        return -(x[:, 0] / scale).square() / 2 - inside / 2 - (dim - 1) * x[:, 0] / 2

    return wk.Target(log_prob=log_prob, dim=dim)


def banana(bend=0.1):
    return wk.Target(
        log_prob=lambda x: -x[:, 0].square() / 200 - (x[:, 1] + bend * x[:, 0].square() - 100 * bend).square() / 2, dim=2
    )


def student(df, dim):
    return wk.Target(log_prob=lambda x: -(df + dim) / 2 * torch.log1p(x.square().sum(-1) / df), dim=dim)


def gumbel(dim):
    return wk.Target(log_prob=lambda x: (-x - torch.exp(-x)).sum(-1), dim=dim)


def correlated(dim, condition):
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=D))[0]
    precision = basis @ torch.diag(torch.logspace(0, math.log10(condition), dim, dtype=D)) @ basis.T
    return wk.Target(log_prob=lambda x: -torch.einsum("ni,ij,nj->n", x - 1, precision, x - 1) / 2, dim=dim)


BIMODAL = {
    "three apart": (two(3), 0.5),
    "a light one": (two(6, 0.05), 0.05),
    "far apart": (two(10, 0.9), 0.1),
    "narrow": (two(5, dim=3, scale=0.1), 0.5),
    "in 20 dimensions": (two(3, 0.7, dim=20), 0.3),
}
UNIMODAL = {
    "Gaussian": lambda: correlated(3, 10),
    "ill-conditioned": lambda: correlated(8, 1e7),
    "wide": lambda: correlated(60, 100),
    "skewed": lambda: gumbel(8),
    "heavy tails": lambda: student(3, 5),
    "very heavy tails": lambda: student(1.5, 2),
    "funnel": funnel,
    "banana": banana,
    "eight schools": wk.problems.eight_schools,
    "two bumps under one fit": lambda: two(1.5, dim=3),
}


@pytest.mark.parametrize("name", BIMODAL)
def test_a_missed_mode_is_found_with_its_mass(name):
    target, mass = BIMODAL[name]
    fit = wk.fit(target)
    found = fit.diagnostics.missing_modes
    assert "modes_missing" in fit.findings
    assert "weights_unreliable" in fit.findings
    assert found.count == 1
    slack = 0.0 if name != "three apart" else 0.02  # some of the mode's mass is where the fit reaches
    assert abs(found.mass - mass) < 4 * found.stderr + slack + 1e-9
    assert found.least_kl == pytest.approx(-math.log1p(-found.mass))
    best = fit.model.mean
    there = torch.tensor(found.modes[0], dtype=D)
    assert float((there + best).abs().max()) < 0.2
    assert "1 mode that the fit misses" in str(fit)
    assert any("Mixture(2" in one for one in fit.explanations)


@pytest.mark.parametrize("name", UNIMODAL)
def test_a_family_that_is_too_small_is_no_missing_mode(name):
    fit = wk.fit(UNIMODAL[name]())
    assert fit.diagnostics.missing_modes.method == "particles"
    assert fit.diagnostics.missing_modes.count == 0
    assert "modes_missing" not in fit.findings


@pytest.mark.parametrize("family", [wk.families.Gaussian("diagonal"), wk.families.Mixture(2)])
def test_nor_is_a_model_far_narrower_than_the_target_or_one_component_too_many(family):
    for target in (correlated(8, 1e5), gumbel(4)):
        assert wk.fit(target, family).diagnostics.missing_modes.count == 0


def test_posteriors_give_no_false_alarm(shared):
    folder = shared / "posteriors"
    for name in ("arK-arK", "eight_schools-centered", "kidiq-kidscore_interaction", "nes1980-nes"):
        found = wk.fit(wk.problems.posterior(name, folder)).diagnostics.missing_modes
        assert not found.found, (name, str(found))


@pytest.mark.slow
def test_false_alarms_are_rare_and_misses_too(shared):
    """Ten seeds on every target: at most one alarm in a hundred, and no miss."""
    targets = [make() for make in UNIMODAL.values()]
    targets += [wk.problems.posterior(name, shared / "posteriors") for name in wk.problems.POSTERIORS]
    alarms = [wk.fit(target, seed=seed).diagnostics.missing_modes.found for target in targets for seed in range(10)]
    assert sum(alarms) <= len(alarms) / 100
    missed = [target for target, _ in BIMODAL.values()]
    missed += [wk.problems.gmm40("log_prob"), wk.problems.many_well(32, "log_prob")]
    assert all(wk.fit(target, seed=seed).diagnostics.missing_modes.found for target in missed for seed in range(10))


def test_forty_gaussians_and_many_wells_from_the_log_density_alone():
    fit = wk.fit(wk.problems.gmm40("log_prob"))
    found = fit.diagnostics.missing_modes
    assert "modes_missing" in fit.findings
    assert found.count > 15
    assert 0.8 < found.mass < 0.99
    assert found.gradients <= 40_000
    fit = wk.fit(wk.problems.many_well(32, "log_prob"))
    found = fit.diagnostics.missing_modes
    assert "modes_missing" in fit.findings
    assert found.mass > 0.8  # of very many modes the heavy ones next to the fit's own, not the light ones that particles came to
    assert found.gradients <= 40_000
    wells = torch.tensor(found.modes, dtype=D)[:, ::2]
    assert float((wells.abs() - 1.73).abs().max()) < 0.1


def test_a_mixture_that_holds_both_modes_misses_none():
    fit = wk.fit(two(4, 0.3, dim=2), wk.families.Mixture(2))
    assert "modes_missing" not in fit.findings
    assert fit.diagnostics.missing_modes.count == 0
    one = wk.fit(two(4, 0.3, dim=2), wk.families.Mixture(1))
    assert "modes_missing" in one.findings


def test_draws_of_the_target_are_used_where_there_are_any():
    fit = wk.fit(wk.problems.gmm40(), objective="reverse_kl")
    found = fit.diagnostics.missing_modes
    assert found.method == "draws of p"
    assert found.count > 20  # some of the forty are too close to each other to be modes of their own
    assert 0.8 < found.by_particles < 0.98
    assert 0.8 < found.mass < 0.98


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("family", [wk.families.Gaussian(), wk.families.Mixture(2)])
@pytest.mark.parametrize(("n", "dim"), [(40, 1), (3_000, 1), (500, 6)])
def test_samples_that_miss_a_mode_of_the_density_contradict_it(objective, family, n, dim):
    """As draws of a chain that never left one of two modes."""
    p = two(3, dim=dim)
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=D) + 3
    p = wk.Target(samples=x, log_prob=p.log_prob)
    fit = wk.fit(p, family, objective=objective)
    assert "accesses_disagree" in fit.findings
    assert fit.trust.startswith("Use neither")
    assert any(f"of {n:,} samples would lie" in note for note in fit.diagnostics.notes)
    assert fit.value.reliable == (objective == "reverse_kl")


def test_samples_that_reach_every_mode_do_not_contradict_the_density():
    generator = torch.Generator().manual_seed(1)
    for n, weight in ((40, 0.5), (2_000, 0.1), (10_000, 0.01)):
        side = torch.where(torch.rand(n, 1, generator=generator, dtype=D) < weight, 3.0, -3.0)
        x = side + torch.randn(n, 2, generator=generator, dtype=D)
        target = wk.Target(samples=x, log_prob=two(3, weight, dim=2).log_prob)
        before = target.evaluations.total
        assert unvisited_modes(target, None, 0)[1] == ""
        assert target.evaluations.total - before < 1_000
    skewed = -torch.log(-torch.log(torch.rand(500, 3, generator=generator, dtype=D)))
    assert unvisited_modes(wk.Target(samples=skewed, log_prob=gumbel(3).log_prob), None, 0)[1] == ""
    assert unvisited_modes(wk.problems.gmm40(), None, 0)[1] == ""


def test_a_search_costs_little():
    target = wk.problems.eight_schools()
    found = wk.fit(target).diagnostics.missing_modes
    assert 0 < found.gradients <= 40_000
    assert found.calls <= 140
    assert found.gradients < target.evaluations["score"]


def test_supports_and_names_are_the_users():
    def log_prob(x):
        u = x.log()
        return torch.logaddexp(-(u - 3).square().sum(-1) / 2, -(u + 3).square().sum(-1) / 2 - 0.5) - u.sum(-1)

    target = wk.Target(log_prob=log_prob, dim=2, support="positive", names=["rate", "size"])
    found = wk.fit(target).diagnostics.missing_modes
    assert found.names == ("rate", "size")
    assert all(value < 0.1 for value in found.modes[0])
    assert "rate = " in str(found)


def test_it_is_saved_and_loaded(tmp_path):
    fit = wk.fit(two(4))
    fit.save(tmp_path)
    again = wk.Fit.load(tmp_path)
    assert again.diagnostics.missing_modes == fit.diagnostics.missing_modes
    assert str(again) == str(fit)
    fields = json.loads(json.dumps(fit.diagnostics.missing_modes.to_dict()))
    assert MissingModes.from_dict(fields) == fit.diagnostics.missing_modes


def test_a_report_shows_it(tmp_path):
    wk.report(wk.fit(two(4, 0.9)), tmp_path / "fit.html")
    page = (tmp_path / "fit.html").read_text()
    assert "mass at modes that q misses" in page
    assert "10.0% ± 0" in page


def test_where_it_is_not_made_it_says_why():
    found = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=201), wk.families.Gaussian("diagonal"))
    found = found.diagnostics.missing_modes
    assert found.method == "none"
    assert "201 dimensions" in str(found)
    assert wk.fit(two(3), judge=False).diagnostics.missing_modes is None
    assert wk.fit(torch.randn(50, 2, dtype=D)).diagnostics.missing_modes is None


def test_the_search_itself_is_no_finding_against_the_density():
    def log_prob(x):
        return torch.where(x.abs().amax(-1) > 40, math.nan, -x.square().sum(-1) / 2)

    fit = wk.fit(wk.Target(log_prob=log_prob, dim=2))
    assert "not_a_number_met" not in fit.findings


def test_the_same_seed_finds_the_same():
    a, b = (wk.fit(two(4, dim=2), seed=5).diagnostics.missing_modes for _ in range(2))
    assert a == b


def test_parts():
    y = torch.tensor([[0.0], [0.1], [5.0], [5.1]], dtype=D)
    chosen, nearest = spread_out(y, 2)
    assert chosen.tolist() == [0, 3]
    assert nearest.tolist() == [0, 0, 1, 1]
    target = two(3)
    y = torch.tensor([[-3.0], [-2.9], [3.0], [2.0]], dtype=D)
    number = labels(target.trial, y, target.log_prob(y))
    assert number[0] == number[1] != number[2] == number[3]
