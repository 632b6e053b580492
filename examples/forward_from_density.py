"""You can evaluate the target and not sample it, and no mode may be dropped: forward KL, by particles and weighted draws."""

import torch

import whichkl as wk

p = torch.distributions.MixtureSameFamily(  # 0.7 N((−4, 0), I) + 0.3 N((4, 6), I), of which only log p + 5 is known
    torch.distributions.Categorical(torch.tensor([0.7, 0.3], dtype=torch.float64)),
    torch.distributions.Independent(
        torch.distributions.Normal(torch.tensor([[-4.0, 0.0], [4.0, 6.0]], dtype=torch.float64), 1.0), 1
    ),
)
target = wk.Target(log_prob=lambda x: p.log_prob(x) + 5, dim=2)
print(wk.advise(target))

reverse = wk.fit(target)  # one Gaussian, one mode
forward = wk.fit(target, objective="forward_kl")  # one Gaussian over both
print(reverse.model.mean, forward.model.mean)
print(forward)
assert "modes_missing" in reverse.findings

fit = wk.fit(target, wk.families.Mixture(2), objective="forward_kl")
print(fit.value, fit.diagnostics.log_z)  # log Z = 5
assert fit.value.value < 0.01
assert abs(fit.diagnostics.log_z.value - 5) < 4 * fit.diagnostics.log_z.stderr
