"""Reverse KL settles on one mode and its weights look fine; particles find the other, and answer for the whole target."""

import torch

import whichkl as wk


def log_prob(x):  # (n, 3) -> (n,): two bumps of one shape, at +4 with 70 % of the mass and at -4 with 30 %
    right, left = -(x - 4).square().sum(-1) / 2, -(x + 4).square().sum(-1) / 2
    return torch.logaddexp(right + torch.tensor(0.7).log(), left + torch.tensor(0.3).log())


target = wk.Target(log_prob=log_prob, dim=3)
fit = wk.fit(target)
missing = fit.diagnostics.missing_modes
print(f"k̂ {fit.diagnostics.khat:.2f}, importance ESS {fit.diagnostics.ess:,.0f} of 10,000")
print(missing)
print("searched", missing.searched, "with", missing.gradients, "gradients in", missing.calls, "batched calls")
assert "modes_missing" in fit.findings
assert abs(missing.mass - 0.3) < 0.02

both = wk.fit(target, wk.families.Mixture(2))
print(both)
assert "modes_missing" not in both.findings

mean = fit.expect(lambda x: x[:, 0])  # under p, by particles
print("E x1 =", mean, "and the truth is 1.6")
assert abs(float(mean.value) - 1.6) < 4 * float(mean.stderr)
