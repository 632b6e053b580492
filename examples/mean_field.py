"""Many coordinates and a log density: mean field in memory linear in d, what it leaves out, and two repairs."""

import torch

import whichkl as wk

generator = torch.Generator().manual_seed(0)
features, names = 210, [f"weight {i}" for i in range(210)]
x = torch.randn(200, features, generator=generator, dtype=torch.float64)
x[:, 1] = 0.95 * x[:, 0] + 0.3 * x[:, 1]  # two features that say nearly the same
y = (x[:, 0] + x[:, 1] - x[:, 2] + torch.randn(200, generator=generator, dtype=torch.float64) > 0).to(torch.float64)


def log_prob(weights):  # (n, 210) -> (n,): log posterior of a logistic regression, up to a constant
    score = weights @ x.T
    return (y * score - torch.nn.functional.softplus(score)).sum(-1) - 2 * weights.square().sum(-1)


target = wk.Target(log_prob=log_prob, dim=features, names=names)
fit = wk.fit(target, wk.families.Gaussian("diagonal"))
print(fit)

covariance = fit.linear_response(["weight 0", "weight 1"])  # two rows; the 210 × 210 matrix isn't made
spread = covariance[[0, 1], [0, 1]].sqrt()
print("standard deviations of the two twins: mean field", [round(s, 3) for s in fit.model.stddev[:2].tolist()])
print("                                linear response", [round(s, 3) for s in spread.tolist()])
print("their correlation:", round(float(covariance[0, 1] / spread.prod()), 3))

wider = wk.fit(target, wk.families.Gaussian("low_rank", rank=5))
print("ELBO: mean field", fit.diagnostics.elbo, "rank 5", wider.diagnostics.elbo)
assert fit.status == wider.status == "converged"
assert bool((spread > fit.model.stddev[:2]).all())
assert float(covariance[0, 1]) < 0
assert wider.diagnostics.elbo.value > fit.diagnostics.elbo.value
