"""Golden records and laws of every solver: what it finds on small targets, now and when it was recorded.

`python tests/golden.py` prints by how much each case differs from its record; with `--record` it writes the records again.
"""

import json
import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, Normal

from whichkl import Target
from whichkl.families import (
    Autoregressive,
    BlockMixture,
    Flow,
    Gaussian,
    GeneralizedLinear,
    LinearGaussian,
    Mixture,
    MixtureDensityNetwork,
    Module,
    Product,
    StudentT,
)
from whichkl.objectives import objective_of
from whichkl.particles.located import located_particles
from whichkl.problems import bimodal, eight_schools, petals, restricted_boltzmann
from whichkl.solvers import (
    SOLVERS,
    ScoreFunction,
    StickingTheLanding,
    Stochastic,
    StochasticTwoSided,
    solver_for,
)

D = torch.float64
FILE = Path(__file__).with_name("golden.json")
SEED = 5
MOST_NUMBERS = 400
"""Largest number of parameters that is recorded one by one; of more, the first ones are."""
TRAINED = ("coordinate_ascent", "stochastic", "sticking_the_landing", "score_function", "stochastic_two_sided", "particles")
"""Solvers whose steps follow random draws: another processor's rounding leads them to another model of much the same loss."""


def correlated(count=400):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.tensor([[1.0, 0.8], [0.0, 0.6]], dtype=D)
    return torch.randn(count, 2, generator=generator, dtype=D) @ mixing + torch.tensor([5.0, -1.0], dtype=D)


def banana(x):
    return -0.5 * (x[:, 0] / 2).square() - 0.5 * (x[:, 1] - 0.3 * x[:, 0].square()).square()


def ridge(x):
    """Ten correlated columns with tails heavier than a normal law's."""
    whole = x.sum(-1)
    return -3 * torch.log1p(x.square() / 4).sum(-1) - 0.2 * (whole - 3).square()


def five(count=300):
    """Draws of five columns, correlated and not normal."""
    generator = torch.Generator().manual_seed(6)
    whole = torch.randn(count, 1, generator=generator, dtype=D)
    return torch.rand(count, 5, generator=generator, dtype=D).log() + torch.linspace(-2, 2, 5, dtype=D) * whole


def normalised_banana():
    """Draws and a normalised density of x₁ ~ N(0, 1), x₂ ~ N(x₁² − 1, ½)."""

    def draw(n, generator):
        z = torch.randn(n, 2, generator=generator, dtype=D)
        return torch.stack([z[:, 0], z[:, 0].square() - 1 + z[:, 1] / 2], -1)

    def log_prob(x):
        return -x[:, 0].square() / 2 - 2 * (x[:, 1] - x[:, 0].square() + 1).square() - torch.log(torch.tensor(torch.pi, dtype=D))

    return Target(sampler=draw, log_prob=log_prob, normalized=True, dim=2)


def responses(kind):
    """Pairs (x, y) with y a function of x and noise."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 3, generator=generator, dtype=D)
    line = x @ torch.tensor([1.0, -0.5, 0.2], dtype=D)
    noise = torch.rand(300, generator=generator, dtype=D)
    y = {
        "bernoulli": (noise < torch.sigmoid(line)).to(D),
        "poisson": torch.floor(-torch.log(noise) * (line / 2).exp()),
        "categorical": (2 * torch.sigmoid(line) + noise).floor().clamp(max=2),
    }[kind]
    return Target(samples=(x, y))


class Bell(torch.nn.Module):
    """A user's own family: independent normal laws."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2, dtype=D))
        self.log_scale = torch.nn.Parameter(torch.zeros(2, dtype=D))

    def forward(self):
        return Independent(Normal(self.loc, self.log_scale.exp()), 1)


TARGETS = {
    "samples": lambda: Target(samples=correlated()),
    "five": lambda: Target(samples=five()),
    "wide": lambda: Target(log_prob=ridge, dim=40),
    "petals": petals,
    "bimodal": lambda: Target.of(bimodal(3.0)),
    "unequal": lambda: Target.of(bimodal(3.0, 0.7)),
    "banana": lambda: Target(log_prob=banana, dim=2),
    "ridge": lambda: Target(log_prob=ridge, dim=10),
    "schools": eight_schools,
    "both": normalised_banana,
    "boltzmann": lambda: restricted_boltzmann(8, 4),
    "bernoulli": lambda: responses("bernoulli"),
    "poisson": lambda: responses("poisson"),
    "categorical": lambda: responses("categorical"),
}
FLOW = Flow(transforms=1, hidden=(8,))
SMALL = Autoregressive(hidden=(8,))
FULL, DIAGONAL, LOW_RANK = Gaussian(), Gaussian("diagonal"), Gaussian("low_rank", rank=2)
LANDING = StickingTheLanding(steps=60, cycles=1, draws=64, judged_on=512, starts=2)
SCORES = ScoreFunction(steps=60, cycles=1, draws=32, judged_on=256)
TWO = StochasticTwoSided(epochs=1, learning_rate=2e-2, batch=2_048, judged_on=512)

CASES = [
    *[("forward_kl", "closed_form", family, name) for family in (FULL, DIAGONAL) for name in ("samples", "petals")],
    ("forward_kl", "closed_form", LOW_RANK, "five"),
    ("forward_kl", "closed_form", Product("normal"), "five"),
    ("forward_kl", "closed_form", LinearGaussian(), "poisson"),
    *[("forward_kl", "closed_form", FULL, name) for name in ("bimodal", "unequal", "both")],
    *[("forward_kl", "newton", GeneralizedLinear(kind), kind) for kind in ("bernoulli", "poisson", "categorical")],
    *[("forward_kl", "em", Mixture(3, kind), "petals") for kind in ("full", "diagonal", "tied")],
    *[("forward_kl", "em", Mixture(2), name) for name in ("samples", "bimodal", "both")],
    *[("forward_kl", "em", family, "samples") for family in (Mixture(2, law="student_t"), StudentT())],
    *[
        ("reverse_kl", "mean_field", DIAGONAL, name)
        for name in ("bimodal", "unequal", "banana", "schools", "ridge", "wide", "both")
    ],
    ("reverse_kl", "low_rank", LOW_RANK, "schools"),
    *[("reverse_kl", "low_rank", Gaussian("low_rank", rank=1), name) for name in ("ridge", "wide")],
    *[
        ("reverse_kl", "natural_gradient", FULL, name)
        for name in ("bimodal", "unequal", "banana", "schools", "ridge", "wide", "both")
    ],
    *[("reverse_kl", "sample_average", Mixture(2), name) for name in ("bimodal", "unequal", "banana", "both")],
    *[("reverse_kl", "sample_average", Mixture(3, "diagonal"), name) for name in ("bimodal", "banana")],
    *[
        (spec, "two_sided", family, name)
        for spec in ("jeffreys:0.3", "jensen_shannon:0.4", "skew_forward_kl:0.2", "skew_reverse_kl:0.2", "renyi:0.4", "renyi:1.7")
        for family, name in ((FULL, "unequal"), (DIAGONAL, "both"), (Mixture(2), "both"))
    ],
    ("jeffreys:0.5", "two_sided", FULL, "both"),
    *[("reverse_kl", "enumeration", family, "boltzmann") for family in (Product("bernoulli"), SMALL)],
    ("reverse_kl", "coordinate_ascent", Product("bernoulli"), "boltzmann"),
    ("reverse_kl", SCORES, SMALL, "boltzmann"),
    *[("reverse_kl", LANDING, family, "banana") for family in (FLOW, Module(Bell()))],
    *[("forward_kl", Stochastic(steps=100, batch=256), family, "samples") for family in (FLOW, Module(Bell()))],
    ("forward_kl", Stochastic(steps=100, batch=128), MixtureDensityNetwork(2, hidden=(8,)), "poisson"),
    ("forward_kl", "block_em", BlockMixture(2, blocks=2), "five"),
    *[("forward_kl", "particles", family, name) for family, name in ((FULL, "banana"), (Mixture(2), "unequal"))],
    *[(spec, TWO, FLOW, "both") for spec in ("jeffreys:0.3", "jensen_shannon:0.4", "renyi:0.4")],
]


def label(case):
    objective, solver, family, target = case
    return f"{objective}-{solver if isinstance(solver, str) else solver.name}-{family!r}-{target}"


LABELS = {label(case): case for case in CASES}


@cache
def solved(name):
    """The target, the objective and the solution of a case."""
    spec, wanted, family, target = LABELS[name]
    objective, target = objective_of(spec), TARGETS[target]()
    target.evaluations.update(dict.fromkeys(target.evaluations, 0))
    solver = solver_for(objective, family, target.access, wanted)
    solution = solver.solve(target.unconstrained() if family.carried else target, family, SEED)
    return target, objective, solution, dict(target.evaluations)


def found(name):
    """What a solver finds, as JSON can hold it."""
    family, (_, _, solution, evaluations) = LABELS[name][2], solved(name)
    model = solution.best.model
    # A low-rank factor may be rotated without another model.
    is_low_rank = getattr(family, "covariance", "") == "low_rank"
    given = {"loc": model.mean, "covariance": model.covariance_matrix} if is_low_rank else family.parameters(model)
    numbers = {key: value.detach().to(D).flatten() for key, value in given.items()}
    return {
        "losses": [one.loss for one in solution.optima],
        "converged": [one.converged for one in solution.optima],
        "residual": solution.residual,
        "nodes": solution.nodes,
        "node_error": solution.node_error,
        "parameters": {key: value[:MOST_NUMBERS].tolist() for key, value in numbers.items()},
        "evaluations": {key: int(value) for key, value in evaluations.items() if value},
    }


def difference(now, then):
    """The largest shift of a parameter, the change of the losses, and that of the evaluations as a fraction."""
    shift = max(
        (
            abs(a - b) / max(1.0, abs(b))
            for key in then["parameters"]
            for a, b in zip(now["parameters"][key], then["parameters"][key], strict=True)
        ),
        default=0.0,
    )
    worse = max((a - b for a, b in zip(now["losses"], then["losses"], strict=True)), key=abs, default=0.0)
    used = sum(then["evaluations"].values())
    return shift, worse, sum(now["evaluations"].values()) / used - 1 if used else 0.0


def test_every_solver_has_a_record():
    solvers = {one if isinstance(one, str) else one.name for _, one, _, _ in CASES}
    assert solvers == {kind.name for kind in SOLVERS}
    assert set(json.loads(FILE.read_text())) == set(LABELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELS)
def test_solver_finds_what_it_found(name):
    now, then = found(name), json.loads(FILE.read_text())[name]
    is_trained = any(f"-{one}-" in name for one in TRAINED)
    assert sum(now["evaluations"].values()) <= 1.05 * sum(then["evaluations"].values())
    if is_trained:
        assert now["losses"][0] <= then["losses"][0] + 0.02
        return
    assert now["converged"] == then["converged"]
    shift, worse, _ = difference(now, then)
    # A solver stops within its residual of the optimum, in units of the model's spread, on any processor.
    stop = 10 * max(now["residual"], then["residual"])
    assert shift <= 1e-9 + stop
    assert worse <= 1e-9 + stop**2


DRAWS, BLOCKS = 20_000, 10


def blocks(x):
    return x.chunk(BLOCKS) if len(x) else [x] * BLOCKS


def even(x):
    return torch.full_like(x, 1 / max(1, len(x)))


def particles(target):
    return located_particles(target, 4_096, seed=2).draws(DRAWS)


def measured(objective, target, model):
    """The loss of a model on draws that no solver saw, and its standard error from how it differs between blocks of them."""
    at_p = at_q = torch.zeros(0, dtype=D)
    if objective.reads_p:
        x = target.samples if target.samples is not None else target.draws(DRAWS, 2) if target.sampler else particles(target)
        law = model if target.context is None else model(target.context)
        log_q = law.log_prob(x if law.event_shape else x[:, 0]).detach()
        log_p = 0.0 if objective.direction == "forward" else target.log_prob(x)
        at_p = log_p - log_q
    if objective.reads_q:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            y = model.sample((DRAWS,))
        at_q = target.log_prob(y.reshape(DRAWS, -1)) - model.log_prob(y).detach()
    losses = [objective.loss(p, even(p), q, even(q)) for p, q in zip(blocks(at_p), blocks(at_q), strict=True)]
    losses = torch.stack(losses).to(D)
    return float(losses.mean()), float(losses.std()) / math.sqrt(BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELS)
def test_solver_reports_the_loss_of_its_model_and_its_best_optimum_first(name):
    target, objective, solution, _ = solved(name)
    losses = [round(one.loss, 9) for one in solution.optima]
    assert losses == sorted(losses) and solution.best.is_global
    loss, error = measured(objective, target.unconstrained() if LABELS[name][2].carried else target, solution.best.model)
    # A trained model's loss is measured on few draws; nodes cost 0.004 nats; the log of a mean has a bias of its squared error.
    own = error * math.sqrt(DRAWS / getattr(LABELS[name][1], "judged_on", DRAWS))
    assert solution.best.loss == pytest.approx(loss, abs=4 * math.hypot(error, own) + 0.02)


if __name__ == "__main__":
    records = {name: found(name) for name in LABELS}
    if "--record" in sys.argv:
        FILE.write_text(json.dumps(records, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    differences = {name: difference(records[name], then) for name, then in json.loads(FILE.read_text()).items()}
    for name, (shift, worse, more) in differences.items():
        if max(shift, abs(worse), abs(more)) > 0:
            print(f"{shift:8.1e} {worse:+9.1e} {more:+7.1%}  {name}")
    print(f"{sum(max(map(abs, one)) == 0 for one in differences.values())} of {len(differences)} as recorded, to the last bit")
