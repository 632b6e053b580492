"""Closed forms where float64 cancels: large parameters, laws that nearly agree, nearly singular covariances; against mpmath."""

import math

import mpmath as mp
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    ContinuousBernoulli,
    Dirichlet,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfNormal,
    Independent,
    InverseGamma,
    Laplace,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
    Pareto,
    Poisson,
    Uniform,
    VonMises,
    Weibull,
    kl_divergence,
)

import whichkl as wk
from whichkl.divergences.exact import closed_form as forms
from whichkl.divergences.exact.closed_form import closed_form, gaussian
from whichkl.divergences.exact.precise_kl import precise_kl
from whichkl.divergences.kinds import ChiSquared, Hellinger, RenyiDivergence

mp.mp.dps = 700


def t(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def of_dirichlet(a, b):
    a, b = [mp.mpf(v) for v in a], [mp.mpf(v) for v in b]
    total = mp.loggamma(sum(a)) - sum(map(mp.loggamma, a)) - mp.loggamma(sum(b)) + sum(map(mp.loggamma, b))
    return total + sum((x - y) * (mp.digamma(x) - mp.digamma(sum(a))) for x, y in zip(a, b, strict=True))


def of_gamma(a, r, b, s):
    a, r, b, s = map(mp.mpf, (a, r, b, s))
    return (a - b) * mp.digamma(a) - mp.loggamma(a) + mp.loggamma(b) + b * mp.log(r / s) + a * (s / r - 1)


def of_poisson(a, b):
    a, b = mp.mpf(a), mp.mpf(b)
    return a * mp.log(a / b) - a + b


def of_chances(p, q):
    p, q = [mp.mpf(v) for v in p], [mp.mpf(v) for v in q]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    return sum(a * mp.log(a / b) for a, b in zip(p, q, strict=True) if a)


def of_normal(m, s, n, r):
    m, s, n, r = map(mp.mpf, (m, s, n, r))
    return ((s / r) ** 2 - 1 - 2 * mp.log(s / r) + ((m - n) / r) ** 2) / 2


def of_laplace(m, s, n, r):
    m, s, n, r = map(mp.mpf, (m, s, n, r))
    return mp.log(r / s) + (s * mp.exp(-abs(m - n) / s) + abs(m - n)) / r - 1


def of_gumbel(m, s, n, r):
    m, s, n, r = map(mp.mpf, (m, s, n, r))
    return mp.log(r / s) + mp.euler * (s / r - 1) + mp.exp((n - m) / r) * mp.gamma(1 + s / r) - 1 + (m - n) / r


def of_weibull(a, k, b, h):
    a, k, b, h = map(mp.mpf, (a, k, b, h))
    return mp.log(k / a**k) - mp.log(h / b**h) + (k - h) * (mp.log(a) - mp.euler / k) + (a / b) ** h * mp.gamma(h / k + 1) - 1


def of_pareto(s, a, r, b):
    s, a, r, b = map(mp.mpf, (s, a, r, b))
    return mp.log(a / b) + b * mp.log(s / r) + b / a - 1


def of_geometric(p, q):
    p, q = mp.mpf(p), mp.mpf(q)
    return mp.log(p / q) + (1 - p) / p * mp.log((1 - p) / (1 - q))


def of_von_mises(m, k, n, h):
    m, k, n, h = map(mp.mpf, (m, k, n, h))
    length = mp.besseli(1, k) / mp.besseli(0, k)
    return mp.log(mp.besseli(0, h) / mp.besseli(0, k)) + length * (k - h * mp.cos(m - n))


NEAR = 1 + 2.0**-40
PAIRS = {
    **{
        f"Beta {a}, {b}": ((Beta, a, b), (Beta, c, d), lambda a, b, c, d: of_dirichlet((a, b), (c, d)))
        for a, b, c, d in (
            (1.2e7 + 1, 8.8e7 + 1, 1.2e7 + 11, 8.8e7 + 4),
            (2.0, 1e20, 3.0, 1e20),
            (1.0, 1e10, 1.0, 1e10 + 1e5),
            (1e12, 1e12, 1e12 + 1e6, 1e12),
            (1e-3, 1e-3, 1.1e-3, 1e-3),
            (1e-40, 2.0, 2e-40, 2.0),
            (3.0, 4.0, 3.0 * NEAR, 4.0),
            (1e80, 1e80, 1e80 * NEAR, 1e80),
        )
    },
    "Uniform in Normal": (
        (Uniform, 1e40, 2e40),
        (Normal, 1e-40, 1e40),
        lambda a, b, m, s: (
            mp.log(2 * mp.pi * mp.mpf(s) ** 2) / 2
            - mp.log(mp.mpf(b) - a)
            + ((mp.mpf(b) - m) ** 3 - (mp.mpf(a) - m) ** 3) / (6 * mp.mpf(s) ** 2 * (mp.mpf(b) - a))
        ),
    ),
    "Gamma": ((Gamma, 1e12, 1.0), (Gamma, 1e12 + 1e6, 1.0), of_gamma),
    "Gamma, both": ((Gamma, 1e15, 1e7), (Gamma, 1e15 * NEAR, 1e7 * NEAR), of_gamma),
    "InverseGamma": ((InverseGamma, 1e12, 1.0), (InverseGamma, 1e12 + 1e6, 1.0), of_gamma),
    "Exponential": ((Exponential, 3.0), (Exponential, 3.0 * NEAR), lambda r, s: of_gamma(1, r, 1, s)),
    "Poisson": ((Poisson, 1e9), (Poisson, 1e9 + 1e4), of_poisson),
    "Poisson, near": ((Poisson, 1e-9), (Poisson, 1e-9 * NEAR), of_poisson),
    "Bernoulli": ((Bernoulli, 0.3), (Bernoulli, 0.3 * NEAR), lambda a, b: of_chances((a, 1 - mp.mpf(a)), (b, 1 - mp.mpf(b)))),
    "Bernoulli, rare": (
        (Bernoulli, 1e-30),
        (Bernoulli, 1e-30 * NEAR),
        lambda a, b: of_chances((a, 1 - mp.mpf(a)), (b, 1 - mp.mpf(b))),
    ),
    "Binomial": (
        (Binomial, 1e6, 0.3),
        (Binomial, 1e6, 0.3 * NEAR),
        lambda n, a, _, b: n * of_chances((a, 1 - mp.mpf(a)), (b, 1 - mp.mpf(b))),
    ),
    "Geometric": ((Geometric, 1e-6), (Geometric, 1e-6 * NEAR), of_geometric),
    "NegativeBinomial": (
        (NegativeBinomial, 1e9, 0.3),
        (NegativeBinomial, 1e9, 0.3 * NEAR),
        lambda n, a, _, b: n * of_geometric(1 - mp.mpf(a), 1 - mp.mpf(b)),
    ),
    "Normal": ((Normal, 1e6, 1.0), (Normal, 1e6 + 1e-3, 1.0), of_normal),
    "Normal, near": ((Normal, 0.0, 1.0), (Normal, 0.0, NEAR), of_normal),
    "Normal, nearer": ((Normal, 0.0, 1.0), (Normal, 0.0, 1 + 2.0**-52), of_normal),
    "Normal, narrow": ((Normal, 0.0, 1e-200), (Normal, 0.0, 1e200), of_normal),
    "LogNormal": ((LogNormal, 0.0, 1.0), (LogNormal, 0.0, NEAR), of_normal),
    "HalfNormal": ((HalfNormal, 1.0), (HalfNormal, NEAR), lambda s, r: of_normal(0, s, 0, r)),
    "Laplace": ((Laplace, 1e6, 1.0), (Laplace, 1e6 + 1e-6, NEAR), of_laplace),
    "Gumbel": ((Gumbel, 1e6, 1.0), (Gumbel, 1e6 + 1e-6, NEAR), of_gumbel),
    "Weibull": ((Weibull, 2.0, 1.5), (Weibull, 2.0, 1.5 * NEAR), of_weibull),
    "Weibull, far": ((Weibull, 1e-30, 0.05), (Weibull, 1e30, 20.0), of_weibull),
    "Pareto": ((Pareto, 2.0, 1e6), (Pareto, 2.0, 1e6 * NEAR), of_pareto),
    "Cauchy": (
        (Cauchy, 1e6, 1.0),
        (Cauchy, 1e6 + 1e-6, NEAR),
        lambda m, s, n, r: mp.log((mp.mpf(s) + r) ** 2 + (mp.mpf(m) - n) ** 2) - mp.log(4 * mp.mpf(s) * r),
    ),
    "VonMises": ((VonMises, 0.5, 100.0), (VonMises, 0.5, 100.0 * NEAR), of_von_mises),
    "Uniform": (
        (Uniform, 1e6, 1e6 + 1),
        (Uniform, 1e6, 1e6 + 1 + 2.0**-30),
        lambda a, b, c, d: mp.log((mp.mpf(d) - c) / (mp.mpf(b) - a)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_closed_form_has_all_its_digits_wherever_terms_cancel(name):
    (kind, *a), (other, *b), truth = PAIRS[name]
    e = wk.estimate(p=kind(*map(t, a)), q=other(*map(t, b)))
    assert (e.method, e.exact, e.stderr, e.finite) == ("closed form", True, 0.0, "certified")
    assert e.value == pytest.approx(float(truth(*a, *b)), rel=1e-14)


def test_all_pairs_of_ordinary_laws_agree_with_torchs_registry():
    def each(x):
        return [
            *(Normal(x, 1 + x), HalfNormal(x), Laplace(x, 1 + x), Exponential(x), Gamma(1 + x, x), Beta(1 + x, 2 * x)),
            *(Uniform(x / 4, x / 4 + 0.3), ContinuousBernoulli(x / 2), Pareto(1 + x, 2 + x), Gumbel(x, 1 + x), Cauchy(x, 1 + x)),
            *(Bernoulli(x / 2), Bernoulli(logits=x), Binomial(t(5.0), x / 2), Geometric(x / 2), Poisson(x)),
            *(Categorical(torch.stack([x, t(1.0), 2 * x])), Dirichlet(torch.stack([x, t(1.0), 2 * x]))),
        ]

    compared = 0
    for p in each(t(0.4)):
        for q in each(t(0.7)):
            try:
                torchs = float(kl_divergence(p, q))
            except (NotImplementedError, RuntimeError, ValueError):
                continue
            if {type(p), type(q)} != {ContinuousBernoulli, Uniform}:  # which torch has wrong
                assert precise_kl(p, q) == pytest.approx(torchs, rel=1e-11, abs=1e-13), (p, q)
                compared += 1
    assert compared > 70


def test_atoms_that_nearly_agree_and_laws_written_in_two_ways():
    probs = [0.1, 0.2, 0.3, 0.4]
    near = [0.1 * NEAR, 0.2, 0.3, 0.4]
    for kind in (Categorical, OneHotCategorical):
        p, q = kind(t(probs)), kind(t(near))
        given = [p.probs.tolist(), q.probs.tolist()]
        assert wk.estimate(p=p, q=q).value == pytest.approx(float(of_chances(*given)), rel=1e-13)
    assert wk.estimate(p=Bernoulli(t(0.5)), q=Bernoulli(logits=t(0.0))).value == 0
    assert wk.estimate(p=Bernoulli(logits=t(800.0)), q=Bernoulli(logits=t(801.0))).value == pytest.approx(
        float(mp.exp(-801) - mp.exp(-800) + mp.exp(-800)), rel=1e-12
    )


def test_counts_of_different_totals_state_the_rounding_of_their_log_gamma_functions():
    n, chance = 20_000, 0.3
    e = wk.estimate(p=Binomial(t(float(n)), t(chance)), q=Binomial(t(n + 1.0), t(chance)))
    # log p/q at x is log((n + 1 − x) / ((n + 1) (1 − π)))
    with mp.workdps(30):
        p, truth = mp.mpf(chance), mp.mpf(0)
        weight = (1 - p) ** n
        for x in range(n + 1):
            truth += weight * mp.log((n + 1 - x) / ((n + 1) * (1 - p)))
            weight *= mp.mpf(n - x) / (x + 1) * p / (1 - p)
    assert e.method == "enumeration" and not e.exact and abs(e.value - float(truth)) < e.stderr < 1e-9
    same = wk.estimate(p=Poisson(t(1e4)), q=Poisson(t(1e4)), divergence="jensen_shannon")
    assert same.exact and same.value == 0


def test_a_product_has_the_sum_of_its_coordinates():
    a, b = torch.logspace(-3, 15, 40, dtype=torch.float64), torch.logspace(15, -3, 40, dtype=torch.float64)
    p, q = (Independent(Beta(a * k, b), 1) for k in (1.0, NEAR))
    truth = sum(of_dirichlet((x, y), (z, y)) for x, y, z in zip(a.tolist(), b.tolist(), (a * NEAR).tolist(), strict=True))
    assert wk.estimate(p=p, q=q).value == pytest.approx(float(truth), rel=1e-13)


# ---- Gaussians of several dimensions


def matrix(values):
    return mp.matrix(values.tolist())


def of_gaussians(m, s, n, r):
    """By the formula with inverses and determinants."""
    d, inverse = len(m), r**-1
    shift = mp.matrix(n.tolist()) - mp.matrix(m.tolist())
    trace = sum((inverse * s)[i, i] for i in range(d))
    return (trace - d + (shift.T * inverse * shift)[0] + mp.log(mp.det(r) / mp.det(s))) / 2


def hilbert(d):
    return 1 / (torch.arange(d, dtype=torch.float64)[:, None] + torch.arange(d, dtype=torch.float64) + 1)


@pytest.mark.parametrize("d", [2, 6, 9])
def test_ill_conditioned_covariances_lose_no_digits(d):
    near, zero = hilbert(d) * (1 + 1e-6 * torch.eye(d, dtype=torch.float64)), torch.zeros(d, dtype=torch.float64)
    p, q = MultivariateNormal(zero, hilbert(d)), MultivariateNormal(zero + 1e-8, near)
    with mp.workdps(60):
        there = of_gaussians(zero, matrix(hilbert(d)), zero + 1e-8, matrix(near))
        back = of_gaussians(zero + 1e-8, matrix(near), zero, matrix(hilbert(d)))
    e = wk.estimate(p=p, q=q)
    assert e.exact and e.value == pytest.approx(float(there), rel=1e-13)
    assert wk.estimate(p=p, q=q, divergence="reverse_kl").value == pytest.approx(float(back), rel=1e-13)


def test_every_way_to_give_a_covariance():
    torch.manual_seed(0)
    d = 5
    root = torch.randn(d, d, dtype=torch.float64).tril(-1) + torch.eye(d, dtype=torch.float64)
    factor, diagonal = 1e6 * torch.ones(d, 1, dtype=torch.float64), torch.linspace(1e-3, 1, d, dtype=torch.float64)
    mean = torch.linspace(0, 1, d, dtype=torch.float64)
    laws = {
        "scale_tril": (MultivariateNormal(mean, scale_tril=root), matrix(root) * matrix(root).T),
        "precision": (MultivariateNormal(mean, precision_matrix=root @ root.T), matrix(root @ root.T) ** -1),
        "low rank": (
            LowRankMultivariateNormal(mean, factor, diagonal),
            matrix(factor) * matrix(factor).T + mp.diag(diagonal.tolist()),
        ),
        "columns": (Independent(Normal(mean, diagonal), 1), mp.diag([mp.mpf(v) ** 2 for v in diagonal.tolist()])),
    }
    for p, s in laws.values():
        for q, r in laws.values():
            with mp.workdps(60):
                truth = of_gaussians(p.mean, s, q.mean, r)
            e = wk.estimate(p=p, q=q)
            assert e.method == "closed form" and e.exact and e.value == pytest.approx(float(truth), rel=1e-12)


def test_many_dimensions_give_the_error_of_their_rounding():
    d, zero = 40, torch.zeros(40, dtype=torch.float64)  # beyond what is taken in mpmath's numbers
    laws, values = [], []
    for rest in (1e-8, 1.1e-8):  # equal correlations: the covariance has two eigenvalues
        s = torch.full((d, d), 1 - rest, dtype=torch.float64).fill_diagonal_(1.0)
        laws.append(MultivariateNormal(zero, s))
        each = 1 - mp.mpf(float(s[0, 1]))
        values.append([each] * (d - 1) + [1 + (d - 1) * (1 - each)])
    truth = sum(a / b - 1 - mp.log(a / b) for a, b in zip(*values, strict=True)) / 2
    e = closed_form(*laws, "forward_kl")
    assert not e.exact and "cancel" in e.notes[-1] and abs(e.value - float(truth)) < e.stderr < 0.1


@pytest.mark.parametrize("gap", [1e-3, 1e-7, 1e-12])
def test_other_divergences_of_gaussians_that_nearly_agree(gap):
    def renyi(order, width):
        """Of N(0, 1) and N(gap, width²)."""
        order, width = mp.mpf(order), mp.mpf(width)
        mixed = order * width**2 + (1 - order)
        return order * mp.mpf(gap) ** 2 / (2 * mixed) + mp.log(width ** (2 * order) / mixed) / (2 * (order - 1))

    pairs = [
        (Normal(t(0.0), t(1.0)), Normal(t(gap), t(1 + gap)), 1),
        (
            MultivariateNormal(t([0.0, 0.0]), t([[1.0, 0.0], [0.0, 1.0]])),
            MultivariateNormal(t([gap, gap]), scale_tril=(1 + gap) * torch.eye(2, dtype=torch.float64)),
            2,
        ),
    ]
    for p, q, count in pairs:
        for order in (0.3, 0.5, 2.0, 1.0001):
            truth = count * renyi(order, 1 + gap)
            assert gaussian(p, q, RenyiDivergence(order)).value == pytest.approx(float(truth), rel=1e-9)
        truth = -mp.expm1(-count * renyi(0.5, 1 + gap) / 2)
        assert gaussian(p, q, Hellinger()).value == pytest.approx(float(truth), rel=1e-9)
        assert gaussian(p, q, ChiSquared()).value == pytest.approx(float(mp.expm1(count * renyi(2, 1 + gap))), rel=1e-9)


# ---- what goes through torch's registry


def test_a_large_law_by_torchs_registry_states_the_error_that_cancels(monkeypatch):
    monkeypatch.setattr(forms, "_kl", forms._registered)
    for a, b in (((1e9, 2e9, 3e9), (1e9 + 1e4, 2e9, 3e9)), ((1e10, 1e10), (1e10 + 1e4, 1e10)), ((2.0, 1e20), (3.0, 1e20))):
        e = closed_form(Dirichlet(t(*a)), Dirichlet(t(*b)), "forward_kl")
        truth = float(of_dirichlet(a, b))
        assert e is None or (not e.exact and abs(e.value - truth) < 4 * e.stderr)
    ordinary = closed_form(Dirichlet(t(1.0, 2.0)), Dirichlet(t(2.0, 2.0)), "forward_kl")
    assert ordinary.exact and ordinary.stderr == 0


def test_infinity_by_a_support_is_certain_and_an_overflow_is_not():
    outside = wk.estimate(p=Normal(t(1e12), t(1e6)), q=Gamma(t(1e12), t(1.0)))  # e^(−5 · 10¹¹) of its mass is below 0
    assert outside.value == math.inf and outside.finite == "infinite" and outside.reliable
    heavy = wk.estimate(p=Pareto(t(1.0), t(1.0)), q=Exponential(t(1.0)), method="closed_form")
    assert heavy.value == math.inf and heavy.finite == "infinite"
    beyond = closed_form(Gumbel(t(0.0), t(1.0)), Gumbel(t(0.0), t(1e-3)), "forward_kl")  # Γ(1001), about 10²⁵⁶⁷
    assert beyond.value == math.inf and beyond.finite == "not certified" and not beyond.reliable


def test_many_parameters_are_left_to_the_registry():
    n, a, b = 6_000, 2.0, 2.5
    p, q = (Dirichlet(torch.full((n,), one, dtype=torch.float64)) for one in (a, b))
    assert precise_kl(p, q) is None
    truth = mp.loggamma(n * a) - mp.loggamma(n * b) + n * (mp.loggamma(b) - mp.loggamma(a))
    truth += n * (a - b) * (mp.digamma(a) - mp.digamma(n * a))
    e = wk.estimate(p=p, q=q)
    assert e.exact and e.value == pytest.approx(float(truth), rel=1e-9)
