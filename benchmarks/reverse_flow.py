"""Reverse KL to a flow: ours, the Gaussian, and zuko's flow in a plain loop of Adam, on three planar densities with known log Z.

The loop takes 2,000 steps of 128 draws at one rate, the better of two. KL(q‖p) in nats on 20,000 fresh draws of each.
"""

import json
import math
import time

import torch
import zuko

import whichkl as wk
from whichkl.families import Flow, Gaussian
from whichkl.problems.synthetic import TWO_MOONS_LOG_Z

PROBLEMS = {
    "banana": (wk.problems.banana, 0.0),
    "two moons": (wk.problems.two_moons, TWO_MOONS_LOG_Z),
    "funnel": (wk.problems.funnel, 0.0),
}
RATES, STEPS, DRAWS, JUDGED_ON = (1e-3, 5e-3), 2_000, 128, 20_000


def kl(target, model, log_z):
    """KL(q‖p) and its standard error."""
    torch.manual_seed(1)
    with torch.no_grad():
        x = model.sample((JUDGED_ON,))
        ratio = (model.log_prob(x).double() - target.log_prob(x.double())) + log_z
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(JUDGED_ON)


def ours(make, family, log_z):
    target, begin = make(), time.perf_counter()
    fit = wk.fit(target, family, judge=False)
    seconds = time.perf_counter() - begin
    evaluations = target.evaluations["score"] + target.evaluations["log_prob"]
    value, error = kl(make(), fit.model, log_z)
    return {"kl": value, "stderr": error, "seconds": seconds, "evaluations": evaluations, "status": fit.status}


def loop(make, log_z, rate):
    """Adam on mean(log q − log p) of reparameterised draws, as in zuko's tutorial "train from energy"."""
    torch.manual_seed(0)
    target, begin = make(), time.perf_counter()
    flow = zuko.flows.NSF(2, transforms=3, hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    for _ in range(STEPS):
        x, log_q = flow().rsample_and_log_prob((DRAWS,))
        loss = (log_q - target.log_prob(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    value, error = kl(make(), flow(), log_z)
    return {"kl": value, "stderr": error, "seconds": seconds, "evaluations": STEPS * DRAWS, "rate": rate}


def main():
    rows = []
    for name, (make, log_z) in PROBLEMS.items():
        every = {"flow": ours(make, Flow(), log_z), "gaussian": ours(make, Gaussian(), log_z)}
        every["loop"] = min((loop(make, log_z, rate) for rate in RATES), key=lambda one: (math.isnan(one["kl"]), one["kl"]))
        rows.append({"problem": name, **every})
        for who, one in every.items():
            print(
                f"{name:<10} {who:<9} KL {one['kl']:.4f} ± {one['stderr']:.4f}   {one['seconds']:6.1f} s   "
                f"{one['evaluations']:>9,} evaluations   {one.get('status', one.get('rate'))}",
                flush=True,
            )
    print(json.dumps({"benchmark": "reverse_flow", "rows": rows}))


if __name__ == "__main__":
    main()
