"""You have two distributions and want the number between them: the method follows from what can be done with each."""

import math

import torch
from torch.distributions import Cauchy, Normal

import whichkl as wk

p, q = Normal(0.0, 1.0), Normal(1.0, 2.0)
for divergence in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "chi_squared"):
    print(wk.estimate(p=p, q=q, divergence=divergence))  # closed form or quadrature: exact

infinite = wk.estimate(p=Cauchy(0.0, 1.0), q=p)
print(infinite, *infinite.notes)
assert infinite.finite == "infinite"

generator = torch.Generator().manual_seed(0)
x, y = torch.randn(2000, 2, generator=generator) + torch.tensor([1.0, 0.0]), torch.randn(2000, 2, generator=generator)
samples_only = wk.estimate(p=x, q=y)  # nearest neighbours, calibrated on Gaussians like them; the truth is 0.5
print(samples_only)
assert abs(samples_only.value - 0.5) < 4 * samples_only.stderr

print(wk.estimate(p=x, q=y, divergence="hellinger"))  # a cross-fitted classifier; the truth is 0.1175
unnormalised = wk.Target(log_prob=lambda z: -z.square().sum(-1) / 2 + 3, dim=1)
print(wk.estimate(p=unnormalised, q=Normal(0.5, 1.2)))  # quadrature, which normalises both
assert math.isfinite(wk.estimate(p=[0.36, 0.48, 0.16], q=[0.25, 0.25, 0.5], form="probabilities").value)
