"""Frames of a simulation are weighted so that they agree with measurements, as far as these have errors."""

import torch

import whichkl as wk

generator = torch.Generator().manual_seed(0)
frames = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)  # a molecule's coordinates, say
measured = torch.stack([frames[:, 0], frames.square().sum(1)], 1)  # what an experiment sees of each frame

exact = wk.convert(wk.Moments(of=measured, values=[0.5, 3.5], reference=frames))
print(exact)
share = exact.weights / exact.weights.sum()
assert torch.allclose(share @ measured, torch.tensor([0.5, 3.5], dtype=torch.float64), atol=1e-9)

noisy = wk.convert(wk.Moments(of=measured, values=[0.5, 3.5], stderr=[0.2, 0.5], reference=frames))
print(f"KL to the simulation: {exact.origin.kl:.3f} nats if the values are exact, {noisy.origin.kl:.3f} with their errors")
assert noisy.origin.kl < exact.origin.kl

try:  # a mean of 3 with a sum of squares of 1 doesn't exist: E x² is at least (E x)²
    wk.convert(wk.Moments(of=measured, values=[3.0, 1.0], reference=frames))
except wk.TargetError as error:
    print(error)
else:
    raise SystemExit("moments that contradict each other must be refused")

print(wk.fit(exact))  # a model of the weighted frames
