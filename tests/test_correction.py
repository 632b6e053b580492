"""Correction: draws and expectations of p by way of a fit, against known truths, or a refusal that says why."""

import math

import numpy as np
import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.importance import khat_limit

D = torch.float64
SEEDS = 8


def gumbel(dim):
    return wk.Target(log_prob=lambda x: (-x - torch.exp(-x)).sum(-1), dim=dim)


def funnel(scale, dim):
    def log_prob(x):
        inside = x[:, 1:].square().sum(-1) * torch.exp(-x[:, 0])
        return -(x[:, 0] / scale).square() / 2 - inside / 2 - (dim - 1) * x[:, 0] / 2

    return wk.Target(log_prob=log_prob, dim=dim)


def z_scores(fit, f, truth):
    """How many standard errors the expectations of f are from the truth, over seeds; one row a seed."""
    found = [fit.expect(f, seed=seed) for seed in range(SEEDS)]
    truth = torch.as_tensor(truth, dtype=D)
    return torch.stack([((one.value - truth) / one.stderr).reshape(-1) for one in found]), found


def hold(z):
    """Errors cover: none is absurd, and their mean over seeds isn't off."""
    return float(z.abs().max()) < 4.5 and float(z.mean(0).abs().max()) < 4.5 / math.sqrt(len(z))


def test_a_good_fit_is_corrected_by_weights():
    target = wk.Target(log_prob=lambda x: -(x - 1).square().sum(-1) / 2 - 0.02 * (x - 1).pow(4).sum(-1), dim=2)
    z, found = z_scores(wk.fit(target), lambda x: torch.stack([x[:, 0], (x[:, 0] > 1).double()], 1), [1.0, 0.5])
    assert {one.method for one in found} == {"importance weights"}
    assert all(one.khat <= 0.5 and one.n == 10_000 and 5_000 < one.ess <= 10_000 for one in found)
    assert hold(z)


def test_a_skewed_target():
    z, found = z_scores(wk.fit(gumbel(4)), lambda x: x, [0.5772156649] * 4)
    assert "particles" in {one.method for one in found}
    assert hold(z)


def test_a_mild_funnel():
    z, found = z_scores(wk.fit(funnel(1.5, 5)), lambda x: torch.stack([x[:, 0], x[:, 0].square()], 1), [0.0, 2.25])
    assert {one.method for one in found} == {"particles"}
    assert hold(z)


def test_a_deep_funnel_is_refused():
    with pytest.raises(
        TargetError, match="Cannot correct this fit's draws: it misses .* of p or more.*their averages still moved"
    ):
        wk.fit(funnel(3.0, 10)).expect(lambda x: x[:, 0])


def test_eight_schools_spread_between_schools(shared):
    draws = torch.from_numpy(np.load(shared / "posteriors" / "eight_schools-noncentered.npz")["draws"])
    tau = draws[:, 9].exp()
    fit = wk.fit(wk.problems.eight_schools())
    stderr = float(tau.std()) / math.sqrt(len(tau))
    for seed in range(3):
        found = fit.expect(lambda x: x[:, 9].exp(), seed=seed)
        assert abs(float(found.value) - float(tau.mean())) < 4 * math.hypot(stderr, float(found.stderr))
    plain = fit.expect(lambda x: x[:, 9].exp(), corrected=False)
    assert plain.method == "draws of q"
    assert plain.khat is None


def test_missed_modes_come_back_by_particles():
    def log_prob(x):
        return torch.logaddexp(-(x - 4).square().sum(-1) / 2 + math.log(0.7), -(x + 4).square().sum(-1) / 2 + math.log(0.3))

    fit = wk.fit(wk.Target(log_prob=log_prob, dim=2))
    assert "modes_missing" in fit.findings
    z, found = z_scores(fit, lambda x: (x[:, 0] > 0).double(), 0.7)
    assert {one.method for one in found} == {"particles"}
    assert hold(z)
    assert 0.15 < float((fit.draws(2_000, corrected=True)[:, 0] < 0).double().mean()) < 0.45


def test_draws_of_q_and_of_p():
    fit = wk.fit(gumbel(2))
    state = torch.random.get_rng_state()
    plain, corrected = fit.draws(4_000), fit.draws(4_000, corrected=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert plain.shape == corrected.shape == (4_000, 2)
    assert torch.equal(plain, fit.draws(4_000))
    assert torch.equal(corrected, fit.draws(4_000, corrected=True))
    assert not torch.equal(plain, fit.draws(4_000, seed=1))
    centred = corrected - corrected.mean(0)
    skewness = centred.pow(3).mean(0) / centred.square().mean(0).pow(1.5)
    assert float(skewness.min()) > 0.7  # of the Gumbel law it is 1.14, of a Gaussian 0


def test_draws_come_in_the_users_coordinates():
    target = wk.Target(log_prob=lambda x: -x.sum(-1), dim=2, support="positive")
    fit = wk.fit(target)
    assert bool((fit.draws(100, corrected=True) > 0).all())
    found = fit.expect(lambda x: x)
    assert float(((found.value - 1) / found.stderr).abs().max()) < 4.5
    one = wk.fit(torch.distributions.Exponential(torch.tensor(1.0, dtype=D)), objective="reverse_kl")
    assert one.draws(7).shape == (7, 1)


def test_shapes_and_words_of_an_expectation():
    fit = wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=2))
    assert fit.expect(lambda x: x[:, 0]).value.shape == ()
    found = fit.expect(lambda x: x.numpy())
    assert found.value.shape == found.stderr.shape == (2,)
    assert str(found).count("±") == 2
    assert "importance weights, 10,000 of 10,000" in str(found)


def test_a_loaded_fit_asks_for_its_target(tmp_path):
    target = gumbel(2)
    fit = wk.fit(target)
    fit.save(tmp_path)
    again = wk.Fit.load(tmp_path)
    assert torch.equal(again.draws(5), fit.draws(5))
    with pytest.raises(TargetError, match="a loaded fit doesn't hold its target. Pass `target=`"):
        again.expect(lambda x: x)
    torch.testing.assert_close(again.expect(lambda x: x, target=target).value, fit.expect(lambda x: x).value)


def test_what_cannot_be_corrected_is_refused():
    samples = wk.fit(torch.randn(200, 2, dtype=D))
    with pytest.raises(TargetError, match="the target has only samples"):
        samples.expect(lambda x: x)
    assert samples.expect(lambda x: x, corrected=False).value.shape == (2,)
    x = torch.randn(100, 2, dtype=D)
    y = x.sum(1) + torch.randn(100, dtype=D)
    conditional = wk.fit(wk.Target(samples=(x, y)), wk.families.LinearGaussian())
    for ask in (lambda: conditional.draws(5), lambda: conditional.expect(lambda x: x)):
        with pytest.raises(InputError, match=r"Use `fit.model\(x\)"):
            ask()
    for n in (0, 2.5, True):
        with pytest.raises(InputError, match="whole number"):
            samples.draws(n)
    for f in (lambda x: x.sum(), lambda x: x[None], lambda x: x[:5]):
        with pytest.raises(InputError, match="it returned shape"):
            samples.expect(f, corrected=False)
    with pytest.raises(InputError, match="isn't finite"):
        samples.expect(lambda x: x / 0, corrected=False)


def test_our_khat_is_arviz_on_the_log_weights_of_fits():
    az = pytest.importorskip("arviz")
    psislw = getattr(az, "psislw", None) or pytest.importorskip("arviz_stats").psislw
    for target in (wk.problems.eight_schools(), gumbel(4), funnel(1.5, 5), wk.problems.many_well(4, "log_prob")):
        fit = wk.fit(target)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            x = fit.model.sample((10_000,))
        log_weight = target.log_prob(x) - fit.model.log_prob(x)
        theirs = float(psislw(log_weight.numpy())[1])
        assert fit.diagnostics.khat == pytest.approx(theirs, abs=1e-6)
        assert khat_limit(10_000) == 0.7


def test_optima_that_a_fit_leaves_out_come_back_by_particles_too():
    def log_prob(x):
        return torch.logaddexp(-(x - 4).square().sum(-1) / 2 + math.log(0.7), -(x + 4).square().sum(-1) / 2 + math.log(0.3))

    fit = wk.fit(wk.Target(log_prob=log_prob, dim=2), judge=False)
    assert fit.diagnostics.leaves_optima_out and "modes_missing" not in fit.findings
    found = fit.expect(lambda x: (x[:, 0] > 0).double())
    assert found.method == "particles" and abs(float(found.value) - 0.7) < 4.5 * float(found.stderr)


def far(share, place):
    both = torch.distributions.Categorical(torch.tensor([1 - share, share], dtype=D))
    return torch.distributions.MixtureSameFamily(both, torch.distributions.Normal(torch.tensor([0.0, place], dtype=D), 1.0))


def banana(x):
    return -x[:, 0].square() / 8 - 2 * (x[:, 1] - x[:, 0].square()).square()


MISSED = {
    "a light far mode of a law": (lambda: wk.fit(far(0.02, 50.0)), lambda x: x[:, 0], 1.0),
    "the same in rows": (
        lambda: wk.fit(wk.Target(samples=rows_of(far(0.02, 20.0)), log_prob=lambda x: far(0.02, 20.0).log_prob(x[:, 0]), dim=1)),
        lambda x: x[:, 0],
        0.4,
    ),
    "the ends of a banana": (lambda: wk.fit(wk.Target(log_prob=banana, dim=2), "mixture:4"), lambda x: x[:, 1], 4.0),
}


def rows_of(law, n=4_000):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return law.sample((n,))[:, None]


@pytest.mark.parametrize("case", MISSED)
def test_mass_where_no_draw_comes_is_seen_by_points_of_p_and_weights_are_not_used(case):
    make, f, truth = MISSED[case]
    fit = make()
    assert fit.diagnostics.khat < 0.7 and fit.diagnostics.beyond > 0.01
    assert "weights_unreliable" in fit.findings and fit.trust.startswith("Use neither the fit nor its weights")
    found = fit.expect(f)
    assert found.method == "particles" and abs(float(found.value) - truth) < 4.5 * float(found.stderr)
    assert not any(key.startswith("p_") for row in fit.summary().rows for key in row)


def test_weights_of_a_fit_that_reaches_everything_stay():
    for target in (wk.problems.eight_schools(), wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2 - x[:, 0].exp(), dim=2)):
        assert not wk.fit(target).diagnostics.weights_miss_mass
    assert not wk.fit(wk.problems.bimodal()).diagnostics.weights_miss_mass
