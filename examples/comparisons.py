"""Which of two is likelier? 500 noisy answers become a density, which is fitted like any other."""

import torch
from torch.distributions import MultivariateNormal

import whichkl as wk

# Only the answers are known: the expert's belief, a Gaussian here, is never evaluated afterwards.
belief = MultivariateNormal(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
generator = torch.Generator().manual_seed(0)
a, b = 8 * torch.rand(2, 500, 2, generator=generator) - 4
a_wins = torch.rand(500, generator=generator) < torch.sigmoid(belief.log_prob(a) - belief.log_prob(b))
winners, losers = torch.where(a_wins[:, None], a, b), torch.where(a_wins[:, None], b, a)

target = wk.convert(wk.Comparisons(winners=winners, losers=losers, noise=1.0))
print(target)  # what was assumed, what can't be known, how far to trust it
fit = wk.fit(target)
print(fit)
assert fit.value.up_to == "temperature"

x = belief.sample((10_000,)).double()
kl = (belief.log_prob(x.float()) - fit.model.log_prob(x)).mean()
print(f"KL of the belief from the fit: {kl:.3f} nats")
assert kl < 0.3
