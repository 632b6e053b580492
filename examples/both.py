"""You can sample the target and evaluate it: fit both directions, and look at both divergences of both fits."""

import whichkl as wk

target = wk.problems.bimodal(half_distance=3.0)  # ½ N(−3, 1) + ½ N(3, 1), a torch distribution

for objective in ("forward_kl", "reverse_kl"):
    fit = wk.fit(target, objective=objective)
    print(fit)
    for optimum in fit.diagnostics.optima:
        kind = "global" if optimum.is_global else "local"
        print(f"    {kind} optimum: mean {optimum.model.mean.item():+.3f}, loss {optimum.loss:.4f} nats")

richer = wk.fit(target, wk.families.Mixture(2), objective="reverse_kl")
print(richer)  # with two components the directions agree
assert richer.value.value < 1e-6
