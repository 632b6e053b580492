"""Families that are networks: their densities, what they recover, and that they come back from their parameters."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from whichkl._checks import InputError, IntegrityError
from whichkl.families import (
    Autoregressive,
    Family,
    Flow,
    Gaussian,
    GeneralizedLinear,
    LinearGaussian,
    MixtureDensityNetwork,
    Module,
    NetworkFamily,
    Neural,
    VariationalAutoencoder,
    family_from_config,
    family_of,
    richer,
)
from whichkl.families.family import cast, log_likelihood
from whichkl.families.flow import _flows
from whichkl.families.layers import Shape
from whichkl.objectives import ForwardKL
from whichkl.solvers import solver_for
from whichkl.solvers.draws.stochastic import Stochastic
from whichkl.solvers.rows.closed_form import ClosedForm
from whichkl.targets import Target

QUICK = Stochastic(steps=1_000, learning_rate=1.5e-2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def moons(n: int, seed: int) -> torch.Tensor:
    """Two half circles of radius 1, a little noise: as scikit-learn's."""
    angle = torch.rand(n, generator=generator(seed), dtype=torch.float64) * math.pi
    second = torch.arange(n) % 2 == 1
    x = torch.where(second, 1 - angle.cos(), angle.cos())
    y = torch.where(second, 0.5 - angle.sin(), angle.sin())
    return torch.stack([x, y], 1) + 0.1 * normal(n, 2, seed=seed + 1)


def heteroscedastic(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, 1, generator=generator(), dtype=torch.float64) * 4 - 2
    return x, 50 + 10 * x[:, 0] + (1 + x[:, 0].square()) * normal(n, seed=1)


def solved(target: Target, family, solver: Stochastic = QUICK, seed: int = 0, stride: int = 0):
    return solver.solve(target, family, seed, stride=stride)


def test_a_flow_beats_a_gaussian_on_two_moons_by_more_than_its_error():
    target, fresh = Target(samples=moons(2_000, 0) * 1e3 - 5e4), moons(4_000, 10) * 1e3 - 5e4
    flow = solved(target, Flow(transforms=2, hidden=(32, 32))).best.model
    bell = ClosedForm().solve(target, Gaussian(), 0).best.model
    gain = (flow.log_prob(fresh) - bell.log_prob(fresh)).detach()
    assert gain.mean() - 4 * gain.std() / math.sqrt(len(gain)) > 0.4


@pytest.mark.parametrize("kind", ["spline", "coupling", "maf"])
def test_a_flow_of_one_column_has_a_density_that_integrates_to_one(kind):
    x = torch.where(torch.arange(600) % 3 == 0, -2.0, 1.0)[:, None] + 0.3 * normal(600, 1)
    model = solved(Target(samples=x), Flow(kind, transforms=2), Stochastic(steps=150, learning_rate=5e-3)).best.model
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)[:, None]
    assert float(torch.trapezoid(model.log_prob(grid).exp(), grid[:, 0])) == pytest.approx(1, abs=1e-4)
    torch.manual_seed(0)
    drawn = model.sample((4_000,))
    assert float((model.mean - drawn.mean(0)).abs()) < 0.1


@pytest.mark.parametrize("kind", ["spline", "coupling", "maf"])
def test_a_flow_of_two_columns_has_a_density_that_integrates_to_one(kind):
    target = Target(samples=moons(400, 0))
    model = solved(target, Flow(kind, transforms=2, hidden=(16,)), Stochastic(steps=100, learning_rate=5e-3)).best.model
    wide = MultivariateNormal(torch.zeros(2, dtype=torch.float64), 4 * torch.eye(2, dtype=torch.float64))
    torch.manual_seed(0)
    x = wide.sample((40_000,))
    weight = (model.log_prob(x) - wide.log_prob(x)).exp()
    assert abs(float(weight.mean()) - 1) < 5 * float(weight.std()) / 200


def test_a_conditional_flow_follows_a_width_that_depends_on_x():
    x, y = heteroscedastic(2_000)
    model = solved(Target(samples=(x, y)), Flow(transforms=1, hidden=(16,))).best.model
    law = model(torch.tensor([[0.0], [1.8]]))
    assert law.event_shape == () and law.batch_shape == (2,)
    torch.manual_seed(0)
    spread = law.sample((4_000,)).std(0)
    assert 0.5 < spread[0] < 2.2 and 3.2 < spread[1] < 6.5


def test_heavy_tails_are_told_and_bells_are_not():
    wild = torch.cat([normal(400, 1), torch.tensor([[500.0]], dtype=torch.float64)])
    short = Stochastic(steps=25, learning_rate=1e-3)
    assert any("tails are those of a normal" in note for note in solved(Target(samples=wild), Flow(transforms=1), short).notes)
    assert not solved(Target(samples=normal(400, 1)), Flow(transforms=1), short).notes


def test_an_autoregressive_network_recovers_a_table():
    chance = torch.tensor([[[0.05, 0.2], [0.1, 0.05]], [[0.3, 0.05], [0.05, 0.2]]], dtype=torch.float64)
    n = 6_000
    cell = torch.multinomial(chance.flatten(), n, True, generator=generator())
    grid = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=torch.float64)
    model = solved(Target(samples=grid[cell]), Autoregressive(hidden=(32, 32))).best.model
    found = model.log_prob(grid).exp()
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    error = (chance.flatten() * (1 - chance.flatten()) / (0.9 * n)).sqrt()
    assert bool(((found - chance.flatten()).abs() < 5 * error + 0.002).all())
    assert model.log_prob(torch.tensor([[0, 0, 2.0], [0.5, 0, 0], [-1, 0, 0]])).tolist() == [-math.inf] * 3
    torch.manual_seed(0)
    drawn = model.sample((20_000,))
    assert torch.allclose((drawn[:, None] == grid).all(-1).double().mean(0), found, atol=0.015)


@pytest.mark.parametrize(("counts", "context"), [((2, 3, 4), 0), ((3, 2), 1), ((4,), 0), ((4,), 2)])
def test_autoregressive_probabilities_add_up_to_one_and_no_column_sees_a_later_one(counts, context):
    network = Autoregressive(hidden=(8, 8)).network(Shape(len(counts), context, False, counts)).double()
    torch.manual_seed(0)
    for weight in network.requires_grad_(False).parameters():
        torch.nn.init.normal_(weight)
    grid = torch.cartesian_prod(*[torch.arange(one, dtype=torch.float64) for one in counts]).reshape(-1, len(counts))
    given = normal(1, context) if context else None
    law = network() if given is None else network(given.expand(len(grid), -1))
    assert float(law.log_prob(grid).exp().sum()) == pytest.approx(1, abs=1e-12)
    for j in range(1, len(counts)):  # and q(x₁ … xⱼ) doesn't depend on what comes after
        heads, place = grid[:, :j].unique(dim=0, return_inverse=True)
        sums = torch.zeros(len(heads), dtype=torch.float64).index_add(0, place, law.log_prob(grid).exp())
        filled = torch.cat([heads, torch.zeros(len(heads), len(counts) - j, dtype=torch.float64)], 1)
        own = network(None if given is None else given.expand(len(heads), -1)).columns(filled)[:, :j].sum(-1).exp()
        assert torch.allclose(sums, own)
    if given is not None:  # and every column depends on the context
        near, far = (network(given.expand(len(grid), -1) + shift).columns(grid) for shift in (0.0, 1.0))
        assert bool(((near - far).abs() > 1e-6).any(0).all())


def test_an_autoencoders_bound_is_below_the_exact_log_density():
    z = normal(2_000, 1)
    x = z @ torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64) + 0.5 * normal(2_000, 3, seed=1) + 5
    family = VariationalAutoencoder(latent=1, hidden=(), likelihood="normal")
    solution = solved(Target(samples=x), family, stride=5)
    model = solution.best.model
    assert model.is_bound and any("its value is a bound" in note for note in solution.notes)
    net = model.module
    loading = net.scale[:, None] * net.decoder[0].weight
    noise = torch.diag((net.scale * net.sigma()).square())
    exact = MultivariateNormal(net.mean + net.scale * net.decoder[0].bias, loading @ loading.T + noise)
    rows = solution.held.block.x
    short = exact.log_prob(rows) - model.log_prob(rows)
    assert 0 <= float(short.mean()) + 4 * float(short.std()) / math.sqrt(len(rows)) < 0.2
    assert float(short.mean()) > -1e-3  # 128 draws, not one: hardly any chance is left
    elbo = -family.loss(model, rows, None, generator()).mean()
    assert float(elbo) < float(model.log_prob(rows).mean()) + 0.02
    alone = model.log_prob(rows[7:9])  # the same draws in any batch, but for the rounding of a matrix product of another size
    torch.testing.assert_close(model.log_prob(rows)[7:9], alone, rtol=1e-10, atol=1e-10)
    bell = MultivariateNormal(x.mean(0), x.T.cov())
    assert float((bell.log_prob(rows) - model.log_prob(rows)).mean()) < 0.15


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_an_autoencoder_of_discrete_columns_sees_that_they_hang_together(kind):
    z = (normal(3_000) > 0).double()
    x = torch.stack([z, z, 1 - z], 1)
    flip = torch.rand(3_000, 3, generator=generator(5)) < 0.1
    model = solved(Target(samples=torch.where(flip, 1 - x, x)), VariationalAutoencoder(1, (8,), kind)).best.model
    grid = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    mass = model.log_prob(grid).exp()
    assert 0.9 < float(mass.sum()) < 1.02
    truth = 0.5 * 0.9**3 + 0.5 * 0.1**3
    assert float(mass[1]) == pytest.approx(truth, abs=0.08) and float(mass[6]) == pytest.approx(
        truth, abs=0.08
    )  # 1/8 if they didn't
    torch.manual_seed(0)
    assert float((model.sample((4_000,))[:, 0] == 1).double().mean()) == pytest.approx(0.5, abs=0.06)
    assert float(model.log_prob(torch.tensor([[0, 0, 2.0]]))) == -math.inf


def test_one_component_recovers_a_width_that_depends_on_x():
    x, y = heteroscedastic(4_000)
    model = solved(Target(samples=(x, y)), MixtureDensityNetwork(1, hidden=(32,))).best.model
    at = torch.tensor([[-1.5], [0.0], [1.5]], dtype=torch.float64)
    law = model(at)
    assert isinstance(law, Normal)
    assert torch.allclose(law.mean, 50 + 10 * at[:, 0], atol=0.8)
    assert torch.allclose(law.stddev, 1 + at[:, 0].square(), rtol=0.25)


def test_two_components_find_two_branches_in_two_columns():
    x = normal(2_000, 1)
    side = torch.where(torch.arange(2_000) % 2 == 0, 1.0, -1.0)
    y = torch.stack([side * 5 + x[:, 0], side], 1) + 0.3 * normal(2_000, 2, seed=3)
    for covariance in ("full", "diagonal"):
        model = solved(Target(samples=(x, y)), MixtureDensityNetwork(2, hidden=(16,), covariance=covariance)).best.model
        law = model(torch.zeros(1, 1))
        where = law.component_distribution.mean[0, :, 0].sort().values
        assert torch.allclose(where, torch.tensor([-5.0, 5.0], dtype=torch.float64), atol=0.5)


def test_widths_have_a_floor_where_y_follows_from_x():
    x = normal(400, 1)
    model = solved(Target(samples=(x, 3 * x[:, 0])), MixtureDensityNetwork(1, hidden=())).best.model
    assert float(model(x).stddev.min()) >= 1e-3 * 2.5


def test_a_neural_classifier_separates_what_can_be():
    label = torch.arange(600) % 3
    x = 4 * torch.nn.functional.one_hot(label, 3).double() + normal(600, 3)
    model = solved(Target(samples=(x[:450], label[:450].double())), Neural("categorical", (16,))).best.model
    law = model(x[450:])
    assert law.batch_shape == (150,) and law.event_shape == ()
    assert float((law.probs.argmax(-1) == label[450:]).double().mean()) > 0.95


def test_a_linear_bernoulli_model_is_logistic_regression():
    x = normal(4_000, 2)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5), generator=generator())
    model = solved(Target(samples=(x, y)), Neural("bernoulli", ()), Stochastic(weight_decay=0)).best.model
    at = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    logits = model(at).logits
    assert torch.allclose(
        torch.stack([logits[0], logits[1] - logits[0], logits[2] - logits[0]]), torch.tensor([0.5, 1.0, -2.0]).double(), atol=0.3
    )


@pytest.mark.parametrize("response", ["poisson", "normal"])
def test_counts_and_least_squares_find_the_mean(response):
    x = normal(3_000, 1)
    rate = (0.5 * x[:, 0] + 3).exp()
    torch.manual_seed(0)
    y = torch.poisson(rate) if response == "poisson" else rate + 2 * normal(3_000, seed=2)
    model = solved(Target(samples=(x, y)), Neural(response, (16,))).best.model
    at = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    assert torch.allclose(model(at).mean, (0.5 * at[:, 0] + 3).exp(), rtol=0.1)


CONDITIONAL = [
    (LinearGaussian(), normal),
    (GeneralizedLinear("bernoulli"), lambda n: (normal(n) > 0).double()),
    (GeneralizedLinear("categorical"), lambda n: (normal(n) > 0).double()),
    (GeneralizedLinear("poisson"), lambda n: normal(n).abs().round()),
    (Neural("bernoulli", (8,)), lambda n: (normal(n) > 0).double()),
    (Neural("categorical", (8,)), lambda n: (normal(n) > 0).double()),
    (Neural("poisson", (8,)), lambda n: normal(n).abs().round()),
    (Neural("normal", (8,)), normal),
    (MixtureDensityNetwork(2, (8,)), normal),
    (Flow(transforms=1, hidden=(8,)), normal),
    (Autoregressive((8,)), lambda n: (normal(n) > 0).double()),
]


@pytest.mark.parametrize(("family", "make"), CONDITIONAL, ids=lambda one: str(one) if isinstance(one, Family) else "")
def test_models_of_y_given_x_take_arrays_and_whole_numbers_and_refuse_other_columns(family, make):
    y, x = make(60), normal(60, 2, seed=1)
    network = isinstance(family, NetworkFamily)
    solver = Stochastic(epochs=2, learning_rate=1e-3) if network else solver_for(ForwardKL(), family, Target(samples=x).access)
    model = solver.solve(Target(samples=(x, y)), family, 0).best.model
    law, whole = model(x), y.round().clamp(0, 1)
    for same in (x.numpy(), x.tolist(), pd.DataFrame(x.numpy())):
        torch.testing.assert_close(model(same).log_prob(y), law.log_prob(y))
    for kind in (torch.int64, torch.int32, torch.bool):
        if kind != torch.bool or make is not normal:
            torch.testing.assert_close(law.log_prob(whole.to(kind)).double(), law.log_prob(whole), rtol=1e-6, atol=1e-6)
    with pytest.raises(InputError, match=r"shape \(60, 1\), and the model was fitted on 2 columns"):
        model(x[:, :1])
    with pytest.raises(InputError, match=r"use these x: 1 cell .*`x2` in row 0"):
        model(np.array([[0.0, math.nan]]))
    with pytest.raises(InputError, match="not a number"):
        model([["a", "b"]])


def test_a_coin_of_a_network_gives_other_values_no_probability():
    target = Target(samples=(normal(60, 1, seed=1), (normal(60) > 0).double()))
    law = solved(target, Neural("bernoulli", (8,)), Stochastic(epochs=2, learning_rate=1e-3)).best.model(target.context)
    assert law.log_prob(torch.tensor(0.5)).max() == -math.inf
    assert law.log_prob(torch.tensor(2)).max() == -math.inf


@pytest.mark.parametrize(
    ("family", "target"),
    [
        (Flow(transforms=1, hidden=(8,)), Target(samples=normal(60, 2))),
        (Flow("coupling", transforms=2, hidden=(8,)), Target(samples=normal(60, 3))),
        (Autoregressive((8,)), Target(samples=(normal(60, 2) > 0).double())),
        (VariationalAutoencoder(1, (4,)), Target(samples=normal(60, 2))),
        (Flow(transforms=1, hidden=(8,)), Target(samples=(normal(60, 2), normal(60, seed=1)))),
        (MixtureDensityNetwork(2, (8,)), Target(samples=(normal(60, 2), normal(60, 2, seed=1)))),
        (Neural("normal", (8,)), Target(samples=(normal(60, 2), normal(60, 2, seed=1)))),
        (Neural("categorical", (8,)), Target(samples=(normal(60, 2), (normal(60, 2, seed=1) > 0).double()))),
    ],
)
def test_models_come_back_from_their_parameters_and_change_their_dtype(family, target):
    model = solved(target, family, Stochastic(epochs=2, learning_rate=1e-3)).best.model
    again = family_from_config(family.config())
    assert again == family
    parameters = family.parameters(model)
    assert parameters["shape"].dtype == torch.int64
    x = target.samples
    here = log_likelihood(model, x, target.context)
    assert here.shape == (60,) and not here.requires_grad
    assert torch.equal(log_likelihood(again.model(parameters), x, target.context), here)
    single = cast(family, model, torch.float32, torch.device("cpu"))
    if not getattr(model, "is_bound", False):
        assert torch.allclose(log_likelihood(single, x, target.context).double(), here, atol=1e-3)
    with pytest.raises(IntegrityError, match="another module's"):
        family.model({name: value for name, value in parameters.items() if "weight" not in name})
    assert richer(family) is None or type(richer(family)) is type(family)


class Bell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2))
        self.log_scale = torch.nn.Parameter(torch.zeros(2))

    def forward(self):
        return Independent(Normal(self.loc, self.log_scale.exp()), 1)


def test_a_users_module_is_trained_as_a_copy():
    mine, x = Bell(), normal(2_000, 2) * torch.tensor([1.0, 5.0]) + torch.tensor([20.0, -3.0])
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    family = family_of(mine)
    model = solved(Target(samples=x), family, Stochastic(steps=2_000)).best.model
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert all(one.requires_grad for one in mine.parameters())
    assert torch.allclose(model.mean.double(), x.mean(0), atol=0.25) and torch.allclose(
        model.stddev.double(), x.std(0), rtol=0.05
    )
    again = Module(Bell()).model(family.parameters(model))
    assert torch.equal(again.log_prob(x), model.log_prob(x)) and again.log_prob(x).dtype == torch.float32
    assert family.config()["module"].startswith("Bell, start ") and repr(family) == "Module(Bell)"
    with pytest.raises(InputError, match="Pass `family=`"):
        family_from_config(family.config())


def test_a_users_conditional_module_and_zukos_flows_are_families():
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(1, 1)

        def forward(self, x):
            return Normal(self.map(x)[:, 0], 1.0)

    x = normal(1_000, 1)
    family = family_of(Line())
    assert family.conditional and not family.optional_context
    model = solved(Target(samples=(x, 2 * x[:, 0] - 1 + normal(1_000, seed=1))), family, Stochastic(steps=1_000)).best.model
    assert torch.allclose(model(torch.tensor([[0.0], [1.0]])).mean, torch.tensor([-1.0, 1.0]), atol=0.15)
    free = family_of(_flows().NSF(2, transforms=1, hidden_features=(8,)))
    assert free.conditional and free.optional_context
    assert math.isfinite(solved(Target(samples=normal(100, 2)), free, Stochastic(epochs=2, learning_rate=1e-3)).best.loss)


class Wrong(torch.nn.Module):
    def __init__(self, law):
        super().__init__()
        self.law, self.loc = law, torch.nn.Parameter(torch.zeros(2))

    def forward(self):
        return self.law(self.loc)


@pytest.mark.parametrize(
    ("law", "words"),
    [
        (lambda loc: loc, "returned a `Tensor`, not a torch Distribution"),
        (lambda loc: Normal(loc, 1.0), "Return one event a row"),
        (lambda loc: Independent(Normal(loc * math.nan, 1.0, validate_args=False), 1), "NaN"),
        (lambda loc: Independent(Normal(loc * math.nan, 1.0), 1), "constraint|was NaN"),  # torch.compile turns checks off
        (lambda loc: Independent(Normal(torch.zeros(2), 1.0), 1), "doesn't depend on its weights"),
        (lambda loc: Independent(Normal(torch.cat([loc, loc]), 1.0), 1), "Cannot"),
    ],
)
def test_modules_that_are_no_law_of_the_rows_are_refused(law, words):
    with pytest.raises(InputError, match=words):
        solved(Target(samples=normal(100, 2)), Module(Wrong(law)), Stochastic(steps=50, learning_rate=1e-3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Flow("planar"), "isn't one of its choices. Choose 'spline'"),
        (lambda: Flow(transforms=0), "at least 1"),
        (lambda: Flow(hidden=(0,)), "widths"),
        (lambda: Neural("gamma"), "Choose 'bernoulli', 'categorical'"),
        (lambda: VariationalAutoencoder(likelihood="poisson"), "Choose 'bernoulli', 'normal'"),
        (lambda: MixtureDensityNetwork(0), "at least 1"),
        (lambda: Module(torch.nn.ReLU()), "asks for a gradient"),
        (lambda: Module(torch.nn.Bilinear(1, 1, 1)), "takes 2 arguments"),
        (lambda: family_of(3), "modules of your own"),
        (lambda: family_of("floe"), "it isn't a known one"),
        (lambda: solved(Target(samples=normal(60, 1)), Neural("normal")), "aren't pairs"),
        (lambda: solved(Target(samples=normal(60, 2)), Autoregressive()), "not a whole number"),
        (lambda: solved(Target(samples=(normal(60, 1), normal(60))), Neural("bernoulli")), "not a whole number"),
        (lambda: solved(Target(samples=normal(5, 1)), Flow()), "at least 20 rows"),
        (lambda: solved(Target(samples=torch.ones(50, 1)), Flow()), "constant"),
        (lambda: solved(Target(samples=normal(50, 1) * 1e-200), Flow()), "beyond what a float64 holds"),
        (lambda: solved(Target(samples=normal(50, 1) * 1e200), Flow()), "beyond what a float64 holds"),
    ],
)
def test_bad_fields_and_rows_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
