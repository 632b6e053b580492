"""You can evaluate the target up to a constant and not sample it: reverse KL, which is variational inference."""

import torch

import whichkl as wk

heights = torch.tensor([1.62, 1.75, 1.81, 1.68, 1.90, 1.77], dtype=torch.float64)


def log_prob(u):  # (n, 2) -> (n,): log posterior of (mean, log sd) of the heights, up to a constant
    mean, log_sd = u[:, :1], u[:, 1:]
    prior = -0.5 * ((mean - 1.7) / 0.3).square() - 0.5 * (log_sd + 2).square()
    likelihood = -0.5 * ((heights - mean) / log_sd.exp()).square() - log_sd
    return prior[:, 0] + likelihood.sum(-1)


fit = wk.fit(wk.Target(log_prob=log_prob, dim=2, names=["mean", "log sd"]))
print(fit)
print("posterior means:", {row["name"]: round(row["mean"], 3) for row in fit.summary().rows})
print("corrected by particles:", fit.expect(lambda u: u))  # the weights can't be trusted here, and the table says so
assert fit.objective.name == "reverse_kl"
assert fit.status == "converged"
assert fit.diagnostics.ess > 1000
