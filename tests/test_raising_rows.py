"""Log densities that raise for some rows of a batch: the fit is that of the rows that don't, and the finding names the error."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Gamma, LogNormal, Normal, Uniform

import whichkl as wk
from whichkl._checks import DeadDensityError, NotANumberError, TargetError
from whichkl.families import Gaussian, Mixture

D = torch.float64


def bell(x):
    return -x.square().sum(-1) / 2


def raising(where, error=np.linalg.LinAlgError):
    """Return the standard normal in a form that raises for a batch in which any row meets a condition."""

    def log_prob(x):
        if bool(where(x).any()):
            raise error("singular")
        return bell(x)

    return log_prob


def of_one_point(x):
    if float(x.norm()) > 6:
        raise ZeroDivisionError("singular")
    return -(x @ x) / 2


def of_arrays(x):
    x = np.asarray(x)
    if (np.abs(x) > 6).any():
        raise FloatingPointError("singular")
    return -(x**2).sum(-1) / 2


DENSITIES = {
    "beyond 6": (raising(lambda x: x.norm(dim=-1) > 6), {}),
    "beyond 20": (raising(lambda x: x.norm(dim=-1) > 20), {}),
    "beyond a plane": (raising(lambda x: x[:, 0] > 5, RuntimeError), {}),
    "at the origin": (raising(lambda x: (x == 0).all(-1) | (x.norm(dim=-1) > 9)), {}),
    "one point at a time": (of_one_point, {"batched": False}),
    "arrays": (of_arrays, {}),
}


@pytest.mark.parametrize("family", [Gaussian(), Gaussian("diagonal"), Mixture(2)], ids=str)
@pytest.mark.parametrize("name", DENSITIES)
def test_rows_that_raise_are_points_without_density(name, family):
    if isinstance(family, Mixture) and name in ("arrays", "beyond 20"):
        pytest.skip("as for a Gaussian")
    log_prob, options = DENSITIES[name]
    found = wk.fit(wk.Target(log_prob=log_prob, dim=2, **options), family)
    assert found.findings == {"not_a_number_met"}
    assert found.diagnostics.elbo.value == pytest.approx(
        math.log(2 * math.pi), abs=1e-3 if isinstance(family, Gaussian) else 0.004
    )
    assert found.model.mean.tolist() == pytest.approx([0, 0], abs=0.01)
    assert found.model.variance.tolist() == pytest.approx([1, 1], abs=0.01)
    assert any("couldn't be evaluated: it raised" in note and "singular (" in note for note in found.diagnostics.notes)


def test_a_row_that_raises_is_one_that_is_nan():
    def far(x):
        return (x[:, 0] > 4) | (x[:, 1].abs() > 8)

    raises = wk.fit(wk.Target(log_prob=raising(far), dim=2))
    is_nan = wk.fit(wk.Target(log_prob=lambda x: torch.where(far(x), math.nan, bell(x)), dim=2))
    assert raises.findings == is_nan.findings
    assert raises.model.mean.tolist() == pytest.approx(is_nan.model.mean.tolist(), abs=1e-9)
    assert raises.diagnostics.evaluations["rejected"] == is_nan.diagnostics.evaluations["rejected"]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("nearby", [True, False], ids=["far rows", "any rows"])
def test_the_number_of_evaluations_is_bounded(share, nearby, batched):
    n, rows = 256, 0
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    key = x.norm(dim=-1) if nearby else 1 - torch.cos(1e4 * x[:, 0])
    least = key.quantile(1 - share)

    def log_prob(y):
        nonlocal rows
        y = y if batched else y[None]
        rows += len(y)
        if bool(((y.norm(dim=-1) if nearby else 1 - torch.cos(1e4 * y[:, 0])) >= least).any()):
            raise ValueError("bad")
        return bell(y) if batched else bell(y)[0]

    density = wk.Target(log_prob=log_prob, dim=3, batched=batched).density
    density.liveness.remember(x[key < least], bell(x[key < least]))
    for most in (4 * n, 3 * n):  # the second batch begins with a small group
        rows = 0
        value, gradient, rejected = density.trial(x)
        assert rows <= most
        assert torch.equal(value, torch.where(key >= least, -math.inf, bell(x)))
        assert torch.equal(gradient, torch.where((key >= least)[:, None], 0.0, -x))
        assert rejected == int((key >= least).sum())
    rows = 0
    for _ in range(2):
        density.trial(x[key < least])
    assert rows <= 3 * n  # and without rows that raise, the batch is whole again


def test_what_raises_for_every_row_is_an_error():
    calls = 0

    def log_prob(x):
        nonlocal calls
        calls += 1
        if len(x) > 1 or bool((x != 0).any()):
            raise KeyError("mu")
        return bell(x)

    with pytest.raises(TargetError, match=r"^Cannot evaluate `log_prob`: it raised KeyError: 'mu' \(.*_rows.py:\d+\)"):
        wk.fit(wk.Target(log_prob=log_prob, dim=2))
    assert calls < 400
    with pytest.raises(TargetError, match="it raised KeyError"):
        wk.Target(log_prob=raising(lambda x: x[:, 0] > -math.inf, KeyError), dim=2).log_prob(torch.zeros(5, 2, dtype=D))


def test_a_batch_with_rows_that_raise_names_them():
    target = wk.Target(log_prob=raising(lambda x: x[:, 0] > 2), dim=2)
    x = torch.tensor([[0.0, 1.0], [3.0, 0.5]], dtype=D)
    message = r"NaN at 1 of 2 points, first at \(3, 0.5\); at such a point it raised LinAlgError: singular \(.*py:\d+\)\. Return"
    with pytest.raises(NotANumberError, match=message):
        target.log_prob(x)
    assert target.log_prob(x[:1]).tolist() == [-0.5]


def test_a_log_density_that_dies_is_no_row_that_raises():
    alive = True

    def log_prob(x):
        if not alive:
            raise ConnectionError("gone")
        return bell(x)

    target = wk.Target(log_prob=log_prob, dim=2)
    x = torch.ones(64, 2, dtype=D)
    assert target.trial(x)[0].tolist() == [-1.0] * 64
    alive = False
    with pytest.raises(DeadDensityError, match="ConnectionError: gone"):
        target.trial(x)


# ---- torch's laws, which raise outside their support


def test_a_value_outside_the_support_of_a_law_has_density_zero():
    uniform = lambda x: Uniform(-20.0, 20.0).log_prob(x).sum(-1) + bell(x)  # noqa: E731
    found = wk.fit(wk.Target(log_prob=uniform, dim=2))
    assert found.value.value == pytest.approx(2 * math.log(40) - math.log(2 * math.pi), abs=1e-6)
    assert found.findings == frozenset()
    assert any("pass `support=`" in note for note in found.diagnostics.notes)
    x = torch.tensor([[0.0, 0.0], [0.0, 21.0]], dtype=D)
    assert wk.Target(log_prob=uniform, dim=2).log_prob(x).tolist() == pytest.approx([-2 * math.log(40), -math.inf])


def test_the_remedy_of_a_law_that_raises_everywhere_is_support():
    with pytest.raises(TargetError, match="Pass `support="):
        wk.fit(wk.Target(log_prob=lambda x: LogNormal(0.0, 1.0).log_prob(-x.exp()).sum(-1), dim=2))
    with pytest.raises(TargetError, match="Pass `support="):
        wk.fit(wk.Target(log_prob=lambda x: LogNormal(0.0, 1.0).log_prob(x).sum(-1), dim=2))


def test_a_scale_below_zero_is_rejected_and_support_is_the_remedy():
    y = 1 + 2 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=D)

    def log_prob(x):
        return Normal(x[:, :1], x[:, 1:]).log_prob(y).sum(-1) + Gamma(2.0, 1.0).log_prob(x[:, 1]) - x[:, 0].square() / 18

    free = wk.fit(wk.Target(log_prob=log_prob, dim=2))
    assert "not_a_number_met" in free.findings
    assert any("to satisfy the constraint" in note and "pass `support=`" in note for note in free.diagnostics.notes)
    held = wk.fit(wk.Target(log_prob=log_prob, dim=2, support=["real", "positive"]))
    assert "not_a_number_met" not in held.findings
    assert float(free.model.mean[0]) == pytest.approx(float(held.expect(lambda x: x[:, 0]).value), abs=0.05)


# ---- gradients that overflow where p has no mass


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_may_overflow_where_the_log_density_is_hopeless(wrong):
    def log_prob(x):  # a compiled density: log p = −e^{10 x₁} − e^{4|x₁|} + x₁ − x₂²/2, with its gradient
        steep, both = np.exp(10 * x[:, 0]), np.exp(np.abs(4 * x[:, 0]))
        value = x[:, 0] - steep - both - x[:, 1] ** 2 / 2
        slope = 1 - 10 * steep - 4 * np.sign(x[:, 0]) * both
        slope[value < -1e15] = wrong
        return value, np.stack([slope, -x[:, 1]], 1)

    found = wk.fit(wk.Target(log_prob=lambda x: log_prob(np.asarray(x)), dim=2, score=True))
    assert found.status == "converged"
    assert "not_a_number_met" not in found.findings
    assert float(found.model.mean[1]) == pytest.approx(0, abs=1e-6)
