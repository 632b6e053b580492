"""Comparisons: answers to "which is likelier?" → a density up to a power, with what it rests on."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.distributions import Categorical, LogNormal, MixtureSameFamily, MultivariateNormal, Normal

import whichkl as wk
from whichkl.conversions.comparison_mixture import fit_mixtures
from whichkl.conversions.comparison_pairs import Pairs
from whichkl.conversions.comparison_process import Process, _Basis, _Posterior, fit_process
from whichkl.conversions.comparison_reach import Places
from whichkl.conversions.comparisons import chosen_by_loss
from whichkl.study.measures import constants_of

D = torch.float64
EYE = torch.eye(2, dtype=D)
BIMODAL = MixtureSameFamily(
    Categorical(probs=torch.tensor([0.5, 0.5], dtype=D)),
    MultivariateNormal(torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=D), EYE.expand(2, 2, 2)),
)


def ring(x):
    return -((x.norm(dim=-1) - 2) / 0.4).square() / 2


def uniform(reach, dim=2):
    return lambda n, g: reach * (2 * torch.rand(n, dim, generator=g, dtype=D) - 1)


def answers(log_prob, proposal, n, seed=0, noise=1.0):
    """Winners and losers of n noisy comparisons."""
    g = torch.Generator().manual_seed(seed)
    a, b = proposal(n, g), proposal(n, g)
    odds = (log_prob(a) - log_prob(b)).reshape(n) / noise
    a_wins = (torch.rand(n, generator=g, dtype=D) < torch.sigmoid(odds))[:, None]
    return {"winners": torch.where(a_wins, a, b), "losers": torch.where(a_wins, b, a)}


def kl(log_prob, target, reach=8.0, points=401):
    """KL(p‖p̂) on a grid, both normalised there."""
    line = torch.linspace(-reach, reach, points, dtype=D)
    x = torch.cartesian_prod(*[line] * target.dim).reshape(-1, target.dim)
    log_p, log_q = log_prob(x).reshape(-1).log_softmax(0), target.log_prob(x).log_softmax(0)
    return float((log_p.exp() * (log_p - log_q)).sum())


def unit_normal(x):
    return -x.square().sum(-1) / 2


def test_two_modes_are_found_and_can_be_sampled():
    target = wk.convert(wk.Comparisons(**answers(BIMODAL.log_prob, uniform(5.0), 2_000)))
    assert kl(BIMODAL.log_prob, target) < 0.05
    assert target.access == wk.Access.parse("sampler, log_prob, normalized, differentiable")
    assert "mixture of 2 Gaussians" in str(target)
    x = target.draws(20_000, seed=1)
    assert abs(float((x[:, 0] > 0).double().mean()) - 0.5) < 0.05


def test_a_ring_is_followed_by_the_process_whose_tails_fall_and_whose_integral_is_nearly_one():
    target = wk.convert(wk.Comparisons(**answers(ring, uniform(4.0), 1_000)))
    assert kl(ring, target) < 0.12 and "Gaussian process" in target.origin.assumed[1]
    assert target.access == wk.Access.parse("log_prob, differentiable")
    line = torch.linspace(-8, 8, 401, dtype=D)
    whole = target.log_prob(torch.cartesian_prod(line, line)).logsumexp(0) + 2 * math.log(16 / 400)
    assert abs(float(whole)) < 0.03  # three times the error of 16,384 draws
    far = target.log_prob(torch.tensor([[1e2, 0.0], [1e3, 0.0], [-1e3, 1e3]], dtype=D))
    assert far[0] < -100 and far[1] < 50 * far[0] and far[2] < far[1]
    value, score = target.value_and_score(torch.tensor([[2.0, 0.3]], dtype=D))
    at, steps = torch.tensor([2.0, 0.3], dtype=D), 1e-5 * EYE
    ends = target.log_prob(torch.cat([at + steps, at - steps]))
    torch.testing.assert_close((ends[:2] - ends[2:]) / 2e-5, score[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_answers_of_another_noise_give_a_power():
    given = answers(unit_normal, uniform(4.0, 1), 1_500, noise=2.0)
    half, whole = (wk.convert(wk.Comparisons(**given, noise=noise)) for noise in (1.0, 2.0))
    assert kl(lambda x: unit_normal(x) / 2, half, 15.0) < 0.02 < kl(unit_normal, half, 15.0)
    assert kl(unit_normal, whole, 15.0) < 0.02
    assert "noise = 2" in whole.origin.assumed[0] and "p^(1/c)" in whole.origin.unknown[0]


def test_positive_columns_have_no_mass_below_zero_and_the_density_is_that_of_x():
    p = LogNormal(torch.tensor(0.0, dtype=D), torch.tensor(0.7, dtype=D))
    given = answers(lambda x: p.log_prob(x)[:, 0], lambda n, g: 5 * torch.rand(n, 1, generator=g, dtype=D) + 1e-3, 1_000)
    target = wk.convert(wk.Comparisons(**given, support="positive"))
    assert float(target.log_prob(torch.tensor([[-1.0]], dtype=D))) == -math.inf
    x = torch.linspace(0.01, 20, 4_001, dtype=D)[:, None]
    log_p, log_q = p.log_prob(x)[:, 0].log_softmax(0), target.log_prob(x).log_softmax(0)
    assert float((log_p.exp() * (log_p - log_q)).sum()) < 0.03
    assert target.bijection.describe() == ["positive"]


def test_the_answer_does_not_depend_on_units():
    given = answers(unit_normal, uniform(3.0), 200)
    scale, shift = torch.tensor([1e3, 1e-2], dtype=D), torch.tensor([5.0, -7.0], dtype=D)
    target = wk.convert(wk.Comparisons(**given))
    moved = wk.convert(wk.Comparisons(**{name: scale * x + shift for name, x in given.items()}))
    x = given["winners"][:50]
    torch.testing.assert_close(moved.log_prob(scale * x + shift) + scale.log().sum(), target.log_prob(x), rtol=1e-5, atol=1e-5)
    again = wk.convert(wk.Comparisons(**given))
    assert torch.equal(again.log_prob(x), target.log_prob(x))


def test_names_and_frames_are_kept():
    given = {name: pd.DataFrame(x.numpy(), columns=["a", "b"]) for name, x in answers(unit_normal, uniform(3.0), 200).items()}
    comparisons = wk.Comparisons(**given)
    target = wk.convert(comparisons)
    assert target.names == ("a", "b") and repr(comparisons) == "Comparisons(200 pairs, dim=2, noise=1)"
    assert wk.fit(target).names == ("a", "b")


@pytest.fixture(scope="module")
def converted():
    return wk.convert(wk.Comparisons(**answers(unit_normal, uniform(3.0), 600)))


def test_values_rest_on_the_temperature_and_are_not_subtracted_from_others(converted, tmp_path):
    reverse = wk.fit(converted, objective="reverse_kl")
    value = reverse.value
    assert value.up_to == "temperature"
    assert all("at an assumed temperature" in text for text in (str(value), value.sentence, value.cells[1]))
    assert (value - value).value == 0
    absolute = wk.fit(wk.Target.of(Normal(0.0, 1.0))).value
    for other in (replace(value, quantity="forward_kl"), replace(value, up_to=None), absolute):
        with pytest.raises(wk.InputError, match=r"Cannot subtract .*at an assumed temperature.*\."):
            value - other
    reverse.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    assert again.value.up_to == "temperature" and again.advice.origin.up_to == "temperature"
    assert reverse.check().value.up_to == "temperature"
    assert wk.estimate(p=converted, q=reverse, divergence="reverse_kl").up_to == "temperature"
    assert reverse.diagnostics.elbo.up_to == "temperature" and "at an assumed temperature" in str(reverse).split("ELBO")[1]
    assert "temperature" in wk.report(reverse, tmp_path / "report.html").read_text()


def test_a_study_says_that_its_values_rest_on_the_temperature(converted):
    study = wk.compare(converted, families=["gaussian"], seeds=2)
    assert {row["reverse_kl_up_to"] for row in study.rows} == {"temperature"}
    assert all(f"{name} at an assumed temperature" in str(study) for name in ("forward_kl", "reverse_kl"))
    row = {"reverse_kl": 0.1, "reverse_kl_up_to": "temperature", "forward_kl": 2.5, "forward_kl_up_to": "entropy_p, temperature"}
    words = {name: constants_of([row | {"jeffreys": 0.2}], name) for name in ("forward_kl", "jeffreys", "ess_q")}
    assert words == {
        "forward_kl": "+ H(p) at an assumed temperature",
        "jeffreys": "at an assumed temperature",
        "ess_q": "",
    }


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_an_estimate_rests_on_the_temperature_whichever_side_was_converted(converted, divergence):
    known = MultivariateNormal(torch.zeros(2), torch.eye(2))
    for p, q in ((converted, known), (known, converted)):
        found = wk.estimate(p=p, q=q, divergence=divergence, n=500)
        assert found.up_to == "temperature" and "at an assumed temperature" in str(found)
    assert wk.estimate(p=known, q=known, divergence=divergence, n=500).up_to is None


def test_a_cross_entropy_at_a_temperature_is_no_divergence(converted):
    drawn = wk.Target(samples=torch.randn(400, 1))
    drawn.origin = converted.origin
    value = wk.fit(drawn).value
    assert value.up_to == "entropy_p, temperature" and value.includes_entropy
    assert str(value).startswith("cross-entropy KL(p‖q) + H(p) at an assumed temperature = 1.")
    assert "The cross-entropy, KL(p‖q) + H(p)," in value.sentence and "(at an assumed temperature)" in value.sentence
    with pytest.raises(wk.InputError, match=r"Cannot subtract .*up to H\(p\), at an assumed temperature.*"):
        value - replace(value, up_to="temperature")


def test_a_coin_decides_nothing():
    x = uniform(3.0)(600, torch.Generator().manual_seed(0))
    target = wk.convert(wk.Comparisons(winners=x[:300], losers=x[300:]))
    assert not target.origin.reliable and "a coin's" in target.origin.trust
    fit = wk.fit(target)
    assert "target_in_doubt" in fit.findings and not fit.value.reliable


def test_mass_where_nobody_compared_is_measured_and_makes_the_density_unreliable():
    corner = lambda n, g: 2 * torch.rand(n, 2, generator=g, dtype=D)  # noqa: E731
    target = wk.convert(wk.Comparisons(**answers(unit_normal, corner, 1_000)))
    assert not target.origin.reliable and "compare points there" in target.origin.trust
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 4_000, 2, generator=g, dtype=D)
    assert abs(Places.of(x[1]).share_elsewhere(x[0]) - 0.01) < 0.01
    assert abs(Places.of(x[1]).share_elsewhere(torch.cat([x[0], x[0] + 3])) - 0.505) < 0.01


def test_ties_are_left_out_and_counted():
    given = answers(unit_normal, uniform(3.0), 300)
    tied = {name: torch.cat([x, given["winners"][:7]]) for name, x in given.items()}
    plain, target = wk.convert(wk.Comparisons(**given)), wk.convert(wk.Comparisons(**tied))
    assert target.origin.left_out == ("7 comparisons of a point with itself: they tell nothing.",)
    assert torch.equal(plain.log_prob(given["losers"]), target.log_prob(given["losers"]))


def test_contradictions_and_repeats_are_answers_like_others():
    items = 2 * torch.randn(12, 1, generator=torch.Generator().manual_seed(1), dtype=D)
    given = answers(unit_normal, lambda n, g: items[torch.randint(12, (n,), generator=g)], 1_500)
    target = wk.convert(wk.Comparisons(**given))
    assert kl(unit_normal, target, 12.0) < 0.1


REFUSED = {
    "noise 0": ({"noise": 0.0}, "noise"),
    "infinite noise": ({"noise": math.inf}, "noise"),
    "one loser fewer": ({"losers": torch.zeros(59, 2)}, r"shape \(60, 2\).*\(59, 2\)"),
    "other columns": ({"losers": torch.zeros(60, 3)}, r"\(60, 3\)"),
    "NaN": ({"losers": torch.full((60, 2), math.nan)}, "`losers`"),
    "pairs (x, y)": ({"winners": (torch.randn(60, 2), torch.randn(60))}, "pairs"),
    "few": ({"winners": torch.randn(5, 2), "losers": torch.randn(5, 2)}, "5 comparisons"),
    "ties only": ({"winners": torch.ones(60, 2), "losers": torch.ones(60, 2)}, "60 of a point with itself"),
    "outside the support": ({"support": "positive"}, "`winners`.*outside the support"),
    "discrete": ({"winners": torch.ones(60, 2), "losers": torch.zeros(60, 2), "support": "boolean"}, "discrete"),
    "an end of the support": (
        {"winners": torch.rand(60, 2), "losers": torch.rand(60, 2).round(), "support": "unit_interval"},
        "`losers`.*an end of the support",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_set_of_comparisons_is_refused(name):
    changed, words = REFUSED[name]
    g = torch.Generator().manual_seed(0)
    given = {"winners": torch.randn(60, 2, generator=g), "losers": torch.randn(60, 2, generator=g)} | changed
    with pytest.raises(wk.WhichklError, match=rf"(?s)^Cannot (?=.*{words}).+: .+\. [A-Z].+\.$"):
        wk.Comparisons(**given)


def test_what_no_density_can_be_fitted_to_is_refused():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 60, 2, generator=g, dtype=D)
    flat = torch.cat([a[:, :1], torch.ones_like(a[:, :1])], 1), torch.cat([b[:, :1], torch.ones_like(b[:, :1])], 1)
    wide = torch.randn(2, 60, 31, generator=g, dtype=D)
    for x, y, words in ((*flat, "`x2`"), (*wide, "31 free columns")):
        with pytest.raises(wk.WhichklError, match=rf"^Cannot convert these comparisons: .*{words}.*\. [A-Z].+\.$"):
            wk.convert(wk.Comparisons(winners=x, losers=y))
    with pytest.raises(wk.InputError, match="n=0"):
        wk.convert(wk.Comparisons(winners=a, losers=b), n=0)


@pytest.mark.parametrize("noise", [1.0, 1e-3], ids=["far apart", "no noise"])
def test_saturated_comparisons_are_refused(noise):
    given = answers(unit_normal, uniform(60.0 if noise == 1 else 3.0), 300, noise=noise)
    with pytest.raises(wk.TargetError, match=r"9\d% of the pairs are saturated|100% of the pairs are saturated"):
        wk.convert(wk.Comparisons(**given, noise=noise))


def test_the_simplest_model_within_an_error_of_the_least_loss_is_chosen():
    g = torch.Generator().manual_seed(0)
    base = torch.rand(1_000, generator=g, dtype=D)
    noise = 0.1 * torch.randn(1_000, generator=g, dtype=D)
    noise = noise - noise.mean()
    known = [True] * 3
    assert chosen_by_loss([base + 0.05, base + noise + 1e-4, base], known) == 1  # a thirtieth of an error
    assert chosen_by_loss([base, base + 1], known[:2]) == 0
    assert chosen_by_loss([base + 1e-9, base], known[:2]) == 1  # no noise between them


def test_a_model_with_mass_where_nobody_compared_must_be_significantly_better():
    g = torch.Generator().manual_seed(0)
    base, noise = torch.rand(1_000, generator=g, dtype=D), torch.randn(1_000, generator=g, dtype=D)
    noise = math.sqrt(1_000) * 1e-3 * (noise - noise.mean()) / noise.std()  # the error of the mean is 1/1000
    losses = [base + noise + 1.5e-3, base]
    assert chosen_by_loss(losses, [True, False]) == 0 and chosen_by_loss(losses, [True, True]) == 1
    assert chosen_by_loss([base + noise + 2.5e-3, base], [True, False]) == 1
    assert chosen_by_loss(losses, [False, False]) == 1


@pytest.fixture(scope="module")
def pairs():
    given = answers(BIMODAL.log_prob, uniform(5.0), 300)
    return Pairs(given["winners"] / 3, given["losers"] / 3, torch.linspace(-0.2, 0.2, 300, dtype=D), 1.5)


def test_newton_ends_where_the_gradient_of_the_posterior_vanishes(pairs):
    basis = _Basis(pairs.winners[:40], 0.8, 1.5)
    objective = _Posterior.of(basis, pairs)
    theta, factor = objective.minimum(objective.start)

    def value(theta):
        d = pairs.dim
        margin = objective.margin(theta)
        bend = (objective.spread @ theta[objective.trend]).view(d, d)
        prior = (objective.ridge * theta).dot(theta) / 2 + objective.rate.dot(theta) - bend.logdet() / 2
        return torch.nn.functional.softplus(-margin).sum() + prior

    assert float(torch.autograd.functional.jacobian(value, theta).abs().max()) < 1e-4
    hessian = torch.autograd.functional.hessian(value, theta)
    torch.testing.assert_close(factor @ factor.T, hessian)
    process = basis.process(theta)
    torch.testing.assert_close(pairs.margin(process.log_prob(pairs.points)), objective.margin(theta), rtol=1e-6, atol=1e-6)


def test_the_loss_of_left_out_answers_is_nearly_that_of_fits_without_them(pairs):
    objective = _Posterior.of(_Basis(pairs.winners[:40], 0.8, 1.0), pairs)
    theta, factor = objective.minimum(objective.start)
    every = torch.arange(len(pairs))
    exact = 0.0
    for i in range(0, 300, 10):
        without, _ = objective.only(every != i).minimum(theta)
        exact += float(torch.nn.functional.softplus(-objective.margin(without)[i]))
    subset = sum(objective.only(every == i).unseen_loss(theta, factor) for i in range(0, 300, 10))
    assert math.isclose(subset, exact, rel_tol=0.05)


def test_few_answers_in_five_columns_give_a_wide_density_and_no_collapse():
    target = wk.convert(wk.Comparisons(**answers(unit_normal, lambda n, g: 2 * torch.randn(n, 5, generator=g, dtype=D), 300)))
    x = torch.randn(5_000, 5, generator=torch.Generator().manual_seed(3), dtype=D)
    log_p = unit_normal(x) - 5 / 2 * math.log(2 * math.pi)
    assert float((log_p - target.log_prob(x)).mean()) < 1.0  # log Z of the target is known


def test_mixtures_have_the_log_density_that_was_fitted_and_unseen_losses_are_no_less(pairs):
    found = fit_mixtures(pairs, torch.Generator().manual_seed(0))
    assert [len(model.mixture_distribution.probs) for model, _ in found] == [1, 2, 3, 4]
    for model, unseen in found:
        seen = torch.nn.functional.softplus(-pairs.margin(model.log_prob(pairs.points)))
        assert len(unseen) == len(pairs) and float(unseen.mean()) > float(seen.mean())


def test_the_process_is_a_quadratic_far_from_its_centers(pairs):
    process, _ = fit_process(pairs, 40)
    assert isinstance(process, Process)
    z = 50 * Normal(0.0, 1.0).sample((20, 2)).to(D)
    quadratic = z @ process.slope - (process.bend[0] * z[:, 0] ** 2 + process.bend[2] * z[:, 1] ** 2) / 2
    quadratic = quadratic - process.bend[1] * z[:, 0] * z[:, 1]
    torch.testing.assert_close(process.log_prob(z), quadratic)
    assert process.bend[0] > 0 and process.bend[0] * process.bend[2] > process.bend[1] ** 2
