"""Two moons: our spline flow and the same zuko flow in the usual loop, 4,000 Adam steps at 1e-3 on batches of 256.

The loop has no rows to stop by, and no standardised columns but those of these data. Loss: mean −log q on 20,000 fresh rows.
"""

import json
import time

import torch
import zuko
from sklearn.datasets import make_moons

import whichkl as wk

FIELDS = {"transforms": 3, "bins": 8}


def ours(x):
    family = wk.families.Flow(hidden=(64, 64), **FIELDS)
    return wk.fit(wk.Target(samples=x), family, judge=False).model.log_prob


def loop(x):
    torch.manual_seed(0)
    x = x.to(torch.float32)
    flow = zuko.flows.NSF(2, hidden_features=(64, 64), **FIELDS)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for _ in range(4_000):
        loss = -flow().log_prob(x[torch.randint(len(x), (256,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lambda rows: flow().log_prob(rows.to(torch.float32)).detach()


def bell(x):
    return wk.fit(wk.Target(samples=x), wk.families.Gaussian(), judge=False).model.log_prob


def main():
    fresh = torch.tensor(make_moons(20_000, noise=0.1, random_state=99)[0])
    print(f"{'two moons':12}{'rows':>8}{'−log q':>9}{'± s.e.':>9}{'seconds':>9}")
    found = []
    for rows in (500, 5_000):
        x = torch.tensor(make_moons(rows, noise=0.1, random_state=0)[0])
        for name, method in (("whichkl", ours), ("zuko, loop", loop), ("Gaussian", bell)):
            begin = time.perf_counter()
            log_prob = method(x)
            seconds = time.perf_counter() - begin
            loss = -log_prob(fresh).double()
            value, error = float(loss.mean()), float(loss.std()) / len(loss) ** 0.5
            found.append(
                {"method": name, "rows": rows, "loss": round(value, 4), "stderr": round(error, 4), "seconds": round(seconds, 1)}
            )
            print(f"{name:12}{rows:8,}{value:9.4f}{error:9.4f}{seconds:9.1f}")
    print(json.dumps({"benchmark": "flow", "results": found}))


if __name__ == "__main__":
    main()
