"""A flow, when no bell follows the data: an exact density of any shape, trained by gradient descent (needs `whichkl[flows]`)."""

import math

import torch

import whichkl as wk

angle = 2 * math.pi * torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
noise = 0.15 * torch.randn(600, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ring = wk.Target(samples=torch.stack([angle.cos(), angle.sin()], 1) + noise)

bell = wk.fit(ring)
flow = wk.fit(ring, wk.families.Flow(transforms=2, hidden=(16,)))  # a tenth of the rows says when to stop, a fifth is the judge
print(flow)
print(f"held out, in nats a row: {bell.value.number} for a Gaussian, {flow.value.number} for a flow")

inside = flow.model.log_prob(torch.zeros(1, 2))  # the hole of the ring
assert flow.value.value < bell.value.value - 0.3
assert float(inside) < float(bell.model.log_prob(torch.zeros(1, 2))) - 1
