"""Simulators: pairs on the prior's support, failed simulations, proposals, calibration, unlikeness, workers and journals."""

import math
import multiprocessing
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Gamma,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)

import whichkl as wk
from whichkl.conversions.simulations_prior import read_prior
from whichkl.conversions.simulator_runs import _parts_of
from whichkl.families.regression import Regression
from whichkl.solvers.draws.stochastic import Stochastic

DTYPE = torch.float64
PRIOR = Independent(Normal(torch.zeros(2, dtype=DTYPE), torch.ones(2, dtype=DTYPE)), 1)
BOX = Independent(Uniform(torch.tensor([-1.0, 2.0], dtype=DTYPE), torch.tensor([1.0, 5.0], dtype=DTYPE)), 1)


def noisy(theta):
    return theta + torch.randn_like(theta)


def exact(x):
    """The posterior of `noisy` under `PRIOR`."""
    return Independent(Normal(torch.as_tensor(x) / 2, math.sqrt(0.5)), 1)


def pairs(n, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    theta = scale * torch.randn(n, 2, generator=generator, dtype=DTYPE)
    return theta, theta + torch.randn(n, 2, generator=generator, dtype=DTYPE)


def wide(scale):
    return Independent(Normal(torch.zeros(2, dtype=DTYPE), scale * torch.ones(2, dtype=DTYPE)), 1)


# --- pairs


def test_a_simulator_becomes_pairs_whose_forward_kl_fit_is_the_posterior():
    target = wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=20_000)
    assert target.samples.shape == (20_000, 2) and target.context.shape == (20_000, 2)
    assert target.names == ("theta1", "theta2") and wk.advise(target).best.objective.name == "forward_kl"
    law = wk.fit(target, wk.families.LinearGaussian()).model([[1.0, -2.0]])
    torch.testing.assert_close(law.mean[0], torch.tensor([0.5, -1.0], dtype=DTYPE), atol=6 * math.sqrt(0.5 * 6 / 20_000), rtol=0)
    torch.testing.assert_close(law.variance[0], torch.full((2,), 0.5, dtype=DTYPE), atol=6 * 0.5 * math.sqrt(2 / 20_000), rtol=0)


def test_the_posterior_has_the_priors_support_whose_bounds_differ_per_parameter():
    target = wk.convert(wk.Simulator(prior=BOX, simulate=noisy), n=300)
    assert target.bijection.bounds == [(-1.0, 1.0), (2.0, 5.0)]
    fit = wk.fit(target, wk.families.Flow(transforms=1, hidden=(8,)), judge=False)
    theta = fit.model([[30.0, -30.0]]).sample((500,))[:, 0]
    assert bool(target.bijection.contains(theta).all())


def test_the_seed_determines_the_simulations_and_leaves_the_global_states():
    simulator = wk.Simulator(prior=PRIOR, simulate=noisy)
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one, same, other = (simulator.run(700, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.data, same.data) and torch.equal(one.parameters, same.parameters)
    assert not torch.equal(one.data, other.data)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()


def test_simulations_made_before_are_the_same_pairs():
    made = wk.Simulator(prior=PRIOR, simulate=noisy).run(500)
    frame = pd.DataFrame(made.data.numpy(), columns=["height", "weight"])
    target = wk.convert(wk.Simulations(prior=PRIOR, parameters=made.parameters.numpy(), data=frame))
    assert torch.equal(target.samples, made.parameters) and torch.equal(target.context, made.data)
    assert target.context_names == ("height", "weight")
    assert len(wk.convert(wk.Simulations(prior=PRIOR, parameters=made.parameters, data=frame), n=100).samples) == 100


# --- priors


@pytest.mark.parametrize(
    ("prior", "bounds", "names"),
    [
        (Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0])), [(0, 1), (1, 3)], ("x1", "x2")),
        (Normal(0.0, 1.0), [(-math.inf, math.inf)], ("x1",)),
        ({"rate": LogNormal(0.0, 1.0), "p": Beta(2.0, 2.0)}, [(0, math.inf), (0, 1)], ("rate", "p")),
        ([Gamma(2.0, 1.0), PRIOR], [(0, math.inf), *[(-math.inf, math.inf)] * 2], ("x1", "x2", "x3")),
        ({"a": BOX, "b": Normal(0.0, 1.0)}, [(-1, 1), (2, 5), (-math.inf, math.inf)], ("a1", "a2", "b")),
        (wk.Target(sampler=lambda n: torch.rand(n, 1), dim=1, support="unit_interval"), [(0, 1)], ("x1",)),
    ],
    ids=["box", "number", "named", "list", "vectors", "sampler"],
)
def test_priors(prior, bounds, names):
    target = read_prior(prior)
    assert target.bijection.bounds == bounds and target.names == names
    drawn = target.draws(100, 0)
    assert bool(target.bijection.contains(drawn).all())
    if target.density is not None:
        parts = [prior] if not isinstance(prior, (dict, list)) else [*prior.values()] if isinstance(prior, dict) else prior
        ends = np.cumsum([0, *(wk.Target.of(one).dim if one.batch_shape == () else len(bounds) for one in parts)])
        found = [
            one.log_prob(x[:, 0] if one.event_shape == () and one.batch_shape == () else x).reshape(len(x), -1).sum(1)
            for one, x in zip(parts, np.split(drawn.double(), ends[1:-1], axis=1), strict=True)
        ]
        torch.testing.assert_close(target.log_prob(drawn).double(), sum(found).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        (Categorical(torch.ones(3)), "discrete"),
        (wk.Target(log_prob=lambda x: -x.square().sum(1), dim=2), "`sampler=`"),
        (torch.zeros(3, 2), "no distribution"),
        ({}, "no distribution"),
        ([Dirichlet(torch.ones(3)), Normal(0.0, 1.0)], "binds its columns together"),
        ({"a": BOX, "a1": Normal(0.0, 1.0)}, "twice"),
        (Normal, "the class `Normal`"),
        (MultivariateNormal(torch.zeros(3, 2), torch.eye(2)), "batch shape"),
    ],
)
def test_what_is_no_prior_is_refused(prior, said):
    with pytest.raises(wk.InputError, match=rf"^Cannot .*{said}"):
        wk.Simulator(prior=prior, simulate=noisy)


# --- how simulators are called


def test_one_point_at_a_time_arrays_and_generators_are_understood():
    def of_arrays(theta):
        return np.random.normal(np.asarray(theta)) if isinstance(theta, np.ndarray) else np.linalg.norm("a tensor")

    def of_one_point(theta):
        return [float(theta[0] + theta[1]) + np.random.normal()]

    def with_generator(theta, generator):
        return theta + torch.randn(theta.shape, generator=generator, dtype=theta.dtype)

    for simulate, batched, width in ((of_arrays, True, 2), (of_one_point, False, 1), (with_generator, True, 2)):
        made = wk.Simulator(prior=PRIOR, simulate=simulate, batched=batched).run(400)
        assert made.data.shape == (400, width)
        noise = made.data[:, 0] - (made.parameters.sum(1) if width == 1 else made.parameters[:, 0])
        assert len(noise.unique()) == 400
        assert scipy.stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


def test_a_simulator_gets_parameters_of_the_priors_type():
    kinds = set()

    def simulate(theta):
        kinds.add(theta.dtype)
        return noisy(theta)

    made = wk.Simulator(prior=Normal(torch.zeros(2), torch.ones(2)), simulate=simulate).run(50)
    assert kinds == {torch.float32} and made.data.dtype == torch.float64


def noise_of_one_point(theta):
    return theta + torch.randn(2)


def first_coordinate(theta):
    return torch.stack([theta[0] * 2, theta[1]])


@pytest.mark.parametrize(
    ("simulate", "batched", "said"),
    [
        (noise_of_one_point, True, r"the same random numbers.*Pass `batched=False`"),
        (first_coordinate, True, r"2 rows of data for 3 rows of parameters.*`batched=False`"),
        (lambda theta: None, True, "returned None"),
        (lambda theta: theta.sum(), True, "1 row of data for 3 rows"),
        (lambda theta: theta[:, :, None], True, r"shape \(3, 2, 1\)"),
        (lambda theta: theta[None], False, r"shape \(1, 2\) for one point"),
        (lambda theta: theta[: 1 + int(theta[0] > 0)], False, "rows of 1 number and rows of 2"),
        (lambda theta: [["a"] * 2] * len(theta), True, "not a number"),
    ],
)
def test_data_of_another_form_are_refused(simulate, batched, said):
    with pytest.raises(wk.InputError, match=rf"^Cannot use these simulations: .*{said}"):
        wk.convert(wk.Simulator(prior=PRIOR, simulate=simulate, batched=batched), n=100)


def test_a_deterministic_simulator_is_taken():
    assert wk.Simulator(prior=PRIOR, simulate=lambda theta: theta.square()).run(10).data.shape == (10, 2)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("error", [ZeroDivisionError("no such orbit"), SystemExit(3)], ids=["error", "exit"])
def test_an_exception_of_a_simulator_is_named_with_its_parameters(batched, error):
    theta = wk.Simulator(prior=PRIOR, simulate=noisy).run(200).parameters
    row = int(theta[:, 0].argmax())

    def simulate(one):
        if bool((one[..., 0] == theta[row, 0]).any()):
            raise error
        return noisy(one)

    with pytest.raises(wk.TargetError) as caught:
        wk.Simulator(prior=PRIOR, simulate=simulate, batched=batched).run(200)
    said = str(caught.value)
    assert f"theta1 = {float(theta[row, 0]):.6g}, theta2 = {float(theta[row, 1]):.6g} (simulation {row})" in said
    assert ("no such orbit" in said or "sys.exit(3)" in said) and "return NaN where a simulation fails" in said


def test_parts_differ_in_size_and_cover_all_rows():
    for n in (1, 2, 5, 100, 10_000):
        parts = _parts_of(torch.arange(n, dtype=DTYPE)[:, None])
        assert torch.cat([one.theta for one in parts])[:, 0].tolist() == list(range(n))
        assert [one.first for one in parts] == [int(one.theta[0, 0]) for one in parts]
        assert n < 3 or len({len(one.theta) for one in parts}) > 1


# --- workers and journals


def test_a_journal_resumes_and_spares_what_was_simulated(tmp_path):
    calls = []

    def simulate(theta):
        calls.append(len(theta))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return noisy(theta)

    stop = 0
    whole = wk.Simulator(prior=PRIOR, simulate=simulate).run(1_000)
    needed, stop = sum(calls), 60
    calls.clear()
    simulator = wk.Simulator(prior=PRIOR, simulate=simulate, journal=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        simulator.run(1_000)
    done, stop = sum(calls[:-1]), 0
    calls.clear()
    assert torch.equal(simulator.run(1_000).data, whole.data)
    assert sum(calls) <= needed - done + 6 + 2  # the call is checked again, and the first part is compared
    calls.clear()
    assert torch.equal(simulator.run(1_000).data, whole.data)
    assert sum(calls) == len(_parts_of(whole.parameters)[0].theta)  # the first part is compared
    assert not torch.equal(simulator.run(1_000, seed=1).data, whole.data) and calls


def test_a_journal_of_a_changed_simulator_or_of_unseeded_randomness_is_refused(tmp_path):
    scale = 1.0

    def simulate(theta):
        return theta + scale * torch.randn_like(theta)

    simulator = wk.Simulator(prior=PRIOR, simulate=simulate, journal=tmp_path / "kept")
    simulator.run(100)
    scale = 2.0
    with pytest.raises(wk.InputError, match=r"Cannot resume these simulations: .*come out otherwise now.*Name a new folder"):
        simulator.run(100)


def by_workers(seed):
    found = []
    for simulate in (noisy, raises_at_large):
        try:
            found.append(wk.Simulator(prior=PRIOR, simulate=simulate, workers=2).run(300, seed=seed).data.numpy())
        except wk.TargetError as error:
            found.append(str(error))
    return found


def raises_at_large(theta):
    if bool((theta > 2).any()):
        raise ArithmeticError("too large")
    return noisy(theta)


def _sent(send, seed):
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    send.send(by_workers(seed))


@pytest.mark.slow
def test_processes_give_the_same_simulations_and_name_the_parameters():
    pytest.importorskip("ray")
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_sent, args=(send, 4))
    process.start()
    send.close()
    try:
        data, said = receive.recv()
    finally:
        process.join()
        receive.close()
    np.testing.assert_array_equal(data, wk.Simulator(prior=PRIOR, simulate=noisy).run(300, seed=4).data.numpy())
    assert said.startswith("Cannot simulate: it raised ArithmeticError: too large") and "(simulation " in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"workers": 0}, "at least 1"), ({"workers": 2, "cluster": "auto"}, "Give one of them"), ({"cluster": "no"}, "address")],
)
def test_workers_that_cant_be_used_are_refused(arguments, said):
    with pytest.raises(wk.InputError, match=said):
        wk.Simulator(prior=PRIOR, simulate=noisy, **arguments)


@pytest.mark.parametrize("n", [0, -5, 10**9, 2.5])
def test_numbers_of_simulations_are_checked(n):
    with pytest.raises(wk.InputError):
        wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=n)


# --- failed simulations


def test_failed_simulations_are_left_out_counted_and_leave_the_posterior():
    theta, x = pairs(40_000)
    failed = x[:, 0] > 1
    x[failed, 1] = torch.inf
    target = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x))
    assert len(target.samples) == 40_000 - int(failed.sum())
    (sentence,) = target.origin.left_out
    assert sentence.startswith(f"{int(failed.sum()):,} of 40,000 simulations ({float(failed.double().mean()):.1%})")
    assert "The posterior at valid data is the same" in sentence and target.origin.reliable
    law = wk.fit(target, wk.families.LinearGaussian(), judge=False).model([[-1.0, 0.5]])
    torch.testing.assert_close(law.mean[0], torch.tensor([-0.5, 0.25], dtype=DTYPE), atol=6 * math.sqrt(0.5 * 4 / 30_000), rtol=0)


def test_a_simulator_that_always_fails_is_refused():
    with pytest.raises(wk.InputError, match=r"0 of 500 have finite data.*correct the simulator"):
        wk.convert(wk.Simulator(prior=PRIOR, simulate=lambda theta: theta * torch.nan), n=500)


# --- proposals


def test_a_proposal_is_corrected_by_weights_with_their_ess():
    theta, x = pairs(40_000, scale=1.5)
    target = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=wide(1.5)))
    exact_share = (1 / (1.5**2 / math.sqrt(2 * 1.5**2 - 1))) ** 2  # 1 / E w²
    ess = float(target.weights.sum().square() / target.weights.square().sum())
    assert ess == pytest.approx(40_000 * exact_share, rel=0.05)
    assert f"leave {ess:,.0f} effective simulations of 40,000 (PSIS k̂ below 0)" in target.origin.trust and target.origin.reliable
    law = wk.fit(target, wk.families.LinearGaussian(), judge=False).model([[1.0, -2.0]])
    torch.testing.assert_close(law.mean[0], torch.tensor([0.5, -1.0], dtype=DTYPE), atol=6 * math.sqrt(0.5 * 6 / ess), rtol=0)
    drawn = wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy, proposal=wide(1.5)), n=500)
    assert drawn.weights is not None and float(drawn.samples.std()) > 1.2


def test_a_proposal_that_lacks_the_priors_support_is_refused():
    theta = BOX.sample((100,))
    inner = Independent(Uniform(torch.tensor([-0.5, 2.0], dtype=DTYPE), torch.tensor([1.0, 5.0], dtype=DTYPE)), 1)
    kept = theta[inner.base_dist.support.check(theta).all(1)]
    with pytest.raises(wk.TargetError, match=r"lacks the prior's support: its density is 0 at 2\d\.\d\d% of the prior's draws"):
        wk.Simulations(prior=BOX, parameters=kept, data=kept, proposal=inner)
    with pytest.raises(wk.InputError, match="Give the distribution that the parameters were drawn from"):
        wk.Simulations(prior=BOX, parameters=theta, data=theta, proposal=inner)


def test_parameters_outside_the_priors_support():
    theta = torch.cat([BOX.sample((300,)), torch.tensor([[5.0, 3.0]], dtype=DTYPE)])
    with pytest.raises(wk.InputError, match=r"1 of 301 rows of parameters lie outside.*row 300 \(5, 3\).*`proposal=`"):
        wk.Simulations(prior=BOX, parameters=theta, data=theta)
    around = Independent(Normal(torch.tensor([0.0, 3.5], dtype=DTYPE), torch.tensor([1.0, 1.5], dtype=DTYPE)), 1)
    drawn = around.sample((2_000,))
    target = wk.convert(wk.Simulations(prior=BOX, parameters=drawn, data=noisy(drawn), proposal=around))
    inside = int(BOX.base_dist.support.check(drawn).all(1).sum())
    assert len(target.samples) == inside and f"{2_000 - inside:,} of 2,000" in target.origin.left_out[0]


def test_log_densities_of_a_proposal_do_what_its_law_does():
    theta, x = pairs(2_000, scale=1.5)
    log_q = wide(1.5).log_prob(theta)
    made = [wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=one)) for one in (wide(1.5), log_q)]
    torch.testing.assert_close(made[0].weights, made[1].weights)
    assert made[1].origin.reliable
    narrow = PRIOR.log_prob(theta) > PRIOR.log_prob(theta).median()  # a proposal that is 0 where half of the prior's mass is
    cut = wk.Simulations(prior=PRIOR, parameters=theta[narrow], data=x[narrow], proposal=log_q[narrow])
    assert "not 1" in wk.convert(cut).origin.trust and not wk.convert(cut).origin.reliable
    for bad, said in ((log_q[:-1], "one log density per row"), (log_q.clone().fill_(-torch.inf), "its density is 0 at 2,000 of")):
        with pytest.raises(wk.InputError, match=said):
            wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=bad)
    with pytest.raises(wk.InputError, match="log densities of the proposal"):
        wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=log_q.clone().index_fill_(0, torch.tensor([3]), torch.nan))


def test_a_proposal_that_is_too_narrow_makes_every_fit_unreliable():
    theta, x = pairs(2_000, scale=0.5)
    target = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=wide(0.5)))
    assert not target.origin.reliable and "too narrow" in target.origin.trust
    fit = wk.fit(target, wk.families.LinearGaussian())
    assert "target_in_doubt" in fit.findings and fit.trust.startswith("Use neither")


def test_a_proposal_that_is_too_wide_leaves_too_few():
    theta, x = pairs(2_000, scale=8.0)
    target = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=wide(8.0)))
    assert not target.origin.reliable and "wider than the prior" in target.origin.trust


@pytest.mark.slow
def test_a_network_learns_from_all_simulations_of_a_proposal_that_is_much_too_wide():
    """The parameters are exp(z), so that the weights are carried to free coordinates, too."""
    z, x = pairs(1_500, scale=5.0)
    prior, proposal = (Independent(LogNormal(torch.zeros(2, dtype=DTYPE), sd), 1) for sd in (1.0, 5.0))
    target = wk.convert(wk.Simulations(prior=prior, parameters=z.exp(), data=x, proposal=proposal))
    assert float(target.weights.sum().square() / target.weights.square().sum()) < 0.1 * 1_500
    assert not target.origin.reliable and "Fit `Flow()`" in target.origin.trust
    family, solver = wk.families.Flow("maf", transforms=1, hidden=(8,)), Stochastic(steps=200, learning_rate=1e-3)
    fit = wk.fit(target, family, solver=solver)
    assert "target_in_doubt" not in fit.findings and "without weights: Calibrated" in " ".join(str(fit).split())
    z, x = pairs(4_000, seed=3)
    with torch.no_grad():
        gap = exact(x).log_prob(z) - (fit.model(x).log_prob(z.exp()) + z.sum(1))
    assert float(gap.mean()) < 0.05 + 4 * float(gap.std()) / math.sqrt(4_000)
    assert "target_in_doubt" in wk.fit(target, wk.families.LinearGaussian()).findings


@pytest.mark.parametrize(
    ("proposal", "said"),
    [
        (wk.Target(sampler=lambda n: torch.randn(n, 2), dim=2), "the proposal has only sampler"),
        (Normal(0.0, 1.0), "1 column, and the prior has 2"),
    ],
)
def test_a_proposal_without_density_or_of_another_size_is_refused(proposal, said):
    theta, x = pairs(50)
    with pytest.raises(wk.InputError, match=said):
        wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=proposal)


def test_parameters_that_arent_draws_of_the_prior_are_noticed():
    theta, x = pairs(2_000, scale=1.3)
    origin = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x)).origin
    assert not origin.reliable and "don't look like draws of the prior" in origin.trust
    origin = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x, proposal=wide(1.3))).origin
    assert origin.reliable


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": torch.zeros(49, 2)}, "50 rows of parameters and 49 rows of data"),
        ({"parameters": torch.zeros(50, 3)}, "3 columns, and the prior has 2"),
        ({"parameters": torch.full((50, 2), torch.nan)}, "NaN or infinite"),
    ],
)
def test_pairs_that_dont_match_are_refused(change, said):
    theta, x = pairs(50)
    with pytest.raises(wk.InputError, match=said):
        wk.Simulations(**{"prior": PRIOR, "parameters": theta, "data": x, **change})


# --- unlikeness


def test_unlikeness_is_uniform_for_draws_and_tiny_ten_deviations_out():
    origin = wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=5_000).origin
    fresh = wk.Simulator(prior=PRIOR, simulate=noisy).run(400, seed=9).data
    p = origin.unlikeness(fresh)
    assert scipy.stats.kstest(p.numpy(), "uniform").pvalue > 1e-6
    far = 10 * math.sqrt(2)
    assert origin.unlikeness([far, 0.0]) < 1e-3 and origin.unlikeness(torch.tensor([[0.0, -far]])) < 1e-3
    assert isinstance(origin.unlikeness(fresh[:1]), float)
    few = wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=1_000).origin
    assert scipy.stats.kstest(few.unlikeness(fresh).numpy(), "uniform").pvalue > 1e-6
    assert few.unlikeness([far, 0.0]) < 1e-3


def test_an_observation_in_a_hole_or_off_a_line_is_unlike_the_simulations():
    def on_a_ring(theta):
        angle = 2 * math.pi * torch.rand(len(theta))
        return torch.stack([angle.cos(), angle.sin()], 1) + 0.01 * torch.randn(len(theta), 2)

    assert wk.convert(wk.Simulator(prior=PRIOR, simulate=on_a_ring), n=3_000).origin.unlikeness([0.0, 0.0]) < 1e-3
    along = wk.Simulator(prior=Normal(0.0, 1.0), simulate=lambda theta: theta + torch.randn(len(theta), 1) * torch.ones(2))
    origin = wk.convert(along, n=3_000).origin
    assert origin.unlikeness([1.0, 1.0]) > 0.01 > 1e-3 > origin.unlikeness([1.0, -1.0])


@pytest.mark.parametrize("x", [[1.0], [1.0, 2.0, 3.0], [math.nan, 0.0], [[0.0, math.inf]], "word", None, []])
def test_observations_that_cant_be_compared_are_refused(x):
    origin = wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=100).origin
    with pytest.raises(wk.InputError, match="^Cannot "):
        origin.unlikeness(x)


# --- calibration


def test_calibration_passes_the_right_posterior_and_fails_biased_and_narrow_ones():
    simulator = wk.Simulator(prior=PRIOR, simulate=noisy)
    passed = sum(not simulator.run(300, seed=seed).calibration(exact).differs for seed in range(100))
    assert passed >= 95  # of 100, where 99 are expected: fewer have probability 0.0005
    made = simulator.run(1_000)
    for wrong in (
        lambda x: Independent(Normal(torch.as_tensor(x) / 2 + 0.3, math.sqrt(0.5)), 1),
        lambda x: Independent(Normal(torch.as_tensor(x) / 2, 0.6 * math.sqrt(0.5)), 1),
    ):
        found = made.calibration(wrong)
        assert found.differs and str(found).startswith("Not calibrated on 1,000 unseen rows")
    assert {one.name for one in found.columns} == {"theta1", "theta2", "joint density"}


def test_calibration_notices_a_posterior_that_loses_a_narrow_mode():
    """x = −θ below 0 and 10 θ above, with noise 0.1: the mode above 0 is a tenth as wide, and has an eleventh of the mass."""
    prior = Uniform(-3 * torch.ones(1, dtype=DTYPE), 3 * torch.ones(1, dtype=DTYPE))
    simulator = wk.Simulator(prior=prior, simulate=lambda theta: noisy(torch.where(theta < 0, -10 * theta, 100 * theta)) / 10)
    made = simulator.run(2_000)
    inside = (made.data[:, 0] > 0.5) & (made.data[:, 0] < 2.5)  # away from the ends of the box
    kept = wk.Simulations(prior=prior, parameters=made.parameters[inside], data=made.data[inside])

    def posterior(x, narrow):
        of_x = torch.as_tensor(x)
        weights = torch.tensor([1 - narrow, narrow], dtype=DTYPE).expand(len(of_x), 2)
        modes = Normal(torch.cat([-of_x, of_x / 10], 1)[..., None], torch.tensor([0.1, 0.01], dtype=DTYPE)[:, None])
        return MixtureSameFamily(Categorical(weights), Independent(modes, 1))

    assert not kept.calibration(lambda x: posterior(x, 1 / 11)).differs
    assert kept.calibration(lambda x: posterior(x, 1e-6)).differs


def test_calibration_counts_weights_of_a_proposal():
    made = wk.Simulator(prior=PRIOR, simulate=noisy, proposal=wide(1.5)).run(4_000)
    assert not made.calibration(exact).differs
    assert wk.Simulations(prior=wide(1.5), parameters=made.parameters, data=made.data).calibration(exact).differs


class Narrow(torch.nn.Module):
    """A posterior whose scale isn't trained."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5, dtype=DTYPE))

    def forward(self, x):
        return Independent(Normal(self.slope * x, 0.3), 1)


def test_a_fit_and_its_report_show_the_calibration(tmp_path):
    fit = wk.fit(wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=2_000), Narrow())
    for found in (fit, fit.check()):
        assert found.diagnostics.calibration.differs and "family_too_small" in found.findings and "Not calibrated" in str(found)
    page = wk.report(fit, tmp_path / "report.html").read_text()
    assert "imulation-based calibration" in page and "2,000 simulations" in page


# --- flows that start from a regression


def test_a_conditional_flow_starts_from_the_regression_and_keeps_it_when_saved(tmp_path):
    target = wk.convert(wk.Simulator(prior=PRIOR, simulate=noisy), n=4_000)
    fit = wk.fit(target, wk.families.Flow(transforms=1, hidden=(8,)), judge=False)
    theta, x = pairs(4_000, seed=3)
    with torch.no_grad():
        gap = exact(x).log_prob(theta) - fit.model(x).log_prob(theta)
    assert float(gap.mean()) < 0.02 + 4 * float(gap.std()) / math.sqrt(4_000)
    fit.save(tmp_path / "fit")
    again = wk.Fit.load(tmp_path / "fit")
    torch.testing.assert_close(again.model(x).log_prob(theta), fit.model(x).log_prob(theta))
    assert again.advice.origin.to_dict() == target.origin.to_dict()


@pytest.mark.slow
def test_a_narrow_posterior_is_followed_where_splines_of_the_priors_scale_are_too_coarse():
    theta, noise = pairs(2_000)[0], 1e-3
    x = theta + noise * torch.randn(2_000, 2, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
    fit = wk.fit(wk.Target(samples=(x, theta)), wk.families.Flow(transforms=1, hidden=(8,)), judge=False)
    with torch.no_grad():
        sd = fit.model([[0.3, -0.2]]).sample((2_000,)).std(0)
    torch.testing.assert_close(sd, torch.full_like(sd, noise), rtol=0.2, atol=0)


def test_a_regression_keeps_correlations_of_residuals_and_drops_their_noise():
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(400, 6, generator=generator, dtype=DTYPE), torch.randn(400, 1, generator=generator, dtype=DTYPE)

    def correlations(y):
        tril = Regression.of(y, x, torch.ones(400)).tril
        unit = tril / tril.norm(dim=1, keepdim=True)
        return (unit @ unit.T)[~torch.eye(len(tril), dtype=torch.bool)]

    noise = correlations(z)
    assert float(noise.square().mean()) < 0.3 * float(torch.corrcoef(z.T)[~torch.eye(6, dtype=torch.bool)].square().mean())
    shared = math.sqrt(0.8) * z[:, :1] + math.sqrt(0.2) * z[:, 1:]
    torch.testing.assert_close(correlations(shared), torch.full((20,), 0.8, dtype=DTYPE), atol=6 * 0.36 / 20, rtol=0)


def test_a_regression_with_few_rows_or_far_ones_stays_tame():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 40, generator=generator, dtype=DTYPE), torch.randn(30, 3, generator=generator, dtype=DTYPE)
    found = Regression.of(y, x, torch.ones(30))
    assert bool((found.tril.diagonal() > 0.05).all()) and float(found.slope.norm()) < 3
    assert Regression.of(y, torch.zeros(30, 1_001, dtype=DTYPE), torch.ones(30)) is None
    far = replace(found, slope=torch.ones(1, 1, dtype=DTYPE)).features(torch.tensor([[1e6]], dtype=DTYPE))
    assert float(far) == 4.0


def test_laws_and_columns_are_matched_by_name():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(300, 2, generator=generator, dtype=DTYPE) * torch.tensor([1.1, 1.4], dtype=DTYPE)
    x, law = (
        theta + torch.randn(300, 2, generator=generator, dtype=DTYPE),
        lambda sd: Normal(torch.zeros((), dtype=DTYPE), sd),
    )
    prior, proposal = {"a": law(1.0), "b": law(1.0)}, {"a": law(1.1), "b": law(1.4)}
    swapped = pd.DataFrame(theta.numpy()[:, ::-1], columns=["b", "a"])
    straight = wk.Simulations(prior=prior, parameters=theta, data=x, proposal=proposal)
    for other in ({"proposal": dict(reversed(proposal.items()))}, {"parameters": swapped, "proposal": proposal}):
        found = wk.Simulations(**{"prior": prior, "parameters": theta, "data": x, **other})
        assert torch.equal(found.parameters, theta) and torch.equal(found.weights.log_weights, straight.weights.log_weights)
    named = pd.DataFrame(theta.numpy(), columns=["u", "v"])
    partial = wk.Simulations(prior=prior, parameters=theta, data=x, proposal={"b": law(1.4)})
    whole = wk.Simulations(prior=prior, parameters=theta, data=x, proposal={"a": law(1.0), "b": law(1.4)})
    assert torch.equal(partial.weights.log_weights, whole.weights.log_weights)  # `a` was drawn from the prior
    drawn = wk.Simulator(prior=prior, simulate=noisy, proposal={"b": law(9.0)}).run(400).parameters.std(0)
    assert 0.8 < float(drawn[0]) < 1.2 and float(drawn[1]) > 7
    for wrong in ({"proposal": {"u": law(1.1), "v": law(1.4)}}, {"proposal": {"u": law(1.1)}}, {"parameters": named}):
        with pytest.raises(wk.InputError, match="those of the parameters `a`, `b`. Give each parameter under its name"):
            wk.Simulations(**{"prior": prior, "parameters": theta, "data": x, **wrong})


def test_targets_with_names_are_matched_by_name_too():
    theta = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    law = MultivariateNormal(torch.zeros(2, dtype=DTYPE), torch.eye(2, dtype=DTYPE))

    def named(*names):
        return wk.Target(sampler=lambda n: law.sample((n,)), log_prob=law.log_prob, normalized=True, dim=2, names=names)

    swapped = pd.DataFrame(theta.numpy()[:, ::-1], columns=["b", "a"])
    found = wk.Simulations(prior=named("a", "b"), parameters=swapped, data=theta)
    assert torch.equal(found.parameters, theta) and found.names == ("a", "b")
    with pytest.raises(wk.InputError, match="its parameters are `b`, `a`. Give them as `a`, `b`"):
        wk.Simulations(prior=named("a", "b"), parameters=theta, data=theta, proposal=named("b", "a"))


def test_laws_of_several_parameters_in_another_order_than_the_table_are_refused():
    theta, x = pairs(300)
    theta = torch.cat([theta, torch.randn(300, 1, generator=torch.Generator().manual_seed(1), dtype=DTYPE)], 1)
    one = Normal(torch.zeros((), dtype=DTYPE), 1.0)
    table, unnamed = pd.DataFrame(theta.numpy(), columns=["a1", "a2", "b"]), [PRIOR, one]
    straight = wk.Simulations(prior=unnamed, parameters=table, data=x, proposal={"a": wide(1.5), "b": one})
    with pytest.raises(wk.InputError, match="its parameters are `b`, `a1`, `a2`. Give them as `a1`, `a2`, `b`"):
        wk.Simulations(prior=unnamed, parameters=table, data=x, proposal={"b": one, "a": wide(1.5)})
    with pytest.raises(wk.InputError, match="Give each parameter under its name"):  # unnamed laws say nothing of the others
        wk.Simulations(prior=unnamed, parameters=table, data=x, proposal={"b": one})
    by_name = wk.Simulations(prior={"a": PRIOR, "b": one}, parameters=table, data=x, proposal={"b": one, "a": wide(1.5)})
    assert torch.equal(by_name.weights.log_weights, straight.weights.log_weights)


def test_all_parameters_that_were_given_are_compared_with_their_distribution():
    theta, x = pairs(4_000)
    theta[200:] *= 1.3
    few = wk.convert(wk.Simulations(prior=PRIOR, parameters=theta, data=x), n=200).origin
    assert not few.reliable and "don't look like draws of the prior" in few.trust
    assert "the data `x1`, `x2` and the parameters `theta1`, `theta2`" in few.source
