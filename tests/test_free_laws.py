"""Torch's laws in free coordinates: their densities, their draws, and the fits and divergences that rest on them."""

import math

import mpmath as mp
import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Chi2,
    ContinuousBernoulli,
    Dirichlet,
    Exponential,
    FisherSnedecor,
    Gamma,
    GeneralizedPareto,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Kumaraswamy,
    LogisticNormal,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Pareto,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
)
from torch.distributions.transforms import AffineTransform, ExpTransform, PowerTransform, SigmoidTransform, TanhTransform

import whichkl as wk
from whichkl import Target
from whichkl.targets.free_laws import free_law
from whichkl.targets.law_supports import support_of
from whichkl.targets.supports import Bijection

mp.mp.dps = 50


def moved(p, *steps):
    return TransformedDistribution(p, [*steps])


def standard(kind):
    return kind(torch.tensor(0.0), torch.tensor(1.0))


def laws(dtype):
    """Every continuous law of torch's on a part of the line or on a simplex, with ordinary parameters."""

    def t(*values):
        return torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype)

    scalars = {
        "Beta": Beta(t(0.7), t(2.5)),
        "large Beta": Beta(t(3e5), t(40.0)),
        "Chi2": Chi2(t(3.0)),
        "ContinuousBernoulli": ContinuousBernoulli(t(0.3)),
        "Exponential": Exponential(t(3.0)),
        "FisherSnedecor": FisherSnedecor(t(3.0), t(5.0)),
        "Gamma": Gamma(t(0.4), t(3.0)),
        "GeneralizedPareto": GeneralizedPareto(t(1.0), t(2.0), t(0.3)),
        "GeneralizedPareto, exponential": GeneralizedPareto(t(1.0), t(2.0), t(0.0)),
        "GeneralizedPareto, bounded": GeneralizedPareto(t(1.0), t(2.0), t(-0.4)),
        "HalfCauchy": HalfCauchy(t(3.0)),
        "HalfNormal": HalfNormal(t(3.0)),
        "InverseGamma": InverseGamma(t(2.0), t(3.0)),
        "Kumaraswamy": Kumaraswamy(t(0.6), t(3.0)),
        "LogNormal": LogNormal(t(1.0), t(2.0)),
        "Pareto": Pareto(t(2.0), t(1.5)),
        "RelaxedBernoulli": RelaxedBernoulli(t(0.5), probs=t(0.3)),
        "Uniform": Uniform(t(-3.0), t(-1.0)),
        "VonMises": VonMises(t(3.0), t(4.0)),
        "Weibull": Weibull(t(2.0), t(1.5)),
        "tanh": moved(Normal(t(0.3), t(0.5)), TanhTransform()),
        "negative Gamma": moved(Gamma(t(2.0), t(1.0)), AffineTransform(t(5.0), t(-2.0))),
        "negative Beta": moved(moved(Beta(t(0.7), t(2.5)), AffineTransform(t(5.0), t(-2.0))), AffineTransform(1.0, 3.0)),
        "shifted sigmoid": moved(
            Normal(t(0.3), t(2.0)), AffineTransform(t(0.1), t(2.0)), SigmoidTransform(), AffineTransform(2.0, 3.0)
        ),
        "power": moved(Gamma(t(2.0), t(1.0)), PowerTransform(t(-2.0)), AffineTransform(0.0, 3.0), PowerTransform(t(0.3))),
        "exponential of a mixture": moved(
            MixtureSameFamily(Categorical(t(0.3, 0.7)), Normal(t(0.0, 2.0), t(1.0, 0.5))),
            AffineTransform(1.0, -2.0),
            ExpTransform(),
        ),
        "mixture": MixtureSameFamily(Categorical(t(0.3, 0.7)), Beta(t(2.0, 5.0), t(3.0, 1.5))),
    }
    rows = {
        "Dirichlet": Dirichlet(t(0.5, 2.0, 3.0)),
        "LogisticNormal": LogisticNormal(t(0.3, -0.2), t(1.0, 0.5)),
        "RelaxedOneHotCategorical": RelaxedOneHotCategorical(t(0.7), probs=t(0.2, 0.3, 0.5)),
        "columns": Independent(Uniform(t(0.0, 2.0), t(1.0, 5.0)), 1),
        "mixture of rows": MixtureSameFamily(
            Categorical(t(0.3, 0.7)), Independent(Gamma(t([[2.0, 3.0], [1.0, 4.0]]), t([[1.0, 3.0], [5.0, 4.0]])), 1)
        ),
    }
    return scalars | rows


LAWS = laws(torch.float64)


@pytest.mark.parametrize("name", LAWS)
def test_a_free_law_is_the_law_carried_by_the_bijection_and_its_draws_are_the_carried_draws(name):
    p = LAWS[name]
    dim, target, law = max(1, p.event_shape.numel()), Target.of(p), free_law(p)
    bijection = Bijection(support_of(p, dim), dim)
    torch.manual_seed(0)
    x = p.sample((2000,)).reshape(-1, dim)
    u = bijection.inverse(x)
    ordinary = (u.abs() < 20).all(1) & bijection.is_interior(x)
    u, free = u[ordinary], target.unconstrained()
    carried = target.log_prob(bijection.forward(u)) + bijection.log_jacobian(u, bijection.forward(u))
    torch.testing.assert_close(free.log_prob(u), carried, rtol=1e-9, atol=1e-7)
    y = law.sample(torch.Size((2000,))).reshape(2000, -1)
    for one, other in zip(u.T, y.T, strict=True):  # two samples of one law: Kolmogorov's distance at 1 in 10,000
        both = torch.cat([one, other]).sort().values
        gap = (torch.searchsorted(one.sort().values, both, right=True) / len(one)).sub(
            torch.searchsorted(other.sort().values, both, right=True) / len(other)
        )
        assert float(gap.abs().max()) < 2.3 * math.sqrt(1 / len(one) + 1 / len(other))


def of_gamma(a):
    """KL(p‖q) of log X, X ~ Gamma(a, 1), from the Gaussian with its moments."""
    a = mp.mpf(a)
    return mp.log(2 * mp.pi * mp.e * mp.psi(1, a)) / 2 - (a + mp.loggamma(a) - a * mp.digamma(a))


def of_beta(a, b):
    """The same of the logit of X ~ Beta(a, b)."""
    a, b = mp.mpf(a), mp.mpf(b)
    entropy = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
    entropy += (a + b) * mp.digamma(a + b) - a * mp.digamma(a) - b * mp.digamma(b)
    return mp.log(2 * mp.pi * mp.e * (mp.psi(1, a) + mp.psi(1, b))) / 2 - entropy


def near_the_ends(dtype):
    """Laws with parameters near their ends, as (name, law, KL from the Gaussian with the moments of u)."""

    def t(value):
        return torch.tensor(value, dtype=dtype)

    for a in (0.05, 0.5, 1e6):
        own = float(t(a))
        yield f"Gamma({a})", Gamma(t(a), t(2.0)), of_gamma(own)
        yield f"InverseGamma({a})", InverseGamma(t(a), t(1e-3)), of_gamma(own)
        yield f"Beta({a}, {a})", Beta(t(a), t(a)), of_beta(own, own)
        yield f"Beta(0.05, {a})", Beta(t(0.05), t(a)), of_beta(float(t(0.05)), own)
        yield f"Pareto(1, {a})", Pareto(t(1.0), t(a)), of_beta(own, 1)
        yield f"FisherSnedecor({a}, 3)", FisherSnedecor(t(a), t(3.0)), of_beta(own / 2, 1.5)
    for scale in (1e-30, 1e30):
        yield f"Uniform(0, {scale})", Uniform(t(0.0), t(scale)), of_beta(1, 1)
        yield f"Exponential({scale})", Exponential(t(scale)), of_gamma(1)
        yield f"HalfNormal({scale})", HalfNormal(t(scale)), of_gamma(0.5)
        yield f"HalfCauchy({scale})", HalfCauchy(t(scale)), of_beta(0.5, 0.5)
        yield f"Weibull({scale}, 0.05)", Weibull(t(scale), t(0.05)), of_gamma(1)
    yield "VonMises, flat", VonMises(t(0.0), t(1e-9)), of_beta(1, 1)
    yield "Chi2(1)", Chi2(t(1.0)), of_gamma(0.5)
    yield "RelaxedBernoulli", RelaxedBernoulli(t(0.01), probs=t(0.3)), of_beta(1, 1)
    yield "Dirichlet", Dirichlet(torch.tensor([1.5, 0.25], dtype=dtype)), of_beta(1.5, 0.25)
    yield "moved Beta", moved(Beta(t(0.125), t(0.125)), AffineTransform(2.0, 3.0)), of_beta(0.125, 0.125)
    yield "negative Gamma", moved(Gamma(t(0.5), t(1.0)), AffineTransform(2.0, -3.0)), of_gamma(0.5)
    yield "tanh", moved(Normal(t(0.0), t(3.0)), TanhTransform()), mp.mpf(0)


@pytest.mark.parametrize(
    ("p", "true"),
    [
        pytest.param(p, true, id=f"{name}, {str(dtype)[6:]}")
        for dtype in (torch.float32, torch.float64)
        for name, p, true in near_the_ends(dtype)
    ],
)
def test_the_forward_fit_of_a_law_near_its_ends_has_the_right_value(p, true):
    value = wk.fit(p).value
    assert value.reliable and value.finite == "certified" and value.exact
    # A fit in float32 rounds its mean to 1e-3 of a deviation where that is 1e-6 of the mean.
    assert value.value == pytest.approx(float(true), rel=1e-6, abs=2e-6 if p.sample().dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("a", [0.05, 0.5, 1.0, 1e6])
def test_the_reverse_fit_of_a_gamma_law_has_the_remainder_of_stirlings_formula(a, dtype):
    p = Gamma(torch.tensor(a, dtype=dtype), torch.tensor(1e-4, dtype=dtype))
    own = mp.mpf(float(p.concentration))
    true = mp.loggamma(own) - (own - 0.5) * mp.log(own) + own - mp.log(2 * mp.pi) / 2
    value = wk.fit(p, objective="reverse_kl").value
    assert value.finite == "certified" and value.value == pytest.approx(float(true), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("k", [0.5, 4.0, 300.0])
def test_the_fit_of_a_von_mises_law(k):
    with mp.workdps(25):
        ends = [-60, -5, 0, 5, 60]

        def log_p(u):
            x = 2 * mp.pi / (1 + mp.exp(-u)) - mp.pi
            return k * mp.cos(x) - mp.log(mp.besseli(0, k)) - u - 2 * mp.log1p(mp.exp(-u))

        variance = mp.quad(lambda u: u**2 * mp.exp(log_p(u)), ends)
        true = mp.quad(lambda u: mp.exp(log_p(u)) * log_p(u), ends) + mp.log(2 * mp.pi * mp.e * variance) / 2
    for dtype in (torch.float32, torch.float64):
        value = wk.fit(VonMises(torch.tensor(0.0, dtype=dtype), torch.tensor(k, dtype=dtype))).value
        assert value.exact and value.finite == "certified" and value.value == pytest.approx(float(true), rel=1e-6)


def beta_entropy(a, b):
    a, b = mp.mpf(a), mp.mpf(b)
    log_b = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
    return log_b - (a - 1) * mp.digamma(a) - (b - 1) * mp.digamma(b) + (a + b - 2) * mp.digamma(a + b)


@pytest.mark.parametrize(("a", "b"), [(0.1, 0.1), (0.5, 0.05), (1.0, 3.0)])
def test_laws_with_mass_at_an_end_are_compared_without_loss(a, b):
    p = Beta(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    # Kumaraswamy(c, 1) is Beta(c, 1): log q = log c + (c − 1) log x
    q = Kumaraswamy(torch.tensor(0.25, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    mean_log = mp.digamma(a) - mp.digamma(mp.mpf(a) + mp.mpf(b))
    there = wk.estimate(p=p, q=q)
    assert there.method == "quadrature" and there.value == pytest.approx(
        float(-beta_entropy(a, b) - mp.log(0.25) + 0.75 * mean_log), rel=1e-9
    )
    assert wk.estimate(p=q, q=p, divergence="reverse_kl").value == pytest.approx(there.value, rel=1e-9)


@pytest.mark.parametrize("a", [0.1, 0.5])
def test_a_law_with_mass_at_its_ends_inside_a_wider_law(a):
    p = Beta(torch.tensor(a, dtype=torch.float64), torch.tensor(a, dtype=torch.float64))
    q = Cauchy(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    with mp.workdps(20):
        scale, places = mp.beta(a, a), [-400, -30, -5, mp.log(0.5)]
        # Each half in the log of the distance from its end.
        half = mp.quad(lambda v: mp.log1p(mp.exp(2 * v)) * mp.exp(a * v) * (1 - mp.exp(v)) ** (a - 1), places)
        half += mp.quad(lambda v: mp.log1p((1 - mp.exp(v)) ** 2) * mp.exp(a * v) * (1 - mp.exp(v)) ** (a - 1), places)
        true = -beta_entropy(a, a) + mp.log(mp.pi) + half / scale
    estimate = wk.estimate(p=p, q=q)
    assert estimate.exact and estimate.value == pytest.approx(float(true), rel=1e-8)


def test_infinite_divergences_name_the_end_of_x():
    def t(value):
        return torch.tensor(value, dtype=torch.float64)

    near_zero = wk.estimate(p=Beta(t(0.1), t(0.1)), q=Kumaraswamy(t(0.3), t(0.2)), divergence="chi_squared")
    assert near_zero.value == math.inf and near_zero.notes[0].endswith("as x → 0")
    heavy = [moved(kind(t(1.0)), AffineTransform(2.0, -1.0)) for kind in (HalfCauchy, HalfNormal)]
    left = wk.estimate(p=heavy[0], q=heavy[1])
    assert left.value == math.inf and left.notes[0].endswith("in the left tail")
    assert math.isfinite(wk.estimate(p=heavy[1], q=heavy[0]).value)


@pytest.mark.parametrize(
    ("p", "ends"),
    [
        (moved(Beta(torch.tensor(2.0), torch.tensor(3.0)), AffineTransform(2.0, 3.0)), (2.0, 5.0)),
        (moved(Exponential(torch.tensor(2.0)), AffineTransform(5.0, -2.0)), (-math.inf, 5.0)),
        (
            moved(standard(Uniform), SigmoidTransform().inv, AffineTransform(5.0, 2.0)),
            (-math.inf, math.inf),
        ),
        (moved(standard(Normal), SigmoidTransform(), AffineTransform(0.0, 2.0)), (0.0, 2.0)),
        (GeneralizedPareto(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(-0.5)), (1.0, 5.0)),
        (GeneralizedPareto(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.5)), (1.0, math.inf)),
    ],
    ids=["affine", "negative", "logit", "sigmoid", "bounded", "half"],
)
def test_the_ends_of_a_transformed_law_are_its_own(p, ends):
    assert Target.of(p).bijection.bounds == [ends]
