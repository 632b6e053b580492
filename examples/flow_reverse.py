"""A flow from a log density alone, where no Gaussian follows it: reverse KL by sticking the landing (needs `whichkl[flows]`)."""

import torch

import whichkl as wk
from whichkl.solvers import StickingTheLanding

banana = wk.problems.banana()  # normalised, so that the values below are KL(q‖p) itself
bell = wk.fit(banana)

# Small, to be quick; wk.fit(banana, wk.families.Flow()) takes up to six cycles of 400 steps.
family = wk.families.Flow(transforms=2, hidden=(16,))
flow = wk.fit(banana, family, solver=StickingTheLanding(steps=250, cycles=1, draws=64, judged_on=1_000, starts=1))
print(flow)
print(f"KL(q‖p): {bell.value.number} nats for a Gaussian, {flow.value.number} for a flow")

assert flow.value.value < bell.value.value / 3
assert flow.diagnostics.ess > bell.diagnostics.ess
assert torch.isfinite(flow.model.log_prob(flow.model.sample((1_000,)))).all()
