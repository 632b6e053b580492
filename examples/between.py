"""Between the directions: Jeffreys leads from reverse KL (weight 0) to forward KL (1), and its optima change on the way."""

import whichkl as wk
from whichkl.objectives import Jeffreys

target = wk.problems.bimodal(half_distance=3.0)  # ½ N(−3, 1) + ½ N(3, 1)

print("weight_on_forward   mean     sd   KL(p‖q)  KL(q‖p)  optima")
rows = []
for weight in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
    fit = wk.fit(target, objective=Jeffreys(weight_on_forward=weight))
    forward, reverse = (wk.estimate(p=target, q=fit, divergence=name).value for name in ("forward_kl", "reverse_kl"))
    mean, sd = fit.model.mean.item(), fit.model.variance.sqrt().item()
    rows.append((forward, reverse))
    print(f"{weight:17.2f}  {mean:+.3f}  {sd:.3f}  {forward:8.4f} {reverse:8.4f}  {len(fit.diagnostics.optima)}")

steps = list(zip(rows, rows[1:], strict=False))
assert all(later[0] <= earlier[0] + 1e-6 for earlier, later in steps)  # forward KL falls with its weight,
assert all(later[1] >= earlier[1] - 1e-6 for earlier, later in steps)  # and reverse KL rises

for objective in ("jensen_shannon:0.5", "skew_forward_kl:0.1", "skew_reverse_kl:0.1", "renyi:0.5", "renyi:2"):
    print(wk.fit(target, objective=objective).value)
