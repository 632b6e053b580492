"""Draws of a model passed a test or failed it: those that passed are samples, and the target has a density too."""

import torch

import whichkl as wk

generator = torch.Generator().manual_seed(0)
model = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
x = torch.randn(10_000, 2, generator=generator, dtype=torch.float64)
passed = torch.rand(10_000, generator=generator) < torch.sigmoid(2 * x[:, 0] - x[:, 1])

target = wk.convert(wk.Labels(draws=x, passed=passed, model=model))
print(target)
assert target.access.cell == "both"

forward, reverse = (wk.fit(target, objective=name) for name in ("forward_kl", "reverse_kl"))
print(forward)
assert "accesses_disagree" not in forward.findings | reverse.findings
assert torch.allclose(forward.model.mean, reverse.model.mean, atol=0.1)
