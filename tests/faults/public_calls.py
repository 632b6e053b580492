"""Public calls: one of each kind, small, with a fixed seed, that returns its numbers as text to compare digit by digit."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Gamma, Independent, MultivariateNormal, Normal

import whichkl as wk
from whichkl.goodness import c2st, transform_calibration, two_sample_test
from whichkl.samples import Loaded
from whichkl.solvers import StickingTheLanding, Stochastic
from whichkl.study.coverage import coverage

CPU = {"dtype": torch.float64, "device": "cpu"}


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **CPU)


ROWS = torch.cat([_normal(150, 2) - 2, 0.5 * _normal(150, 2, seed=1) + 2])
WEIGHTS = torch.rand(300, generator=torch.Generator().manual_seed(2), **CPU)
X, Y = _normal(300, 2, seed=3), _normal(300, 1, seed=4)
CLASSES = (X[:, 0] > 0).to(torch.float64)
STATES = (X > 0.3).to(torch.float64)
P = MultivariateNormal(torch.zeros(2, **CPU), torch.eye(2, **CPU))
Q = MultivariateNormal(torch.ones(2, **CPU), 2 * torch.eye(2, **CPU))
SHORT = Stochastic(epochs=2, learning_rate=0.01)


def bowl(x):
    return -(x - 1).square().sum(-1) - 0.3 * x[:, 0] * x[:, 1] - 0.1 * x.pow(4).sum(-1)


def array_bowl(x):
    if isinstance(x, torch.Tensor):
        raise TypeError("an array, please")
    return -np.square(x - 1).sum(-1) - np.exp(-50 * np.square(x)).sum(-1)


def edged(x):
    """Return a log density whose gradient is NaN where it is −∞."""
    return torch.where(x[:, 0] > -1, (x[:, 0] + 1).sqrt().log() - x.square().sum(-1), -torch.inf)


def sampler(n):
    first = torch.randn(n, 1, **CPU)
    return torch.cat([first, first / 2 + torch.from_numpy(np.random.normal(size=(n, 1)))], 1)


class Bell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.centre = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64, device="cpu"))

    def forward(self):
        return Independent(Normal(self.centre, torch.ones_like(self.centre)), 1)


def _net(seed, classes=3):
    linear, made = torch.nn.utils.skip_init, {"dtype": torch.float32, "device": "cpu"}
    net = torch.nn.Sequential(linear(torch.nn.Linear, 2, 4, **made), linear(torch.nn.Linear, 4, classes, **made))
    for i, weight in enumerate(net.parameters()):
        weight.data = _normal(*weight.shape, seed=seed + i).to(torch.float32)
    return net


@cache
def networks():
    return _net(10), _net(20)


def fitted(*arguments, **keywords):
    fit = wk.fit(*arguments, **keywords)
    weights = {name: value.tolist() for name, value in fit.family.parameters(fit.diagnostics.optima[0].model).items()}
    return weights, str(fit.value), fit.status, sorted(fit.findings)


def estimated(**keywords):
    return str(wk.estimate(**keywords))


def of_density(function=bowl, **keywords):
    return wk.Target(log_prob=function, dim=2, **keywords)


@cache
def some_fit():
    return wk.fit(of_density(names=["a", "b"]), "gaussian:diagonal")


def saved():
    with tempfile.TemporaryDirectory() as folder:
        fit = wk.fit(ROWS, "mixture:2", judge=False)
        fit.save(Path(folder) / "fit")
        return str(wk.Fit.load(Path(folder) / "fit").model.log_prob(ROWS[:5]).tolist())


def reported():
    with tempfile.TemporaryDirectory() as folder:
        return len(wk.report(some_fit(), Path(folder) / "report.html").read_text()) > 1_000


def compared():
    by_draws = ["reverse_kl", "ess", "khat"]  # quadrature has a call of its own
    study = wk.compare(of_density(), ["gaussian"], seeds=2, draws=300, metrics=by_draws)
    return [(row["status"], row["reverse_kl"], row["khat"]) for row in study.rows]


def distilled():
    teacher, student = networks()
    result = wk.distill(teacher=teacher, student=student, data=X.to(torch.float32), epochs=2)
    return str(result.scores.forward_kl), str(result.scores.reverse_kl)


def estimator():
    from whichkl.sklearn import DensityEstimator

    found = DensityEstimator("mixture:2", random_state=0).fit(ROWS.numpy())
    return found.score(ROWS.numpy()), found.sample(3, random_state=1).tolist()


def streamed():
    data = torch.utils.data.TensorDataset(ROWS)
    with torch.device("cpu"):
        loader = torch.utils.data.DataLoader(data, batch_size=50)
    return fitted(wk.Target(samples=Loaded(loader)))


def distilled_from_a_loader():
    teacher, student = networks()
    with torch.device("cpu"):
        data = torch.utils.data.DataLoader(Noisy(), batch_size=20, shuffle=True)
    result = wk.distill(teacher=teacher, student=student, data=data, epochs=2)
    return str(result.scores.forward_kl), str(result.scores.reverse_kl)


class Noisy(torch.utils.data.Dataset):
    """Rows that are augmented at random."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return (X[i] + 0.1 * torch.randn(2, dtype=torch.float64, device="cpu")).to(torch.float32)


def losses():
    teacher, student = X.clone(), Y.expand(-1, 2).clone().requires_grad_(True)
    return {
        name: float(function(teacher=teacher, student=student).detach())
        for name in ("forward_kl", "reverse_kl", "jeffreys", "jensen_shannon", "total_variation", "renyi")
        if (function := getattr(wk.losses, name))
    }


CALLS = {
    "advise": lambda: str(wk.advise(of_density())),
    "audit": lambda: str(wk.audit(wk.losses.reverse_kl)),
    "c2st": lambda: str(c2st(ROWS, ROWS + 0.3)),
    "compare": compared,
    "coverage": lambda: str(coverage(ROWS, ROWS + 0.1, Q.log_prob(ROWS), Q.log_prob(ROWS + 0.1))),
    "distill": distilled,
    "distill, from a loader": distilled_from_a_loader,
    "draws": lambda: some_fit().draws(5).tolist(),
    "draws, corrected": lambda: some_fit().draws(5, corrected=True).tolist(),
    "energy": lambda: fitted(wk.Target(energy=lambda x: x.square().sum(-1), dim=2)),
    "estimate, bridge": lambda: estimated(
        p=wk.Target(samples=ROWS, log_prob=bowl), q=wk.Target.of(Q), method="bridge"
    ),
    "estimate, bound": lambda: estimated(p=ROWS, q=ROWS + 0.1, method="bound"),
    "estimate, classifier": lambda: estimated(p=ROWS[::2], q=ROWS[1::2] + 0.1, method="classifier"),
    "estimate, closed form": lambda: estimated(p=P, q=Q, divergence="forward_kl"),
    "estimate, discrete": lambda: estimated(
        p=torch.distributions.Poisson(torch.tensor(3.0, **CPU)), q=torch.distributions.Poisson(torch.tensor(4.0, **CPU)),
        divergence="reverse_kl",
    ),
    "estimate, energy distance": lambda: estimated(p=ROWS, q=ROWS + 0.1, divergence="energy"),
    "estimate, forward from log densities": lambda: estimated(p=of_density(), q=Q, divergence="forward_kl", n=500),
    "estimate, jensen_shannon": lambda: estimated(p=P, q=Q, divergence="jensen_shannon"),
    "estimate, mmd": lambda: estimated(p=ROWS, q=ROWS + 0.1, divergence="mmd"),
    "estimate, quadrature": lambda: estimated(
        p=Gamma(torch.tensor(3.0, **CPU), torch.tensor(1.0, **CPU)), q=Gamma(torch.tensor(2.0, **CPU), torch.tensor(1.0, **CPU)),
        divergence="total_variation",
    ),
    "estimate, samples": lambda: estimated(p=ROWS[::2], q=ROWS[1::2] + 0.1, divergence="forward_kl"),
    "expect": lambda: str(some_fit().expect(lambda x: x[:, 0])),
    "fit, autoregressive": lambda: fitted(STATES, wk.families.Autoregressive(hidden=(4,)), solver=SHORT),
    "fit, between": lambda: fitted(wk.Target.of(P), objective="jeffreys"),
    "fit, categorical": lambda: fitted(STATES[:, :1], wk.families.Categorical()),
    "fit, classes": lambda: fitted((X, CLASSES), wk.families.Neural("bernoulli", hidden=(4,)), solver=SHORT),
    "fit, discrete log density": lambda: fitted(
        wk.Target(log_prob=lambda x: x[:, 0] - 2 * x[:, 0] * x[:, 1], dim=2, support="boolean"), objective="reverse_kl"
    ),
    "fit, flow": lambda: fitted(ROWS, wk.families.Flow(transforms=1, bins=4, hidden=(4,)), solver=SHORT),
    "fit, linear": lambda: fitted((X, Y), "linear_gaussian"),
    "fit, log density": lambda: fitted(of_density()),
    "fit, log density of arrays": lambda: fitted(of_density(array_bowl)),
    "fit, logistic": lambda: fitted((X, CLASSES), "generalized_linear:bernoulli:1.0"),
    "fit, mean field": lambda: fitted(of_density(), "gaussian:diagonal"),
    "fit, mixture of a log density": lambda: fitted(
        of_density(lambda x: -(x - 1).square().sum(-1)), "mixture:2", objective="reverse_kl", judge=False
    ),
    "fit, module": lambda: fitted(ROWS, Bell(), solver=SHORT),
    "fit, product": lambda: fitted(ROWS.exp(), wk.families.Product("gamma")),
    "fit, rows": lambda: fitted(ROWS),
    "fit, rows by mixture": lambda: fitted(ROWS[::3], "mixture:2"),
    "fit, rows by student_t": lambda: fitted(ROWS, "student_t", judge=False),
    "fit, sampler": lambda: fitted(wk.Target(sampler=sampler, dim=2), judge=False),
    "fit, score": lambda: fitted(wk.Target(score=lambda x: -x, dim=2)),
    "fit, stream": streamed,
    "fit, support": lambda: fitted(of_density(lambda x: -x.sum(-1) + x.log().sum(-1), support="positive")),
    "fit, autoencoder": lambda: fitted(ROWS[::3], wk.families.VariationalAutoencoder(1, hidden=(4,)), solver=SHORT),
    "fit, mixture density network": lambda: fitted((X, Y), wk.families.MixtureDensityNetwork(2, hidden=(4,)), solver=SHORT),
    "fit, low rank": lambda: fitted(of_density(), "gaussian:low_rank:1", objective="reverse_kl", judge=False),
    "fit, flow of a log density": lambda: fitted(
        of_density(),
        wk.families.Flow(transforms=1, bins=4, hidden=(4,)),
        objective="reverse_kl",
        solver=StickingTheLanding(steps=8, cycles=1),
        judge=False,
    ),
    "fit, states by autoregressive": lambda: fitted(
        wk.Target(log_prob=lambda x: x[:, 0] - 2 * x[:, 0] * x[:, 1], dim=2, support="boolean"),
        wk.families.Autoregressive(hidden=(4,)),
        objective="reverse_kl",
    ),
    "fit, weights": lambda: fitted(wk.Target(samples=ROWS, weights=WEIGHTS), "mixture:2", judge=False),
    "linear response": lambda: some_fit().linear_response().tolist(),
    "losses": losses,
    "plot": lambda: len(wk.plot(some_fit()).to_json()) > 1_000,
    "problems": lambda: [
        fitted(problem, judge=False) for problem in (wk.problems.bimodal(), wk.problems.eight_schools(), wk.problems.petals())
    ],
    "report": reported,
    "save and load": saved,
    "sklearn": estimator,
    "target": lambda: [one.tolist() for one in (*of_density(edged).trial(ROWS), *of_density().value_and_score(ROWS[:9]))],
    "target of arrays": lambda: of_density(array_bowl).log_prob(ROWS[:9]).tolist(),
    "target, draws": lambda: wk.Target(sampler=sampler, dim=2).draws(3, seed=0).tolist(),
    "to_arviz": lambda: wk.to_arviz(some_fit(), n=3)["posterior"]["a"].values.tolist(),
    "transform": lambda: str(transform_calibration(ROWS, None, None, P, ("a", "b"))),
    "two samples": lambda: str(two_sample_test(ROWS, None, None, P)),
}  # fmt: skip
"""What each public name does, and each route through `fit` and `estimate`."""


def text(name):
    """Return what a call comes to, as text."""
    return repr(CALLS[name]())
