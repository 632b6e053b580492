"""Discrete sides of `estimate`: targets, fits, torch's laws and rows on atoms, in every pairing; truths are sums over atoms."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Binomial, Categorical, Geometric, Independent, Normal, OneHotCategorical, Poisson

import whichkl as wk
from whichkl.divergences.exact.atoms import Atoms
from whichkl.divergences.kinds import KINDS
from whichkl.divergences.samples import counting

P, Q = [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]
SUPPORT = "integer_interval(0, 3)"


def forward_kl(p, q):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


TRUTH = {
    "forward_kl": forward_kl(P, Q),
    "reverse_kl": forward_kl(Q, P),
    "total_variation": sum(abs(a - b) for a, b in zip(P, Q, strict=True)) / 2,
    "hellinger": 1 - sum(math.sqrt(a * b) for a, b in zip(P, Q, strict=True)),
    "chi_squared": sum((a - b) ** 2 / b for a, b in zip(P, Q, strict=True)),
    "jensen_shannon": sum((forward_kl(one, [(a + b) / 2 for a, b in zip(P, Q, strict=True)])) / 2 for one in (P, Q)),
}


def target(probs, *, normalized=True, shift=0.0):
    log_p = torch.tensor(probs, dtype=torch.float64).log() + shift
    return wk.Target(log_prob=lambda x: log_p[x[:, 0].long()], dim=1, support=SUPPORT, normalized=normalized)


def drawn(probs, n, seed=0):
    return np.random.default_rng(seed).choice(len(probs), n, p=probs)


@pytest.fixture(scope="module")
def laws():
    """p and q in every form that has probabilities."""
    return [
        {
            "target": target(probs),
            "unnormalised": target(probs, normalized=False, shift=5.0),
            "torch": Categorical(probs=torch.tensor(probs)),
            "vector": Independent(Categorical(probs=torch.tensor([probs])), 1),
            "fit": wk.fit(target(probs), wk.families.Categorical(), judge=False),
            "fit_of_product": wk.fit(target(probs), "product:categorical", judge=False),
        }
        for probs in (P, Q)
    ]


@pytest.mark.parametrize("divergence", TRUTH)
def test_laws_on_atoms_are_compared_exactly_in_every_form(laws, divergence):
    for p, q in itertools.product(laws[0].values(), laws[1].values()):
        found = wk.estimate(p=p, q=q, divergence=divergence)
        assert found.exact and found.up_to is None
        assert found.value == pytest.approx(TRUTH[divergence], abs=1e-7)  # float32 probabilities


@pytest.mark.parametrize("divergence", TRUTH)
@pytest.mark.parametrize("sides", [("rows", "law"), ("law", "rows"), ("rows", "rows")])
def test_counting_is_unbiased_with_an_honest_error(divergence, sides):
    kind, z, repeats = KINDS[divergence](), [], 60
    for seed in range(repeats):
        rows = [wk.Target(samples=drawn(probs, 400, 2 * seed + i), support=SUPPORT) for i, probs in enumerate((P, Q))]
        known = [Atoms(Categorical(torch.tensor(probs, dtype=torch.float64))) for probs in (P, Q)]
        p, q = (rows[i] if side == "rows" else known[i] for i, side in enumerate(sides))
        found = counting.divergence(p, q, kind)
        assert found.reliable
        z.append((found.value - TRUTH[divergence]) / found.stderr)
    z = np.array(z)
    assert abs(z.mean()) < 4 / math.sqrt(repeats) + 0.15
    assert (np.abs(z) < 1.96).sum() >= 0.95 * repeats - 3 * math.sqrt(repeats * 0.95 * 0.05) - 1


@pytest.mark.parametrize("other", ["support", "law", "fit", "repeats"])
def test_rows_on_atoms_are_counted(laws, other):
    rows = drawn(P, 2000, 3)
    stated = wk.Target(samples=rows, support=SUPPORT)
    p, q = {
        "support": (stated, wk.Target(samples=drawn(Q, 2000, 4), support=SUPPORT)),
        "law": (rows, laws[1]["torch"]),
        "fit": (rows, laws[1]["fit"]),
        "repeats": (rows, drawn(Q, 2000, 4)),
    }[other]
    found = wk.estimate(p=p, q=q)
    assert found.method.startswith("counting") and found.reliable
    assert abs(found.value - TRUTH["forward_kl"]) < 4 * found.stderr < 0.12


def test_weights_count():
    rows, weights = np.repeat([0, 1, 2, 3], 500), np.repeat(P, 500)
    found = wk.estimate(p=wk.Target(samples=rows, weights=weights, support=SUPPORT), q=Categorical(torch.tensor(Q)))
    assert found.value == pytest.approx(TRUTH["forward_kl"], abs=0.003)
    assert "worth 1,667" in found.method  # 2,000 rows, Σ(w²) of the four weights


def test_chains_widen_the_error():
    stay = np.repeat(drawn(P, 1000, 1), 20)
    alone = wk.estimate(p=wk.Target(samples=stay, support=SUPPORT), q=Categorical(torch.tensor(Q)))
    chains = wk.estimate(p=wk.Target(samples=stay, chains=1, support=SUPPORT), q=Categorical(torch.tensor(Q)))
    assert chains.stderr > 3 * alone.stderr


def test_an_atom_that_a_known_law_excludes_makes_it_infinite():
    found = wk.estimate(p=drawn(P, 500), q=Categorical(torch.ones(3) / 3))
    assert found.value == math.inf and found.finite == "infinite" and "on the atoms 3" in found.notes[0]
    assert wk.estimate(p=drawn(P, 500), q=Categorical(torch.ones(3) / 3), divergence="hellinger").finite == "certified"


def test_an_atom_that_the_rows_of_q_lack_is_reported():
    found = wk.estimate(p=drawn(Q, 1000), q=drawn([1 / 3] * 3, 1000))
    assert not found.reliable and "no row of q has" in found.notes[0]
    assert wk.estimate(p=drawn([0.25, 0.25, 0.499, 0.001], 1000), q=drawn([0.25, 0.25, 0.5], 1000, 1)).reliable


def test_equal_shares_are_zero_within_the_error():
    found = counting.divergence(*[wk.Target(samples=drawn(P, 1000))] * 2, KINDS["forward_kl"]())
    assert found.value < 0 < found.interval[1]


def test_mostly_unseen_laws_are_no_matter_of_counting():
    q = Independent(Bernoulli(torch.full((30,), 0.4)), 1)
    x = Independent(Bernoulli(torch.full((30,), 0.3)), 1).sample((500,))
    with pytest.raises(wk.TargetError, match="of the rows of p occur only once"):
        wk.estimate(p=x, q=q, method="counting")
    few = wk.estimate(p=drawn([1 / 60] * 60, 120), q=Categorical(torch.ones(60) / 60))
    assert not few.reliable and "occur only once" in few.notes[0]


COUNTS = [
    (Poisson(torch.tensor(3.0)), Poisson(torch.tensor(4.0)), lambda g, n: g.poisson(3, n)),
    (Binomial(10, torch.tensor(0.3)), Binomial(10, torch.tensor(0.4)), lambda g, n: g.binomial(10, 0.3, n)),
    (Geometric(torch.tensor(0.3)), Geometric(torch.tensor(0.4)), lambda g, n: g.geometric(0.3, n) - 1),
    (OneHotCategorical(torch.tensor(P)), OneHotCategorical(torch.tensor(Q)), lambda g, n: np.eye(4)[g.choice(4, n, p=P)]),
]


@pytest.mark.parametrize(("p", "q", "draw"), COUNTS, ids=lambda one: type(one).__name__)
def test_rows_of_counts_against_laws_of_torch(p, q, draw):
    truth = wk.estimate(p=p, q=q).value
    found = wk.estimate(p=draw(np.random.default_rng(0), 2000), q=q)
    assert found.reliable and abs(found.value - truth) < 4 * found.stderr


def test_fits_of_counts_against_torch_and_each_other():
    g = np.random.default_rng(0)
    rows = [g.poisson(rate, (400, 2)) for rate in (3, 4)]
    p, q = (wk.fit(one, "product:poisson", judge=False) for one in rows)
    rates = [one.mean(0) for one in rows]
    truth = sum(float(b - a + a * mpmath.log(mpmath.mpf(a) / b)) for a, b in zip(*rates, strict=True))
    assert wk.estimate(p=p, q=q).value == pytest.approx(truth, rel=1e-9)
    assert wk.estimate(p=p, q=Independent(Poisson(torch.tensor(rates[1])), 1)).value == pytest.approx(truth, rel=1e-9)
    both = [[math.exp(-r + k * math.log(r) - math.lgamma(k + 1)) for k in range(60)] for r in (*rates[0], *rates[1])]
    joint = [np.outer(*both[i : i + 2]) for i in (0, 2)]
    found = wk.estimate(p=p, q=q, divergence="total_variation")
    assert found.exact and found.value == pytest.approx(np.abs(joint[0] - joint[1]).sum() / 2, abs=1e-9)


def test_bits_of_many_columns_by_coordinates_and_by_draws():
    p, q = ([a] * 20 for a in (0.3, 0.4))
    truth = 20 * forward_kl([0.3, 0.7], [0.4, 0.6])
    of_p = wk.fit((np.random.default_rng(0).random((4000, 20)) < p).astype(float), "product:bernoulli", judge=False)
    rates = of_p.model.mean.tolist()
    mine = sum(forward_kl([a, 1 - a], [0.4, 0.6]) for a in rates)
    law = Independent(Bernoulli(torch.tensor(q, dtype=torch.float64)), 1)
    assert wk.estimate(p=of_p, q=law).value == pytest.approx(mine, rel=1e-9)
    log_q = lambda x: law.log_prob(x)  # noqa: E731
    unlisted = wk.Target(log_prob=log_q, dim=20, support="boolean", normalized=True)
    found = wk.estimate(p=Independent(Bernoulli(torch.tensor(p)), 1), q=unlisted)
    assert found.method.startswith("Monte Carlo") and abs(found.value - truth) < 4 * found.stderr < 0.04


def test_autoregressive_fits_are_listed():
    rows = np.random.default_rng(0).choice(3, (300, 2))
    p = wk.fit(rows, wk.families.Autoregressive(hidden=(8,)), judge=False)
    q = Independent(Categorical(torch.ones(2, 3, dtype=torch.float64) / 3), 1)
    states = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=torch.float64)
    log_p = p.model.log_prob(states).detach().double()
    found = wk.estimate(p=p, q=q)
    assert found.exact and found.value == pytest.approx(float(log_p.exp() @ (log_p + math.log(9))), abs=1e-7)
    other = wk.estimate(p=np.random.default_rng(1).choice(3, (300, 2)), q=p)
    assert other.method.startswith("counting")


def mixed(n, shift=0.0, seed=0):
    g = np.random.default_rng(seed)
    return np.c_[g.normal(size=n) + shift, g.random(n) < 0.4 + shift / 4]


def test_mixed_columns():
    truth = 0.8**2 / 2 + forward_kl([0.4, 0.6], [0.6, 0.4])
    p, q = (wk.fit(mixed(20_000, shift, 9), "product", judge=False) for shift in (0.0, 0.8))
    laws = [one.model.laws for one in (p, q)]
    (a, coin_a), (b, coin_b) = laws
    ratio, gap = float(a.scale / b.scale), float((a.loc - b.loc) / b.scale)
    own = [float(coin.probs) for coin in (coin_a, coin_b)]
    exact = -math.log(ratio) + (ratio**2 + gap**2 - 1) / 2 + forward_kl([own[0], 1 - own[0]], [own[1], 1 - own[1]])
    assert wk.estimate(p=p, q=q).value == pytest.approx(exact, rel=1e-6)
    found = wk.estimate(p=mixed(1000), q=q)
    assert found.reliable and abs(found.value - truth) < 4 * found.stderr < 0.3
    same = wk.estimate(p=mixed(1000), q=p)
    assert abs(same.value) < 4 * same.stderr
    back = wk.estimate(p=q, q=mixed(1000), divergence="reverse_kl")
    assert back.value == pytest.approx(found.value, abs=1e-12)


REFUSED = [
    (np.full(50, 0.5), Poisson(3.0), "q lives on atoms, and row 0 of p isn't of whole numbers: 0.5"),
    (Normal(0.0, 1.0), Poisson(3.0), "p has a density, and q lives on atoms"),
    (target(P, shift=1.0), Categorical(torch.tensor(Q)), "its probabilities sum to 2.71828"),
    (drawn(P, 50).reshape(-1, 2), Poisson(3.0), "p has dimension 2 and q has 1"),
]


@pytest.mark.parametrize(("p", "q", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_compared_is_refused(p, q, message):
    with pytest.raises(wk.WhichklError, match=message) as caught:
        wk.estimate(p=p, q=q)
    assert str(caught.value).startswith("Cannot ")


def test_the_rows_of_a_fit_are_refused_and_other_rows_with_the_same_atoms_are_not():
    rows = drawn(P, 500)
    fit = wk.fit(rows, wk.families.Categorical(), judge=False)
    with pytest.raises(wk.InputError, match="was fitted on these very rows"):
        wk.estimate(p=rows, q=fit)
    assert wk.estimate(p=drawn(P, 500, 1), q=fit).reliable


def test_methods_that_a_refusal_names_work(laws):
    named = set()
    for method in ("knn", "quadrature", "bridge", "closed_form"):
        with pytest.raises(wk.TargetError, match=r"Use one of: (.*)\.$") as caught:
            wk.estimate(p=drawn(P, 200), q=laws[1]["torch"], method=method)
        named.update(str(caught.value).rsplit("Use one of: ", 1)[1].strip(".").split(", "))
    assert "counting" in named
    for method in named:
        wk.estimate(p=drawn(P, 200), q=laws[1]["torch"], method=method)


def test_distances_between_rows_on_atoms():
    p, q = np.array(P), np.array(Q)
    k = np.abs(np.subtract.outer(range(4), range(4)))
    truth = 2 * p @ k @ q - p @ k @ p - q @ k @ q
    found = wk.estimate(p=Categorical(torch.tensor(P)), q=drawn(Q, 4000), divergence="energy")
    assert abs(found.value - truth) < 4 * found.stderr < 0.1
