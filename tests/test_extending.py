"""Extending from outside: a family, a solver, an objective, a divergence and an adapter, each one class and one registration."""

import os

import numpy as np
import pytest

import programs

EXTRAS = '''
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.distributions import Independent, Normal

import whichkl as wk
from whichkl import adapters, objectives
from whichkl.divergences import kinds
from whichkl.divergences.divergence import IntegralDivergence, RowDivergence
from whichkl.families.family import MomentFamily
from whichkl.solvers import Optimum, Solution, Solver, register
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule


@dataclass(frozen=True)
class Isotropic(MomentFamily):
    """N(m, s² I)."""

    label = "isotropic Gaussian"

    def parameters(self, model):
        return {"loc": model.base_dist.loc, "sd": model.base_dist.scale[:1]}

    def model(self, parameters):
        loc = parameters["loc"]
        return Independent(Normal(loc, parameters["sd"].expand(len(loc))), 1)

    def minimum_rows(self, dim):
        return 2

    def statistics(self, x, w, origin, context=None, *, overwrite=False, total=None):
        apart = x - origin
        return {"w": w.sum(), "x": w @ apart, "xx": w @ apart.square().sum(-1)}

    def from_statistics(self, sums, origin, names):
        mean = sums["x"] / sums["w"]
        variance = (sums["xx"] / sums["w"] - mean.square().sum()) / len(mean)
        return self.model({"loc": origin + mean, "sd": variance.sqrt().reshape(1)})


@register
class Descent(Solver):
    """Reverse KL to an isotropic Gaussian on fixed nodes, by L-BFGS."""

    name: ClassVar[str] = "descent"
    direction = "reverse"
    families = (Isotropic,)

    def solve(self, target, family, seed, work=None, stride=0):
        z, w = gaussian_rule(target.dim, 256, seed)
        theta = torch.zeros(target.dim + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss():
            optimizer.zero_grad()
            x = theta[:-1] + theta[-1].exp() * z
            value, score = target.trial(x.detach())
            entropy = target.dim * (theta[-1] + 0.5 * math.log(2 * math.pi) + 0.5)
            found = -(w @ (value + (score * (x - x.detach())).sum(-1))) - entropy
            found.backward()
            return found

        optimizer.step(loss)
        model = family.model({"loc": theta[:-1].detach(), "sd": theta[-1:].detach().exp()})
        return Solution((Optimum(model, float(loss().detach()), True, True),), 1, float(theta.grad.norm()))


@kinds.register
@dataclass(frozen=True)
class Triangular(RowDivergence, IntegralDivergence):
    """∫ (p − q)² / (p + q), between 0 and 2."""

    name: ClassVar[str] = "triangular"
    formula: ClassVar[str] = "∫ (p − q)² / (p + q)"
    unit = "none"
    symmetric = True
    bounded = True

    def integrand(self, log_p, log_q):
        p, q = log_p.exp(), log_q.exp()
        return (p - q).square() / (p + q).clamp(min=1e-300)

    terms = integrand

    def gradient(self, log_p, log_q, *, all_possible=False):
        p, q = log_p.exp(), log_q.exp()
        slope = q * (q - p) * (3 * p + q) / (p + q).square().clamp(min=1e-300)
        return self.value(log_p, log_q), slope - q * slope.sum(-1, keepdim=True)


class Half(objectives.Jeffreys):
    """Jeffreys with another name, and no parameter."""

    name = "half"
    title = "Half"


objectives.register(Half())


class Wrapped:
    """An adapter of models that are dicts."""

    KIND = "a wrapped model"

    @staticmethod
    def claims(obj, args, kwargs):
        return isinstance(obj, dict)

    @staticmethod
    def posterior(obj, args, kwargs):
        from types import SimpleNamespace

        return SimpleNamespace(log_prob=obj["log_prob"], dim=2, names=("a", "b"), constrain=lambda u: {"ab": u.numpy()})


adapters.MODEL_ADAPTERS.append(Wrapped)
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "extras.py").write_text(EXTRAS)
    x = np.random.default_rng(0).normal(size=(200, 3)) * 2 + [1.0, 0.0, -1.0]
    np.save(tmp_path / "x.npy", x)
    return tmp_path


def run(folder, code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    done = programs.run("-c", "from extras import *\n" + code, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_family_is_fitted_saved_named_and_advised(folder):
    out = run(
        folder,
        """
import numpy as np
x = torch.from_numpy(np.load("x.npy"))
fit = wk.fit(x, "isotropic")
torch.testing.assert_close(fit.model.mean, x.mean(0))
assert abs(float(fit.model.stddev[0]) ** 2 - float(x.var(0, correction=0).mean())) < 1e-9
assert fit.solver == "closed_form" and fit.value.exact is False
fit.save("saved")
assert torch.equal(wk.Fit.load("saved").model.mean, fit.model.mean)
try:
    wk.fit(x, "isotropik")
except ValueError as error:
    print(error)
print(wk.advise(wk.Target(samples=x), Isotropic()))
""",
    )
    assert "Did you mean `isotropic`?" in out and "solver for Isotropic(): closed_form" in out


def test_the_command_line_knows_a_family(folder):
    code = "import runpy, sys\nsys.argv = ['whichkl', 'fit', 'x.npy', '--family', 'isotropic']\n"
    code += "runpy.run_module('whichkl', run_name='__main__')"
    assert "Isotropic()" in run(folder, code)


def test_a_solver_is_chosen_and_finds_the_optimum(folder):
    run(
        folder,
        """
fit = wk.fit(wk.Target(log_prob=lambda x: -((x - 1) ** 2).sum(-1) / 8, dim=2), Isotropic())
assert fit.solver == "descent", fit.solver
torch.testing.assert_close(fit.model.mean, torch.ones(2, dtype=torch.float64), atol=1e-4, rtol=0)
assert abs(float(fit.model.stddev[0]) - 2) < 1e-4
assert fit.value.up_to == "log_z"
assert abs(fit.value.value + torch.tensor(8 * torch.pi).log()) < 1e-4, fit.value
""",
    )


def test_a_divergence_is_estimated_used_as_a_loss_and_found_by_the_audit(folder):
    out = run(
        folder,
        """
p, q = Normal(torch.tensor(0.0).double(), 1.0), Normal(torch.tensor(1.0).double(), 1.5)
one = wk.estimate(p=p, q=q, divergence="triangular")
assert 0 < one.value < 2 and one.exact and one.unit == "none"
assert abs(wk.estimate(p=q, q=p, divergence="triangular").value - one.value) < 1e-9
assert wk.estimate(p=p, q=p, divergence="triangular").value == 0
x, y = p.sample((4_000, 1)), q.sample((4_000, 1))
loss = wk.losses.DIVERGENCES["triangular"].function
teacher, student = torch.randn(4, 6).double(), torch.randn(4, 6).double().requires_grad_(True)
assert torch.autograd.gradcheck(lambda s: loss(teacher=teacher, student=s), student)
hidden, head = torch.randn(4, 5).double().requires_grad_(True), torch.randn(6, 5).double()
fused = wk.losses.linear_divergence(hidden_student=hidden, weight_student=head, hidden_teacher=torch.randn(4, 5).double(),
                                    weight_teacher=head, divergence="triangular")
(slope,) = torch.autograd.grad(fused, hidden)
assert bool(slope.isfinite().all())
print(wk.audit(lambda *, teacher, student, mask=None: loss(teacher=teacher, student=student, mask=mask)).identified)
try:
    wk.estimate(p=p, q=q, divergence="triangle")
except ValueError as error:
    print(error)
""",
    )
    assert "triangular" in out.splitlines()[0] and "triangular" in out.splitlines()[-1]


def test_an_objective_is_advised_and_minimised_by_the_solver_of_its_kind(folder):
    out = run(
        folder,
        """
target = wk.problems.bimodal()
fit = wk.fit(target, objective="half")
assert (fit.solver, fit.objective.name) == ("two_sided", "half")
assert abs(fit.diagnostics.optima[0].loss - wk.fit(target, objective="jeffreys:0.5").diagnostics.optima[0].loss) < 1e-9
print(wk.advise(target))
""",
    )
    assert "\nhalf   w KL" in out


def test_an_adapter_makes_targets_and_messages_name_its_models(folder):
    out = run(
        folder,
        """
target = wk.Target.of({"log_prob": lambda x: -x.square().sum(-1)})
assert (target.names, target.dim) == (("a", "b"), 2)
try:
    wk.Target.of(3)
except ValueError as error:
    print(error)
""",
    )
    assert "a wrapped model" in out
