"""You have pairs (x, y): fit q(y|x) by forward KL, which is maximum likelihood. A line, and the odds of yes."""

import torch

import whichkl as wk

draws = torch.Generator().manual_seed(0)
x = torch.randn(2_000, 2, generator=draws, dtype=torch.float64)

y = x @ torch.tensor([2.0, -1.0], dtype=torch.float64) + 0.5 + 0.3 * torch.randn(2_000, generator=draws, dtype=torch.float64)
line = wk.fit(wk.Target(samples=(x, y)), wk.families.LinearGaussian())
print(line)
print("weights", line.model.weight[0].tolist(), "bias", line.model.bias.item(), "sd", line.model.scale_tril.item())
print("y at x = (1, 1):", line.model(torch.ones(1, 2)))  # a torch distribution a row

yes = (y + torch.randn(2_000, generator=draws, dtype=torch.float64) > 0).double()
odds = wk.fit(wk.Target(samples=(x, yes)), wk.families.GeneralizedLinear("bernoulli"))
print(odds)
print("P(yes) at x = (1, 1):", odds.model(torch.ones(1, 2)).mean.item())

try:  # all that are above the line say yes: the likelihood grows for ever
    wk.fit(wk.Target(samples=(x, (x[:, 0] > 0).double())), wk.families.GeneralizedLinear("bernoulli"))
except ValueError as error:
    print(error)
