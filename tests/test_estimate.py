"""`estimate`: the method follows from the access, the number is right, and bad input is refused in words."""

import json
import math
import re

import numpy as np
import pytest
import torch
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    ContinuousBernoulli,
    Exponential,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    Uniform,
    kl_divergence,
)

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError, TargetError
from whichkl.divergences.dispatch import METHODS
from whichkl.divergences.kinds import KINDS, PARAMETERS, ROW_DIVERGENCES

GRAMMAR = re.compile(r"^Cannot .+: .+\. [A-Z].+\.$", re.DOTALL)
D = torch.float64


def rows(seed, n, dim, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=D) + shift


def mvn(dim, shift=0.0, variance=1.0):
    return MultivariateNormal(torch.full((dim,), shift, dtype=D), variance * torch.eye(dim, dtype=D))


def unnormalised(dim, constant=2.0, **more):
    return wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2 + constant, dim=dim, **more)


EXACT = [
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "forward_kl", 0.443147, "closed form"),
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "reverse_kl", 1.306853, "closed form"),
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "total_variation", 0.390066, "quadrature"),
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "jensen_shannon", 0.128175, "quadrature"),
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "hellinger", 0.149195, "closed form"),
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "renyi", 0.323144, "closed form"),
    (Normal(0.0, 1.0), Normal(1.0, 2.0), "chi_squared", 0.744026, "closed form"),
    (Exponential(0.2), Exponential(0.4), "forward_kl", 0.306853, "closed form"),
    (Uniform(0.0, 1.0), Normal(0.0, 1.0), "forward_kl", 1.085605, "closed form"),
    (Uniform(0.0, 1.0), Normal(0.0, 1.0), "reverse_kl", math.inf, "quadrature"),
    (Uniform(0.0, 1.0), Beta(1.0, 1.0), "forward_kl", 0.0, "closed form"),
    (Uniform(0.0, 1.0), Uniform(0.0, 2.0), "reverse_kl", math.inf, "quadrature"),
    (Cauchy(0.0, 1.0), Cauchy(1.0, 1.0), "forward_kl", 0.223144, None),
    (Laplace(0.0, 1.0), Normal(0.0, 1.0), "forward_kl", 0.225791, None),
    (Normal(0.0, 1.0), Cauchy(0.0, 1.0), "forward_kl", 0.259245, "quadrature"),
    (Normal(0.0, 1.0), Cauchy(0.0, 1.0), "reverse_kl", math.inf, "quadrature"),
    (Categorical(torch.tensor([0.36, 0.48, 0.16])), Categorical(torch.ones(3) / 3), "forward_kl", 0.0853, "closed form"),
    (Poisson(3.0), Poisson(5.0), "reverse_kl", 0.554128, "closed form"),
    (Poisson(3.0), Poisson(5.0), "jensen_shannon", 0.112766, "enumeration"),
    (Uniform(0.0, 1.0), Uniform(2.0, 3.0), "jensen_shannon", math.log(2), "quadrature"),
    (ContinuousBernoulli(torch.tensor(0.3, dtype=D)), Uniform(0.0, 1.0), "forward_kl", 0.029386, "closed form"),
]


@pytest.mark.parametrize(("p", "q", "divergence", "truth", "method"), EXACT, ids=str)
def test_exact_pairs_by_the_method_that_they_allow(p, q, divergence, truth, method):
    e = wk.estimate(p=p, q=q, divergence=divergence)
    assert e.exact and e.quantity == divergence and (method is None or e.method == method)
    assert e.value == pytest.approx(truth, abs=1e-6)
    assert e.value == truth or e.finite == "certified"
    assert math.isfinite(e.value) or e.notes


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_by_monte_carlo_agrees_with_quadrature(kind):
    p, q = Normal(torch.tensor(0.0, dtype=D), 1.0), Normal(torch.tensor(0.6, dtype=D), 1.2)
    exact = wk.estimate(p=p, q=q, divergence=kind, method="quadrature")
    scores = []
    for seed in range(40):
        e = wk.estimate(p=p, q=q, divergence=kind, method="monte_carlo", n=2000, seed=seed)
        scores.append((e.value - exact.value) / e.stderr)
    assert abs(np.mean(scores)) < 4 / math.sqrt(40)
    assert 0.6 < np.std(scores) < 1.5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys", "jeffreys_sum"])
def test_monte_carlo_kl_in_ten_dimensions(divergence):
    p, q = mvn(10), mvn(10, 0.3, 1.5)
    truth = {"forward_kl": kl_divergence(p, q), "reverse_kl": kl_divergence(q, p)}
    truth["jeffreys_sum"] = truth["forward_kl"] + truth["reverse_kl"]
    truth["jeffreys"] = truth["jeffreys_sum"] / 2
    e = wk.estimate(p=p, q=q, divergence=divergence, method="monte_carlo")
    assert not e.exact and abs(e.value - float(truth[divergence])) < 4 * e.stderr


def test_constants_of_unnormalised_targets_are_said_or_cancel():
    q = mvn(4, 0.2)
    log_z = 2.0 * math.log(2 * math.pi) + 2.0
    reverse = wk.estimate(p=unnormalised(4), q=q, divergence="reverse_kl")
    assert reverse.up_to == "log_z" and abs(reverse.value + log_z - 0.08) < 4 * reverse.stderr
    sampled = unnormalised(4, sampler=lambda n: torch.randn(n, 4, dtype=D))
    for divergence, truth in (("jeffreys", 0.08), ("jeffreys_sum", 0.16)):
        both = wk.estimate(p=sampled, q=q, divergence=divergence)
        assert both.up_to is None and abs(both.value - truth) < 4 * both.stderr
    reweighted = wk.estimate(p=unnormalised(4), q=mvn(4, 0.2, 1.5))
    assert reweighted.method.startswith("self-normalised") and reweighted.up_to is None and reweighted.reliable
    assert abs(reweighted.value - float(kl_divergence(mvn(4), mvn(4, 0.2, 1.5)))) < 4 * reweighted.stderr


def test_reweighting_knows_its_cap():
    e = wk.estimate(p=unnormalised(20), q=mvn(20, 1.5))  # truth 22.5 nats, e^22 draws away
    assert not e.reliable and e.value <= e.cap == pytest.approx(math.log(20_000)) and e.finite == "not certified"


def test_reweighting_covers():
    truth = float(kl_divergence(mvn(2), mvn(2, 0.3, 1.5)))
    inside = 0
    for seed in range(200):
        low, high = wk.estimate(p=unnormalised(2), q=mvn(2, 0.3, 1.5), method="self_normalised", n=2000, seed=seed).interval
        inside += low <= truth <= high
    assert 0.9 <= inside / 200 <= 0.99


def test_samples_choose_neighbours_a_classifier_or_a_statistic():
    x, y = rows(0, 1500, 2, 0.5), rows(2, 1500, 2)
    assert wk.estimate(p=x, q=y).method.startswith("nearest neighbours") and wk.estimate(p=x, q=y).finite == "not certified"
    one = wk.estimate(p=x, q=mvn(2))
    assert "log density" in one.method and abs(one.value - 0.25) < 4 * one.stderr
    back = wk.estimate(p=x, q=mvn(2), divergence="reverse_kl")
    assert "two samples" in back.method and back.quantity == "reverse_kl" and abs(back.value - 0.25) < 4 * back.stderr
    sums = wk.estimate(p=x, q=y, divergence="jeffreys_sum")
    assert abs(sums.value - 0.5) < 3 * sums.stderr
    half = wk.estimate(p=x, q=y, divergence="jeffreys")
    assert (half.value, half.stderr) == (sums.value / 2, sums.stderr / 2) and "nearest neighbours" in half.method
    assert "classifier" in wk.estimate(p=x, q=y, divergence="total_variation").method
    for name in ("energy", "mmd", "sliced_wasserstein"):
        e = wk.estimate(p=x, q=y, divergence=name)
        assert e.quantity == name and e.unit == "none" and e.value > 0
    assert "bound" in wk.estimate(p=x, q=y, method="bound").method


def test_the_directions_are_not_mixed_up():
    p, q = Normal(torch.tensor(0.0, dtype=D), 1.0), Normal(torch.tensor(0.0, dtype=D), 2.0)
    truth = {"forward_kl": float(kl_divergence(p, q)), "reverse_kl": float(kl_divergence(q, p))}  # 0.32 and 0.81
    x, y = rows(2, 4000, 1), 2 * rows(3, 4000, 1)
    for (name, value), other in zip(truth.items(), reversed(truth.values()), strict=True):
        e = wk.estimate(p=x, q=y, divergence=name)
        assert e.reliable and abs(e.value - value) < 2 * e.stderr and abs(e.value - value) < abs(e.value - other) / 3


def test_where_one_method_doubts_itself_the_next_is_asked():
    e = wk.estimate(p=rows(2, 4000, 1), q=2 * rows(3, 4000, 1), divergence="reverse_kl")
    assert "classifier" in e.method and any(note.startswith("knn gives") for note in e.notes)


def test_draws_outside_the_support_of_q_are_infinite():
    e = wk.estimate(p=rows(0, 500, 1), q=Exponential(torch.tensor(1.0, dtype=D)))
    assert e.value == math.inf and e.finite == "infinite" and "rows" in e.notes[0]


BOX = Independent(Uniform(torch.full((4,), -2.0, dtype=D), torch.full((4,), 2.0, dtype=D)), 1)
UNSCALED = {"log_prob": lambda x: torch.zeros(len(x), dtype=D), "dim": 4, "support": "interval(-2, 2)"}
BEYOND = [  # p, q, divergence, method
    (mvn(4), BOX, "forward_kl", "monte_carlo"),
    (BOX, mvn(4), "reverse_kl", "monte_carlo"),
    (mvn(4), BOX, "jeffreys", "monte_carlo"),
    (mvn(4), BOX, "chi_squared", "monte_carlo"),
    (wk.Target(sampler=lambda n: 4 * torch.rand(n, 4, dtype=D) - 2, **UNSCALED), mvn(4), "reverse_kl", "bridge"),
    (wk.Target(**UNSCALED), mvn(4), "reverse_kl", "self_normalised"),
    (wk.Target(**UNSCALED), mvn(4), "jeffreys", "self_normalised"),
]


@pytest.mark.parametrize(("p", "q", "divergence", "method"), BEYOND, ids=str)
def test_draws_beyond_the_other_support_are_explained_by_place_and_mass(p, q, divergence, method):
    e = wk.estimate(p=p, q=q, divergence=divergence, method=method)
    assert e.value == math.inf and e.finite == "infinite"
    count, of, mass = re.match(r"([\d,]+) of ([\d,]+) draws \((.*) of the mass\) fell where", e.notes[0]).groups()
    truth = 1 - (1 - 2 * 0.02275) ** 4
    n = int(of.replace(",", ""))
    assert abs(int(count.replace(",", "")) / n - truth) < 4 * math.sqrt(truth / n) and float(mass) == pytest.approx(
        truth, abs=0.02
    )
    assert e.notes[0].endswith(": " + " or ".join(f"x{j} < -2 or x{j} > 2" for j in range(1, 5)))


def test_probabilities_and_logits():
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]])
    e = wk.estimate(p=p, q=q, form="probabilities")
    assert e.exact and e.value == pytest.approx(math.log(2) / 2, abs=1e-7) and "2 rows" in e.notes[0]
    logits = wk.estimate(p=p.log() + 3, q=q.log() - 1, form="logits")
    assert logits.value == pytest.approx(e.value, abs=1e-6)
    infinite = wk.estimate(p=q, q=p, form="probabilities")
    assert infinite.value == math.inf and "0.5 of the mass of p" in infinite.notes[-1] and infinite.notes[-1].endswith(": 2")


def test_rows_that_a_fit_has_seen_are_refused():
    x = rows(0, 400, 1, 1.0)
    fit = wk.fit(wk.Target(samples=x), seed=0)
    with pytest.raises(InputError, match="fitted on these very rows"):
        wk.estimate(p=x, q=fit)
    assert abs(wk.estimate(p=rows(1, 400, 1, 1.0), q=fit).value) < 0.2


BAD = [
    ({"p": [0.5, -0.5, 1.0], "q": [0.3, 0.3, 0.4], "form": "probabilities"}, "p is -0.5 at row 0, atom 1"),
    ({"p": [0.5, 0.5], "q": [0.3, 0.3], "form": "probabilities"}, "row 0 of q sums to 0.6, not 1"),
    ({"p": [0.5, 0.5], "q": [[0.5], [0.5]], "form": "probabilities"}, r"p has shape \(2,\) and q \(2, 1\)"),
    ({"p": ["a"], "q": [1.0], "form": "probabilities"}, "p is a `list`"),
    ({"p": rows(0, 50, 1), "q": rows(1, 50, 2)}, "p has dimension 1 and q has 2"),
    ({"p": torch.ones(50, 1), "q": rows(1, 50, 1)}, "column `x1` is constant"),
    ({"p": torch.full((50, 1), math.nan), "q": rows(1, 50, 1)}, "50 cells in 50 of 50 rows are NaN or infinite"),
    ({"p": torch.empty(0, 1), "q": rows(1, 50, 1)}, "they are empty"),
    ({"p": Normal(0.0, 1.0), "q": Normal(torch.zeros(3), 1.0)}, r"q is a batch of \(3,\) distributions"),
    ({"p": rows(0, 50, 1), "q": Poisson(3.0)}, "q lives on atoms"),
    ({"p": Normal(0.0, 1.0), "q": Normal(0.0, 1.0), "divergence": "kl"}, "no such divergence"),
    ({"p": Normal(0.0, 1.0), "q": Normal(0.0, 1.0), "order": 2.0}, "`forward_kl` has no such parameter"),
    ({"p": Normal(0.0, 1.0), "q": Normal(0.0, 1.0), "method": "guess"}, "no such method"),
    ({"p": Normal(0.0, 1.0), "q": Normal(0.0, 1.0), "form": "logit"}, "Write samples, probabilities or logits"),
    ({"p": Normal(0.0, 1.0), "q": Normal(0.0, 1.0), "n": 3}, "at least 100 draws"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_words(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        wk.estimate(**arguments)
    assert GRAMMAR.match(str(caught.value))


def test_a_column_and_a_vector_are_the_same_samples():
    x, y = rows(0, 300, 1, 0.5), rows(1, 300, 1)
    assert wk.estimate(p=x[:, 0], q=y) == wk.estimate(p=x, q=y)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_the_access_forbids_is_refused_with_those_that_it_allows(method):
    """A log density alone on both sides allows nothing in four variables; the message says what each method needs."""
    p, q = unnormalised(4), unnormalised(4)
    with pytest.raises(TargetError, match=f"Cannot use `{method}` for .* it requires") as caught:
        wk.estimate(p=p, q=q, method=method)
    assert GRAMMAR.match(str(caught.value))
    with pytest.raises(TargetError, match="no method takes this access"):
        wk.estimate(p=p, q=q)


def test_units():
    with pytest.raises(InputError, match="has no unit"):
        _ = wk.estimate(p=Normal(0.0, 1.0), q=Normal(1.0, 1.0), divergence="hellinger").bits
    assert wk.estimate(p=Normal(0.0, 1.0), q=Normal(1.0, 1.0)).bits.value == pytest.approx(0.5 / math.log(2))


def test_a_student_against_a_normal_has_infinite_chi_squared_beside_a_finite_kl():
    p, q = Normal(torch.tensor(0.0, dtype=D), 1.5), Normal(torch.tensor(0.0, dtype=D), 1.0)
    assert math.isfinite(wk.estimate(p=p, q=q).value)
    infinite = wk.estimate(p=p, q=q, divergence="chi_squared")
    assert infinite.value == math.inf and "too wide" in infinite.notes[0]
    assert wk.estimate(p=StudentT(torch.tensor(5.0, dtype=D)), q=q, divergence="chi_squared").value == math.inf


@pytest.mark.parametrize(("divergence", "order"), [("renyi", 0.3), ("renyi", 1.2), ("hellinger", None), ("chi_squared", None)])
def test_closed_forms_of_gaussians_agree_with_quadrature_and_add_up(divergence, order):
    p, q = Normal(torch.tensor(0.0, dtype=D), 1.0), Normal(torch.tensor(0.6, dtype=D), 1.2)
    exact = wk.estimate(p=p, q=q, divergence=divergence, order=order)
    line = wk.estimate(p=p, q=q, divergence=divergence, order=order, method="quadrature")
    assert exact.method == "closed form" and exact.value == pytest.approx(line.value, abs=1e-9)
    many = wk.estimate(p=mvn(12), q=mvn(12, 0.6, 1.44), divergence=divergence, order=order).value
    per = {"renyi": lambda d: 12 * d, "hellinger": lambda d: 1 - (1 - d) ** 12, "chi_squared": lambda d: (1 + d) ** 12 - 1}
    assert many == pytest.approx(per[divergence](exact.value), rel=1e-9)


def test_products_of_registered_pairs():
    p = Independent(Normal(torch.zeros(40, dtype=D), 1.0), 1)
    q = Independent(Normal(torch.ones(40, dtype=D), 1.0), 1)
    assert wk.estimate(p=p, q=q).value == pytest.approx(20)


def command(*arguments):
    return whichkl("estimate", *arguments)


def test_the_command_prints_both_directions_and_json(tmp_path):
    np.savetxt(tmp_path / "p.csv", rows(0, 800, 1, 0.5).numpy(), header="x1", comments="")
    done = command("--p", str(tmp_path / "p.csv"), "--q", "Normal(0,1)")
    assert done.returncode == 0, done.stderr
    for word in ("forward_kl", "reverse_kl", "nearest", "KL(p‖q), the expectation under p", "95 % confidence"):
        assert word in done.stdout
    done = command("--p", "Normal(0,1)", "--q", "Cauchy(0,1)", "--json")
    answer = json.loads(done.stdout)
    assert answer["value"] == pytest.approx(0.259245, abs=1e-6) and answer["other_direction"]["value"] == "inf"
    done = command("--p", "Normal(0,1)", "--q", "__import__('os')")
    assert done.returncode == 2 and done.stderr.startswith("error: Cannot read")


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_value_is_a_number_and_no_loss(dim):
    """Parameters that ask for a gradient get none: an estimate of a value isn't an estimate of its gradient."""
    loc = torch.full((dim,), 0.5, dtype=D, requires_grad=True)
    p, q = (torch.distributions.Independent(one, 1) for one in (Normal(loc, 1.0), Laplace(2 * loc, 1.0)))
    for method in (None, "quadrature", "monte_carlo", "knn", "classifier"):
        try:
            e = wk.estimate(p=p, q=q, method=method, n=500)
        except TargetError:
            continue
        assert type(e.value) is float
        assert type(e.stderr) is float
    logits = torch.zeros(2, 3, dtype=D, requires_grad=True)
    assert type(wk.estimate(p=logits, q=logits, form="logits").value) is float
    assert loc.grad is None
    assert logits.grad is None


@pytest.mark.parametrize("name", sorted(KINDS.keys() & ROW_DIVERGENCES.keys()))
def test_estimates_and_losses_have_one_definition(name):
    teacher, student = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0), dtype=D)
    for value in (None, 0.2, 0.7):
        given = {} if value is None else dict.fromkeys(PARAMETERS[name], value)
        estimate = wk.estimate(p=teacher, q=student, divergence=name, form="logits", **given)
        loss = wk.losses.DIVERGENCES[name].function(teacher=teacher, student=student, **given)
        assert estimate.value == pytest.approx(float(loss), abs=1e-12)


def test_parameters_at_an_end_give_the_simpler_divergence():
    p, q = Normal(0.0, 1.0), Normal(1.0, 2.0)
    forward, reverse = (wk.estimate(p=p, q=q, divergence=name) for name in ("forward_kl", "reverse_kl"))
    ends = [("jeffreys", {"weight_on_forward": 1.0}), ("skew_forward_kl", {"weight": 0.0}), ("renyi", {"order": 1.0})]
    assert all(wk.estimate(p=p, q=q, divergence=name, **given) == forward for name, given in ends)
    assert wk.estimate(p=p, q=q, divergence="skew_reverse_kl", weight=0.0) == reverse


def test_jeffreys_states_that_it_changed_and_takes_its_weight():
    p, q = mvn(10), mvn(10, 0.3, 1.5)
    exact = wk.estimate(p=p, q=q, divergence="jeffreys")
    assert "jeffreys_sum" in exact.notes[-1] and exact.reliable
    assert exact.value == wk.estimate(p=p, q=q, divergence="jeffreys_sum").value / 2
    truth = 0.2 * float(kl_divergence(p, q)) + 0.8 * float(kl_divergence(q, p))
    for method in ("closed_form", "monte_carlo", "self_normalised"):
        e = wk.estimate(p=p, q=q, divergence="jeffreys", weight_on_forward=0.2, method=method)
        assert e.reliable and abs(e.value - truth) <= 4 * e.stderr + 1e-9 < 0.04
    sampled = unnormalised(10, sampler=lambda n: torch.randn(n, 10, dtype=D))
    with pytest.raises(TargetError, match="requires"):
        wk.estimate(p=sampled, q=q, divergence="jeffreys", weight_on_forward=0.2, method="monte_carlo")


@pytest.mark.parametrize("method", ["knn", "classifier", "bound", None])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
def test_notes_name_p_and_q(method, divergence):
    """Methods of samples know them as x and y; no note does."""
    if (method, divergence) == ("bound", "jeffreys"):
        return
    rng = np.random.default_rng(0)
    for shift, power in ((0, 1), (6, 1), (0, 3)):
        x, y = rng.normal(size=(60, 2)), shift + rng.normal(size=(60, 2)) ** power
        notes = " ".join(wk.estimate(p=x, q=y, divergence=divergence, method=method).notes)
        assert not re.search(r"(?<![₀-₉\w])[xy](?![\w₀-₉])", notes), notes


def test_the_sides_are_named_in_either_direction():
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=(300, 1)), rng.normal(size=(300, 1)) * 9 + 20
    for p, q, divergence, far, near in ((wide, narrow, "forward_kl", "p", "q"), (narrow, wide, "reverse_kl", "q", "p")):
        notes = " ".join(wk.estimate(p=p, q=q, divergence=divergence, method="knn").notes)
        assert f"of the rows of {far} have fewer than 5 of {near} in a ball with a tenth of all {far}: {near} may" in notes
