"""A simulator without a likelihood: from simulated epidemics to the posterior of their two rates (needs `whichkl[flows]`)."""

import torch
from torch.distributions import LogNormal

import whichkl as wk

PEOPLE = 1_000.0


def epidemic(theta):
    """Every fifth day's log(1 + infected people), for rates of infection and recovery, (n, 2) → (n, 6)."""
    infection, recovery = theta.T
    infected = torch.full_like(infection, 10.0)
    healthy, seen = PEOPLE - infected, []
    for day in range(1, 31):
        new = torch.binomial(healthy, 1 - torch.exp(-infection * infected / PEOPLE))
        infected = infected + new - torch.binomial(infected, 1 - torch.exp(-recovery))
        healthy = healthy - new
        if day % 5 == 0:
            seen.append(infected.log1p())
    return torch.stack(seen, 1)


prior = {"infection": LogNormal(-0.7, 0.5), "recovery": LogNormal(-1.6, 0.5)}
simulator = wk.Simulator(prior=prior, simulate=epidemic)
target = wk.convert(simulator, n=1_500)
print(target)

fit = wk.fit(target, wk.families.Flow(transforms=1, hidden=(32,)))
print(fit)

truth = torch.tensor([[0.6, 0.2]], dtype=torch.float64)
observed = wk.Simulator(prior=prior, simulate=lambda theta: epidemic(truth.expand(len(theta), 2))).run(1, seed=8).data
print(f"p of an observation like the simulations: {target.origin.unlikeness(observed):.2f}")
posterior = fit.model(observed).sample((4_000,))[:, 0]
for name, value, draws in zip(fit.names, truth[0].tolist(), posterior.T, strict=True):
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    print(f"{name}: {value} is the truth, 95 % of the posterior lies from {low:.3f} to {high:.3f}")
    assert low < value < high and high - low < 0.4

assert target.origin.unlikeness(observed + 5) < 0.01
assert not fit.model([[9.0, 0, 9, 0, 9, 0]]).sample((10,)).isnan().any()  # q answers at any x, so ask for `unlikeness` first
