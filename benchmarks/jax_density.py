"""A log density in JAX by whichkl, by JAX alone, and the same one in torch: value and gradient of a batch, and a whole fit."""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

import whichkl as wk

ROWS, COLUMNS = 500, 20
random = np.random.default_rng(0)
X = random.normal(size=(ROWS, COLUMNS))
Y = (random.uniform(size=ROWS) < 1 / (1 + np.exp(-X @ random.normal(size=COLUMNS)))).astype(float)
TORCH_X, TORCH_Y = torch.from_numpy(X), torch.from_numpy(Y)


def by_torch(w):
    logits = w @ TORCH_X.T
    return (TORCH_Y * logits - torch.nn.functional.softplus(logits)).sum(-1) - 0.5 * w.square().sum(-1)


def by_jax(w):
    logits = X @ w
    return jnp.sum(Y * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(w**2)


def median(function, rounds=20):
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def once(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main():
    torch_target, jax_target = wk.Target(log_prob=by_torch, dim=COLUMNS), wk.Target(log_prob=by_jax, dim=COLUMNS)
    alone = jax.jit(jax.vmap(jax.value_and_grad(by_jax)))
    rows = []
    for n in (1, 20, 512, 10_000):
        x = torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        with jax.enable_x64(True):
            array = jnp.asarray(x.numpy())
            compiling = once(lambda array=array: jax.block_until_ready(alone(array)))
            bare = median(lambda array=array: jax.block_until_ready(alone(array)))
        for target in (torch_target, jax_target):
            target.value_and_score(x)
        ours = median(lambda x=x: jax_target.value_and_score(x))
        theirs = median(lambda x=x: torch_target.value_and_score(x))
        rows.append({"n": n, "compile": compiling, "jax": bare, "adapter": ours, "torch": theirs})
        print(
            f"{n:6d} points: JAX alone {bare * 1e6:8.0f} µs (and {compiling:.2f} s to compile), here {ours * 1e6:8.0f} µs, "
            f"torch {theirs * 1e6:8.0f} µs"
        )
    fresh = wk.Target(log_prob=by_jax, dim=COLUMNS)
    wk.fit(torch_target)
    fits = {
        "torch": median(lambda: wk.fit(torch_target), 3),
        "jax, compiling": once(lambda: wk.fit(fresh)),
        "jax": median(lambda: wk.fit(fresh), 3),
    }
    print("a fit: " + ", ".join(f"{name} {value:.2f} s" for name, value in fits.items()))
    print(json.dumps({"benchmark": "jax_density", "rows": rows, "fits": fits}))


if __name__ == "__main__":
    main()
