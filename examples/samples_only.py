"""You can sample the target and not evaluate it: forward KL, which is maximum likelihood."""

import whichkl as wk

target = wk.problems.petals()  # or wk.Target(samples=x), or wk.Target.of("file.csv")
print(wk.advise(target))

fit = wk.fit(target)
print(fit)  # says that one Gaussian is too small, and names the next richer family

richer = wk.fit(target, wk.families.Mixture(2))
print(f"held out, in nats a petal: {fit.value.number} for one Gaussian, {richer.value.number} for two")
assert fit.objective.name == "forward_kl"
assert richer.value.value < fit.value.value
