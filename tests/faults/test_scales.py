"""Scales: where squares leave float64 a fit is right or the column is refused by its name; no NaN is called reliable."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError, WhichklError
from whichkl.divergences import Estimate
from whichkl.families import LinearGaussian

D = torch.float64
Z = np.random.default_rng(0).normal(size=(200, 2))
FAMILIES = ["gaussian", "gaussian:diagonal", "gaussian:low_rank:1", "mixture:2", "student_t", "product:normal", "mixture:auto"]
INSIDE = [(1e100, 1e100), (1e140, 1e140), (1e-140, 1e-140), (1e-140, 1e140), (1e60, 1e-100)]
OUTSIDE = [(1e154, 1e154), (1e300, 1e300), (1e-300, 1e-300), (1e-200, 1e200), (1.0, 1e160), (1.0, 1e-160), (1e-310, 1.0)]
REFERENCE = {family: wk.fit(Z, family).value for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scales", INSIDE)
def test_a_fit_is_that_of_the_standardised_columns(scales, family):
    fit = wk.fit(Z * np.array(scales), family)
    shift = sum(math.log(one) for one in scales)
    assert fit.value.value - shift == pytest.approx(REFERENCE[family].value, abs=1e-6)
    assert fit.value.stderr == pytest.approx(REFERENCE[family].stderr, rel=1e-4)
    assert fit.value.reliable and fit.status == "converged" and "not_measured" not in fit.findings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scales", OUTSIDE)
def test_beyond_that_the_column_is_named(scales, family):
    column = next(i for i, one in enumerate(scales) if not 1e-145 < one < 1e145)
    with pytest.raises(InputError, match=r"column `[ab]` (reaches|varies by) .*Divide that column by \de[+-]\d+") as caught:
        wk.fit(wk.Target(samples=Z * np.array(scales), names=["a", "b"]), family)
    assert f"column `{'ab'[column]}`" in str(caught.value)


def test_one_number_is_enough_and_a_far_location_with_a_fair_spread_is_none():
    x = Z.copy()
    x[17, 1] = -1e200
    with pytest.raises(InputError, match="column `x2` reaches 1e\\+200"):
        wk.fit(x)
    assert wk.fit(Z + 1e6).value.reliable
    with pytest.raises(InputError, match="constant"):
        wk.fit(np.stack([Z[:, 0], np.full(200, 3.0)], 1))


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_pairs_streams_draws_and_quadrature_are_refused_too(scale, tmp_path):
    targets = {
        "x": wk.Target(samples=(Z * np.array([1.0, scale]), Z[:, 0])),
        "y": wk.Target(samples=(Z, Z[:, 0] * scale)),
    }
    for target in targets.values():
        with pytest.raises(InputError, match="Divide that column"):
            wk.fit(target, LinearGaussian())
    np.save(tmp_path / "x.npy", Z * scale)
    with pytest.raises(InputError, match="Divide that column"):
        wk.fit([str(tmp_path / "x.npy")])
    for family in ("gaussian", "mixture:2"):
        with pytest.raises(InputError, match="these draws"):
            wk.fit(wk.Target(sampler=lambda n: scale * torch.randn(n, 2, dtype=D), dim=2), family)
    with pytest.raises(WhichklError):
        wk.fit(Normal(torch.tensor(0.0, dtype=D), scale))


def test_a_later_part_of_a_stream_is_refused_as_well(tmp_path):
    for name, scale in (("a", 1.0), ("b", 1e200)):
        np.save(tmp_path / f"{name}.npy", Z * scale)
    with pytest.raises(WhichklError):
        wk.fit([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])


@pytest.mark.parametrize("scale", [1e160, 1e300, 1e-160, 1e-300])
def test_on_a_support_the_logarithm_brings_them_back(scale):
    x = np.exp(Z)
    once, far = (wk.fit(wk.Target(samples=x * one, support="positive")) for one in (1.0, scale))
    assert far.value.value - 2 * math.log(scale) == pytest.approx(once.value.value, abs=1e-6)
    assert far.value.reliable


@pytest.mark.parametrize("scale", [1e15, 1e19, 1e30, 1e37, 1e-15, 1e-20, 1e-30, 1e-37])
def test_single_precision_is_read_in_double_where_squares_would_leave_it(scale):
    x = (Z * scale).astype(np.float32)
    fit = wk.fit(x)
    assert fit.value.value - 2 * math.log(scale) == pytest.approx(REFERENCE["gaussian"].value, abs=1e-4)
    assert fit.model.mean.dtype == (D if abs(math.log10(scale)) > 18 else torch.float32)
    spread = fit.model.variance.double().sqrt() / scale
    assert spread.tolist() == pytest.approx(Z.std(0).tolist(), rel=1e-4)
    assert wk.Target(samples=x, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("scale", [1e154, 1e200, 1e300, 1e-160, 1e-300])
@pytest.mark.parametrize("family", ["gaussian", "gaussian:diagonal", "mixture:2"])
def test_log_densities_of_such_scales_are_refused(scale, family):
    with pytest.raises(WhichklError):
        wk.fit(wk.Target(log_prob=lambda x: -(x / scale).square().sum(-1) / 2, dim=2), family)


DIVERGENCES = ["forward_kl", "reverse_kl", "jeffreys", "jensen_shannon", "total_variation", "energy", "mmd", "sliced_wasserstein"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_between_samples_are_right_or_refused(divergence):
    x, y = Z, 1.3 * Z[::-1] + 0.5
    truth = wk.estimate(p=x, q=y, divergence=divergence)
    power = {"energy": 1, "sliced_wasserstein": 2}.get(divergence, 0)
    for scale in (1e100, 1e154, 1e300, 1e-160, 1e-300):
        try:
            found = wk.estimate(p=x * scale, q=y * scale, divergence=divergence)
        except InputError as error:
            assert divergence == "sliced_wasserstein" and "leave float64" in str(error)
            continue
        assert found.value / scale**power == pytest.approx(truth.value, rel=1e-6)
        assert found.reliable == truth.reliable


def sides(scale):
    q = Normal(torch.tensor(scale, dtype=D), torch.tensor(2 * scale, dtype=D))
    return [(p, q) for p in (Z[:, 0] * scale, Normal(torch.tensor(0.0, dtype=D), torch.tensor(scale, dtype=D)))]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_a_divergence_from_a_distribution_is_that_of_other_units_or_an_error(divergence):
    compared = 0
    for one, usual in enumerate(sides(1.0)):
        truth = wk.estimate(p=usual[0], q=usual[1], divergence=divergence)
        for scale in (1e160, 1e300, 1e-160, 1e-300):
            p, q = sides(scale)[one]
            try:
                found = wk.estimate(p=p, q=q, divergence=divergence)
            except WhichklError as error:
                assert "is NaN" in str(error)
            else:
                assert abs(found.value - truth.value) <= 4 * math.hypot(found.stderr, truth.stderr) + 1e-5
                compared += 1
    assert compared >= 5


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1e-310, 1.0])
def test_weights_of_any_scale_are_shares(scale):
    w = np.random.default_rng(1).random(200)
    once, far = (wk.fit(wk.Target(samples=Z, weights=w * one)) for one in (1.0, scale))
    assert far.value.value == pytest.approx(once.value.value, abs=1e-9)
    assert far.model.mean.tolist() == pytest.approx(once.model.mean.tolist(), abs=1e-9)


@pytest.mark.parametrize(("value", "stderr"), [(math.nan, 0.1), (1.0, math.nan), (math.nan, math.nan)])
def test_no_estimate_that_is_no_number_is_reliable(value, stderr):
    found = Estimate("forward_kl", value, stderr, notes=("by hand",))
    assert not found.reliable and found.notes[0] == "by hand" and "isn't a number" in found.notes[1]
    assert "not reliable" in str(found)
    again = Estimate.from_dict(found.to_dict())
    assert not again.reliable and again.notes == found.notes
    assert Estimate("forward_kl", math.inf).reliable


def test_the_command_names_the_column_and_ends_with_exit_code_2(tmp_path):
    np.savetxt(tmp_path / "x.csv", Z * np.array([1.0, 1e200]), delimiter=",", header="a,b", comments="", fmt="%.17g")
    done = whichkl("fit", "x.csv", cwd=tmp_path)
    assert done.returncode == 2 and "column `b` reaches" in done.stderr
