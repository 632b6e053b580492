"""You have the target's score alone, ∇ log p, as of a diffusion model or a simulator's adjoint: reverse KL by line integrals."""

import torch

import whichkl as wk
from whichkl._checks import TargetError


def log_prob(x):  # kept from the fit, to check it by
    return -x[:, 0].square() / 2 - (x[:, 1] - x[:, 0].square() / 4).square() - torch.log1p(x[:, 1].square())


def score(x):  # (n, 2) -> (n, 2): what is known
    bend = x[:, 1] - x[:, 0].square() / 4
    return torch.stack([-x[:, 0] + x[:, 0] * bend, -2 * bend - 2 * x[:, 1] / (1 + x[:, 1].square())], -1)


target = wk.Target(score=score, dim=2)
fit = wk.fit(target)
print(fit)  # the value is up to log Z, where log p is counted from its value at the first point, here 0
print("scores evaluated:", target.evaluations["score"], " largest integral round a triangle:", target.line_integral.gap)
known = wk.fit(wk.Target(log_prob=log_prob, dim=2))
print("mean by the score", fit.model.mean.tolist(), "and by the log density", known.model.mean.tolist())
assert fit.status == "converged"
assert fit.value.up_to == "log_z"
assert target.evaluations["log_prob"] == 0
assert torch.allclose(fit.model.mean, known.model.mean, atol=1e-4)
assert abs(fit.value.value - known.value.value - float(log_prob(target.line_integral.anchor)[0])) < 1e-6

mean = fit.expect(lambda x: x)  # under p itself: importance weights need differences of log p alone
print("mean of p:", mean)


def turned(by):  # a field that goes round adds no density: it is the gradient of nothing
    return wk.Target(score=lambda x: score(x) + by * torch.stack([-x[:, 1], x[:, 0]], -1), dim=2)


nearly = wk.fit(turned(0.02))
print("turned a little:", sorted(nearly.findings))
assert "score_not_conservative" in nearly.findings
try:
    wk.fit(turned(1.0))
except TargetError as error:
    print("turned:", error)
else:
    raise AssertionError("a score that is no gradient was fitted")
