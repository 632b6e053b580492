"""A NumPyro model: its posterior fitted by reverse KL, and draws back under the model's own names (needs `whichkl[bayes]`)."""

import numpy as np
import numpyro
import numpyro.distributions as dist

import whichkl as wk

effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y, s):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, s), obs=y)


target = wk.Target.of(schools, effects, s=errors)
print(target.names)  # unconstrained coordinates: where the name isn't the site's own value, it says free
fit = wk.fit(target)
print(fit)

draws = target.origin.constrain(fit.model.sample((4_000,)))
print({name: value.shape for name, value in draws.items()})
assert draws["theta"].shape == (4_000, 8)
assert (draws["tau"] > 0).all()
assert abs(draws["mu"].mean() - 4.4) < 0.5  # long chains: 4.4, standard deviation 3.3

data = wk.to_arviz(fit)  # for arviz.summary(data), and for arviz's plots
print(data["posterior"]["theta"].mean(("chain", "draw")).values.round(1))
