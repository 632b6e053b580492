"""You can neither sample the target nor evaluate it: no KL can be minimised, until what is left of it becomes a target."""

import torch

import whichkl as wk

nothing = wk.advise(wk.Target(dim=1))
print(nothing)  # per conversion, the line that does it
assert nothing.best is None

try:
    wk.fit(wk.Target(dim=1))
except ValueError as error:
    print(error)
else:
    raise SystemExit("a fit without access must be refused")

# What is left: the mean and the variance of the target, and a reference that it is near to.
known = wk.Moments(
    of=lambda x: torch.stack([x[:, 0], x[:, 0] ** 2], 1),
    values=[0.7, 0.5 + 0.7**2],
    reference=torch.distributions.Normal(0.0, 1.0),
)
target = wk.convert(known)
print(target)  # its origin: what was assumed, what can't be known, how far to trust it
fit = wk.fit(target)
print(fit)
assert target.access.cell == "both"
assert abs(fit.model.mean.item() - 0.7) < 0.05
