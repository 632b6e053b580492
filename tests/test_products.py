"""Divergences of laws with independent coordinates, from those of the coordinates."""

import math

import pytest
import torch
from torch.distributions import Beta, Categorical, Cauchy, Gamma, Independent, Laplace, MixtureSameFamily, Normal, StudentT

import whichkl as wk
from whichkl.divergences.exact.closed_form import gaussian
from whichkl.divergences.exact.quadrature import coordinates, of_products
from whichkl.divergences.kinds import KINDS

D = torch.float64


def t(*values):
    return torch.tensor(values, dtype=D)


def product(kind, *parameters):
    return Independent(kind(*parameters), 1)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jeffreys", "renyi", "hellinger", "chi_squared"])
def test_it_agrees_with_the_closed_form_of_gaussians_in_twenty_coordinates(name):
    j = torch.arange(20, dtype=D) / 20
    p, q = product(Normal, j, 1 + 0.1 * j), product(Normal, 0.2 * j, 1.1 + 0.2 * j)
    kind = KINDS[name]()
    joined = of_products(p, q, kind)
    assert joined.exact
    truth = wk.estimate(p=p, q=q, divergence=name).value if name in ("forward_kl", "reverse_kl", "jeffreys") else None
    assert joined.value == pytest.approx(gaussian(p, q, kind).value if truth is None else truth, rel=1e-7)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (
            product(StudentT, t(5.0, 4.0, 8.0, 5.0), t(0.0, 1.0, 0.0, 0.0), t(1.0, 1.0, 2.0, 1.0)),
            product(Laplace, t(0.0, 1.0, 0.0, 1.0), t(1.0, 1.0, 1.0, 1.0)),
        ),
        (
            product(Normal, t(0.0, 1.0, 0.0, 1.0), torch.tensor(1.0, dtype=D)),
            product(Cauchy, t(0.0, 0.0, 0.0, 0.0), t(1.0, 1.0, 1.0, 2.0)),
        ),
        (
            product(Beta, t(0.5, 2.0, 3.0, 1.0), t(0.5, 1.0, 2.0, 1.0)),
            product(Beta, t(1.0, 1.0, 1.0, 2.0), t(1.0, 2.0, 1.0, 2.0)),
        ),
    ],
    ids=["student laplace", "normal cauchy", "beta"],
)
def test_the_automatic_choice_is_exact_and_agrees_with_monte_carlo(p, q):
    exact = wk.estimate(p=p, q=q)
    assert exact.exact
    drawn = wk.estimate(p=p, q=q, method="monte_carlo")
    assert abs(drawn.value - exact.value) < 4 * drawn.stderr
    assert wk.estimate(p=p, q=q, divergence="hellinger").method == "quadrature"


def test_an_infinite_coordinate_is_named():
    p = product(StudentT, t(3.0, 3.0, 3.0, 3.0), t(0.0, 0.0, 0.0, 0.0), t(1.0, 1.0, 1.0, 1.0))
    q = product(Normal, t(0.0, 0.0, 0.0, 0.0), t(1.0, 1.0, 1.0, 1.0))
    estimate = wk.estimate(p=p, q=q, divergence="chi_squared")
    assert estimate.value == math.inf
    assert estimate.notes[0].startswith("in coordinate 1: the integrand")


def test_only_what_is_independent_is_taken_apart():
    mixture = MixtureSameFamily(
        Categorical(torch.ones(2, dtype=D)), product(Normal, torch.zeros(2, 3, dtype=D), torch.ones(2, 3, dtype=D))
    )
    assert coordinates(mixture) is None
    assert coordinates(Normal(t(0.0, 1.0), 1.0)) is None
    assert coordinates(product(Gamma, t(1.0, 2.0), t(1.0, 1.0)))[1].concentration == 2.0
    assert of_products(product(Normal, t(0.0, 0.0), t(1.0, 1.0)), mixture, KINDS["forward_kl"]()) is None
    assert (
        of_products(
            product(Normal, t(0.0, 0.0), t(1.0, 1.0)), product(Normal, t(0.0, 0.0), t(1.0, 1.0)), KINDS["total_variation"]()
        )
        is None
    )
