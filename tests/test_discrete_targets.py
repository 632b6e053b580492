"""Reverse KL on discrete targets: against sums over all states, the equations of mean field, and each other."""

import itertools
import math

import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError, TargetError
from whichkl.families import Autoregressive, Categorical, Flow, Gaussian, Mixture, Product
from whichkl.families.layers import Shape
from whichkl.importance import pareto_smooth
from whichkl.problems import RestrictedBoltzmann, restricted_boltzmann
from whichkl.solvers import CoordinateAscent, Enumeration, ScoreFunction
from whichkl.solvers.states.score_function import Columns
from whichkl.targets.supports import Bijection

D = torch.float64
SMALL = Autoregressive(hidden=(16,))
QUICK = ScoreFunction(steps=60, cycles=1, draws=32, judged_on=256)


def every(counts):
    return torch.tensor(list(itertools.product(*(range(count) for count in counts))), dtype=D)


def potts(counts, seed=0, scale=1.5):
    """Any table of log probabilities, as a target of columns with these many categories."""
    table = scale * torch.randn(*counts, generator=torch.Generator().manual_seed(seed), dtype=D)
    support = [f"integer_interval(0, {count - 1})" for count in counts]

    def log_prob(x):
        return table[tuple(x.long().unbind(-1))]

    return wk.Target(log_prob=log_prob, dim=len(counts), support=support), table


def magnet(dim, field):
    """Spins s = 2x − 1 that all pull on each other: m = tanh(field · m) in mean field, three solutions above field 1."""
    pull = field / (dim - 1)

    def log_prob(x):
        spin = 2 * x - 1
        return pull / 2 * (spin.sum(-1).square() - dim)

    return wk.Target(log_prob=log_prob, dim=dim, support="boolean")


def magnetisation(field):
    m = 1.0
    for _ in range(1_000):
        m = math.tanh(field * m)
    return m


def brute_kl(model, log_p, x):
    """Σ q (log q − log p) + log Z, a state at a time."""
    total = 0.0
    for state, log in zip(x, log_p, strict=True):
        log_q = float(model.log_prob(state))
        total += math.exp(log_q) * (log_q - float(log))
    return total + math.log(math.fsum(math.exp(float(log)) for log in log_p))


@pytest.mark.parametrize("family", [Product("categorical"), SMALL], ids=["product", "network"])
def test_value_is_the_sum_over_all_states(family):
    target, table = potts((2, 3, 4))
    fit = wk.fit(target, family)
    assert fit.solver == "enumeration"
    assert fit.value.exact and fit.value.up_to is None and fit.value.stderr == 0
    assert fit.value.value == pytest.approx(brute_kl(fit.model, table.reshape(-1), every((2, 3, 4))), abs=1e-10)
    best = fit.diagnostics.optima[0]
    assert best.loss + float(table.reshape(-1).logsumexp(0)) == pytest.approx(fit.value.value, abs=1e-9)
    assert fit.status == "converged"


@pytest.mark.parametrize("solver", [Enumeration(), CoordinateAscent(draws=512, tolerance=0.001)], ids=["enumeration", "draws"])
def test_columns_satisfy_the_equations_of_mean_field(solver):
    target, table = potts((2, 3, 4), scale=0.7)
    model = wk.fit(target, Product("categorical"), solver=solver).model
    x = every((2, 3, 4))
    log_q = torch.stack([model.log_prob(one) for one in x])
    off = 0.0
    for j, count in enumerate((2, 3, 4)):
        chance = torch.stack([log_q[x[:, j] == k].exp().sum() for k in range(count)])
        means = torch.stack([(log_q.exp() * table.reshape(-1))[x[:, j] == k].sum() for k in range(count)]) / chance
        off += float((chance * (chance.log() - means.log_softmax(0)).square()).sum()) / 2
    assert off < (1e-12 if isinstance(solver, Enumeration) else 2 * solver.tolerance)  # of noise, and of what was off beyond it


@pytest.mark.parametrize(("visible", "hidden"), [(7, 3), (3, 7), (5, 0), (6, 6)])
def test_log_z_of_a_boltzmann_machine_is_the_sum_over_its_states(visible, hidden):
    machine = RestrictedBoltzmann(visible, hidden, seed=3).requires_grad_(False)
    v = every((2,) * visible)
    assert machine.log_z == pytest.approx(float((-machine(v)).logsumexp(0)), abs=1e-10)
    joint = [  # and the hidden units are summed out
        float(machine.visible_bias @ one + machine.hidden_bias @ h + one @ machine.weight @ h)
        for one in v
        for h in every((2,) * hidden)
    ]
    assert machine.log_z == pytest.approx(float(torch.tensor(joint, dtype=D).logsumexp(0)), abs=1e-10)
    assert float(restricted_boltzmann(visible, hidden, seed=3).atoms[1].logsumexp(0)) == pytest.approx(machine.log_z, abs=1e-10)


def test_boltzmann_machines_out_of_reach_are_refused():
    with pytest.raises(InputError, match=r"Cannot sum up this Boltzmann machine.*21 units"):
        _ = RestrictedBoltzmann(21, 21).log_z
    with pytest.raises(InputError, match="whole number of at least 1"):
        restricted_boltzmann(0, 3)
    with pytest.raises(InputError, match="whole number of at least 0"):
        restricted_boltzmann(3, True)


@pytest.mark.parametrize("coupling", [4.0, 8.0])
def test_both_solvers_of_columns_end_at_the_same_optimum(coupling):
    target = restricted_boltzmann(12, 6, coupling=coupling)
    exact = wk.fit(target, Product("bernoulli"), solver="enumeration", judge=False)
    drawn = wk.fit(target, Product("bernoulli"), solver=CoordinateAscent(), judge=False)
    assert exact.status == drawn.status == "converged"
    gap = drawn.value.value - exact.value.value
    assert -1e-9 < gap < CoordinateAscent().tolerance  # both values are exact
    tighter = wk.fit(target, Product("bernoulli"), solver=CoordinateAscent(draws=128, tolerance=0.002), judge=False)
    assert -1e-9 < tighter.value.value - exact.value.value < 0.002


def test_every_distinct_optimum_is_listed():
    target, field = magnet(10, 2.0), 2.0
    m = magnetisation(field)
    fit = wk.fit(target)
    assert fit.family == Product("bernoulli")
    found = sorted(float(one.model.mean.mean()) for one in fit.diagnostics.optima)
    assert found == pytest.approx([(1 - m) / 2, (1 + m) / 2], abs=1e-6)
    assert all(one.is_global and one.converged for one in fit.diagnostics.optima)
    entropy = -sum(p * math.log(p) for p in ((1 - m) / 2, (1 + m) / 2))
    assert fit.diagnostics.optima[0].loss == pytest.approx(-10 * (field * m * m / 2 + entropy), abs=1e-9)
    assert "other_modes_exist" in fit.findings
    weak = wk.fit(magnet(10, 0.8))
    assert [float((one.model.mean - 0.5).abs().max()) < 1e-6 for one in weak.diagnostics.optima] == [True]


def test_optima_of_a_target_too_large_to_list():
    target, m = magnet(30, 2.0), magnetisation(2.0)
    assert "enumerable" not in target.access.label
    fit = wk.fit(target)
    assert fit.solver == "coordinate_ascent"
    assert fit.value.up_to == "log_z"
    found = sorted(float(one.model.mean.mean()) for one in fit.diagnostics.optima)
    assert found == pytest.approx([(1 - m) / 2, (1 + m) / 2], abs=0.01)
    assert all(one.is_global for one in fit.diagnostics.optima)
    entropy = -sum(p * math.log(p) for p in ((1 - m) / 2, (1 + m) / 2))
    truth = -30 * (m * m + entropy)
    assert -4 * fit.value.stderr < fit.value.value - truth < 4 * fit.value.stderr + CoordinateAscent().tolerance
    with pytest.raises(TargetError, match="list the states"):
        _ = target.atoms


def moved(target, counts, family=SMALL, scale=0.3, draws=64):
    """The score function's problem at weights off the uniform start."""
    problem = Columns(target, family, Shape(len(counts), categories=counts), [0, 1], draws, 256)
    noise = torch.randn(problem.starts.shape, generator=torch.Generator().manual_seed(5), dtype=D)
    return problem, problem.starts + scale * noise


def test_score_function_is_right_on_average():
    counts = (2, 3, 2)
    target, table = potts(counts)
    problem, theta = moved(target, counts)
    repeats = torch.stack([problem.gradient(theta, [0, 1], seed) for seed in range(400)])
    free = theta.clone().requires_grad_(True)
    log_q = problem.flat.call_each(free, every(counts).long().expand(2, -1, -1))
    assert torch.allclose(log_q.exp().sum(-1), torch.ones(2, dtype=D))
    (exact,) = torch.autograd.grad((log_q.exp() * (log_q - table.reshape(-1))).sum(), free)
    generator = torch.Generator().manual_seed(1)
    for i in range(2):
        for along in (exact[i], torch.randn(theta.shape[1], generator=generator, dtype=D)):
            found, truth = repeats[:, i] @ along, float(exact[i] @ along)
            assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(len(found))
    along = exact[0]
    assert float((repeats[:, 0] @ along).std()) / 20 < float(along @ along) / 4  # the check could fail


def test_draws_of_the_score_function_follow_the_network():
    counts = (2, 3, 2)
    problem, theta = moved(potts(counts)[0], counts)
    x, log_q = problem._drawn(theta, 20_000, 0)
    states = every(counts).long()
    exact = problem.flat.call_each(theta, states.expand(2, -1, -1)).exp()
    index = (x[..., 0] * 3 + x[..., 1]) * 2 + x[..., 2]
    torch.testing.assert_close(log_q.exp(), exact.gather(-1, index))
    share = torch.stack([one.bincount(minlength=len(states)) for one in index]) / 20_000
    assert float(((share - exact) / (exact * (1 - exact) / 20_000).sqrt()).abs().max()) < 4.5


def test_baseline_leaves_no_gradient_where_q_is_p():
    counts = (2, 3, 2)
    problem, theta = moved(potts(counts)[0], counts)
    network = problem.module(theta[0])
    law = network()
    problem.target = wk.Target(
        log_prob=lambda x: law.log_prob(x) + 2.5, dim=3, support=[f"integer_interval(0, {count - 1})" for count in counts]
    )
    assert float(problem.gradient(theta[:1], [0], 3).abs().max()) < 1e-12
    assert float((problem.losses(theta[:1], [0], 3) + 2.5).abs().max()) < 1e-12
    assert float(problem.gradient(theta[1:], [1], 3).abs().max()) > 1e-3


def test_score_function_nears_the_target_and_is_saved(tmp_path):
    target = restricted_boltzmann(6, 3)
    solver = ScoreFunction(steps=200, cycles=1, draws=64, judged_on=500, starts=1)
    fit = wk.fit(target, SMALL, solver=solver)
    product = wk.fit(target)
    assert fit.solver == "score_function"
    assert 0 < fit.value.value < 0.05 < product.value.value
    again = wk.fit(target, SMALL, solver=solver)
    x = target.atoms[0]
    torch.testing.assert_close(again.model.log_prob(x), fit.model.log_prob(x), rtol=0, atol=0)
    fit.save(tmp_path / "fit")
    torch.testing.assert_close(wk.Fit.load(tmp_path / "fit").model.log_prob(x), fit.model.log_prob(x), rtol=0, atol=0)


def test_score_function_goes_on_from_its_journal(tmp_path):
    target, seen = restricted_boltzmann(6, 3), []

    class Killed(Exception):
        pass

    def tell(step, done):
        seen.append(step)
        if len(seen) == 3:
            raise Killed

    arguments = {"family": SMALL, "solver": ScoreFunction(steps=150, cycles=1, draws=16, judged_on=128, starts=1), "judge": False}
    whole = wk.fit(target, **arguments)
    with pytest.raises(Killed):
        wk.fit(target, **arguments, journal=tmp_path / "journal", tell=tell)
    resumed = wk.fit(target, **arguments, journal=tmp_path / "journal")
    x = target.atoms[0]
    torch.testing.assert_close(resumed.model.log_prob(x), whole.model.log_prob(x), rtol=0, atol=0)


def test_network_is_enumerated_until_little_is_left_to_gain():
    fit = wk.fit(restricted_boltzmann(8, 4), Autoregressive())
    assert fit.status == "converged"
    assert 0 <= fit.value.value <= Enumeration().gap
    assert "not_converged" not in fit.findings
    stopped = wk.fit(restricted_boltzmann(8, 4), SMALL, solver=Enumeration(iterations=3))
    assert stopped.status == "stopped"
    assert stopped.value.value > Enumeration().gap
    assert any("3 iterations ended" in note for note in stopped.diagnostics.notes)


def test_one_column_is_the_target_itself():
    logs = torch.tensor([0.3, -math.inf, 1.0, -2.0], dtype=D)
    target = wk.Target(log_prob=lambda x: logs[x[:, 0].long()], dim=1, support="integer_interval(0, 3)")
    fit = wk.fit(target, Categorical())
    torch.testing.assert_close(fit.model.log_prob(torch.arange(4, dtype=D)[:, None]), logs.log_softmax(0))
    assert fit.value.value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("solver", ["enumeration", "coordinate_ascent"])
def test_same_seed_same_fit_and_files(solver, tmp_path):
    target = restricted_boltzmann(8, 4)
    one, two = (wk.fit(target, Product("bernoulli"), solver=solver, seed=7) for _ in range(2))
    x = target.atoms[0]
    torch.testing.assert_close(one.model.log_prob(x), two.model.log_prob(x), rtol=0, atol=0)
    one.save(tmp_path / "fit")
    loaded = wk.Fit.load(tmp_path / "fit")
    torch.testing.assert_close(loaded.model.log_prob(x), one.model.log_prob(x), rtol=0, atol=1e-14)
    assert loaded.value == one.value
    assert loaded.findings == one.findings
    assert len(loaded.diagnostics.optima) == len(one.diagnostics.optima)


def test_draws_of_the_fit_are_corrected_by_weights():
    target = restricted_boltzmann(6, 3)
    fit = wk.fit(target)
    x, log_p = target.atoms
    truth = log_p.softmax(0) @ x[:, 0]
    found = fit.expect(lambda v: v[:, 0])
    assert abs(float(found.value) - float(truth)) < 4 * float(found.stderr)
    assert set(fit.draws(50, corrected=True).unique().tolist()) <= {0.0, 1.0}


def test_flat_tail_of_weights_has_no_heavy_shape():
    weights = torch.cat([torch.zeros(900, dtype=D), torch.full((100,), -3.0, dtype=D)])
    smoothed, khat = pareto_smooth(weights)
    assert khat == -math.inf
    torch.testing.assert_close(smoothed, weights.log_softmax(0))
    assert pareto_smooth(torch.cat([weights, torch.full((3,), 9.0, dtype=D)]))[1] == math.inf


@pytest.mark.parametrize(
    ("support", "dim", "levels"),
    [
        ("boolean", 2, ((0, 1), (0, 1))),
        ("integer_interval(0, 3)", 1, ((0, 3),)),
        ("integer_interval( -2 , 5 )", 2, ((-2, 5), (-2, 5))),
        (["boolean", "integer_interval(0, 2)"], 2, ((0, 1), (0, 2))),
        (torch.distributions.constraints.independent(torch.distributions.constraints.boolean, 1), 3, ((0, 1),) * 3),
    ],
    ids=str,
)
def test_words_of_a_discrete_support_are_read_back(support, dim, levels):
    bijection = Bijection(support, dim)
    assert bijection.is_discrete
    assert bijection.levels == levels
    again = Bijection(bijection.describe(), dim)
    assert again.levels == levels
    assert again.describe() == bijection.describe()
    inside = bijection.inside(D, torch.device("cpu"))
    assert bool(bijection.contains(inside).all())
    assert not bool(bijection.contains(inside + 0.5).any())


def linear(x):
    return x.sum(-1)


def holes(x):
    return torch.where(x.sum(-1) == 1, -math.inf, x[:, 0])


def discrete(dim=2, support="integer_interval(0, 2)", log_prob=linear):
    return wk.Target(log_prob=log_prob, dim=dim, support=support)


REFUSALS = [
    (lambda: discrete(support=["boolean", "real"]), "some columns are discrete and others aren't"),
    (lambda: discrete(support=torch.distributions.constraints.nonnegative_integer), "isn't a finite range"),
    (lambda: discrete(support="integer_interval(3, 1)"), "there is nothing between its ends"),
    (lambda: discrete(support="integer_interval(0, x)"), "isn't a known one"),
    (lambda: discrete(support="integer_interval(0.5, 2)"), "isn't a known one"),
    (lambda: wk.fit(discrete(support="integer_interval(1, 3)")), "begin at 1, and categories are counted from 0"),
    (lambda: wk.fit(discrete(), Product("bernoulli")), "column 1 has 2 categories in the family and 3"),
    (lambda: wk.fit(discrete(), Product("categorical", categories=(3, 4))), "column 2 has 4 categories"),
    (lambda: wk.fit(discrete(3), Product(("categorical", "categorical"))), "names 2 margins, and there are 3 columns"),
    (lambda: wk.fit(discrete(), Categorical(3)), "there are 2 columns"),
    (lambda: wk.fit(discrete(), Gaussian()), r"density on ℝᵈ.*Use Product"),
    (lambda: wk.fit(discrete(), Mixture(2)), r"density on ℝᵈ.*Use Product"),
    (lambda: wk.fit(discrete(), Flow()), r"density on ℝᵈ.*Use Product"),
    (lambda: wk.fit(discrete(), Product("normal")), "no solver minimises it over Product"),
    (lambda: wk.fit(wk.Target(log_prob=linear, dim=2), Product("bernoulli")), "isn't declared to be discrete"),
    (lambda: wk.fit(wk.Target(log_prob=linear, dim=2), Autoregressive()), "isn't declared to be discrete"),
    (lambda: wk.fit(discrete(3, "boolean", holes)), "-inf at 3 of 8 states"),
    (lambda: wk.fit(discrete(3, "boolean", holes), SMALL), "-inf at 3 of 8 states"),
    (lambda: wk.fit(discrete(3, "boolean", holes), solver="coordinate_ascent"), "ELBO isn't finite"),
    (lambda: wk.fit(discrete(3, "boolean", holes), SMALL, solver=QUICK), "ELBO isn't finite"),
    (lambda: wk.fit(discrete(log_prob=lambda x: x)), "returned shape"),
    (lambda: wk.Target(energy=linear, log_prob=linear, dim=2), "Pass one of them"),
    (lambda: wk.Target(energy=linear, normalized=True, dim=2), "Pass one of them"),
    (lambda: wk.Target(energy=3.0, dim=2), "a `float` isn't a function"),
    (lambda: Enumeration(gap=0.0), "gap"),
    (lambda: Enumeration(iterations=True), "iterations"),
    (lambda: CoordinateAscent(draws=1), "draws"),
    (lambda: CoordinateAscent(tolerance=math.inf), "tolerance"),
]


@pytest.mark.parametrize(("act", "match"), REFUSALS, ids=[match[:30] for _, match in REFUSALS])
def test_refusals_say_why_and_what_instead(act, match):
    with pytest.raises((InputError, TargetError), match=match) as caught:
        act()
    assert str(caught.value).startswith("Cannot ")
    assert str(caught.value).endswith(".")


def test_advice_names_the_solvers():
    small, large = restricted_boltzmann(12, 6), restricted_boltzmann(40, 6)
    for target, family, solver in (
        (small, None, "enumeration"),
        (small, Autoregressive(), "enumeration"),
        (large, None, "coordinate_ascent"),
        (large, Product("bernoulli"), "coordinate_ascent"),
        (large, Autoregressive(), "score_function"),
    ):
        advice = wk.advise(target, family)
        assert advice.best.objective.name == "reverse_kl"
        assert advice.best.solver == solver
    assert wk.advise(small).family == Product("bernoulli")
    apart = wk.advise(small, Gaussian())
    assert apart.best is None
    assert "the target is discrete" in apart.missing["reverse_kl"]
    assert "no other direction is possible" not in str(apart)
