"""The five inputs of the demo, computed: nothing is drawn or written here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from whichkl.advice import Advice, advise
from whichkl.conversions.comparisons import Comparisons
from whichkl.conversions.convert import convert
from whichkl.demo import textbook
from whichkl.demo.textbook import Textbook
from whichkl.diagnostics import model_target
from whichkl.divergences import Estimate
from whichkl.divergences.dispatch import estimate
from whichkl.divergences.draws import monte_carlo
from whichkl.divergences.kinds import JeffreysSum
from whichkl.families import Gaussian, Mixture
from whichkl.fitting import Fit, fit
from whichkl.problems import bimodal, eight_schools, petals
from whichkl.study import Study, compare
from whichkl.targets import Target

STEPS = (
    "two bumps, one Gaussian: both directions",
    "moving the bumps apart",
    "where mode-seeking begins",
    "samples only: 150 petals",
    "log density only: eight schools",
    "both: two directions, unseen draws",
    "neither: answers become a density",
)
_UNSEEN_DRAWS = 20_000
_SEEDS = 6
"""The smallest number of seeds that a verdict needs."""
_PAIRS = 600
"""Comparisons of two points each."""
_POINTS = 100
"""Points that carry the process in the model of the comparisons; on the line half of the default is enough."""
_SHIFT = 7.0
"""Added to log p, which is then unnormalised."""


@dataclass(frozen=True)
class Petals:
    """Samples only: the fit, and richer families scored on the same unseen rows."""

    fit: Fit
    richer: list[Fit]
    gap: tuple[float, float]
    """The widest interval of lengths, in centimetres, that has no petal inside."""
    gap_mass: float
    """The share of the Gaussian's mass there."""


@dataclass(frozen=True)
class Schools:
    """Log density only: the fit, and each school's effect under it."""

    fit: Fit
    effects: Float[Tensor, "3 8"]
    """2.5 %, 50 % and 97.5 % quantiles of μ + τ θ̃ⱼ."""


@dataclass(frozen=True)
class Direction:
    """Samples and density: one fit, scored on draws that it hasn't seen."""

    fit: Fit
    forward: Estimate
    reverse: Estimate
    jeffreys: Estimate
    """From the density times e⁷, which changes nothing, since the normaliser cancels."""
    coverage: float
    """Share of the target's draws above q's 1 % density level."""
    precision: float
    """Share of q's draws above the target's 1 % density level."""

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        values = {"forward_kl": self.forward, "reverse_kl": self.reverse, "jeffreys": self.jeffreys}
        fields: dict[str, Any] = {"objective": self.fit.objective.name}
        fields |= {name: value.to_dict() for name, value in values.items()}
        return {**fields, "coverage": self.coverage, "precision": self.precision}


@dataclass(frozen=True)
class Converted:
    """Neither samples nor density: answers to which of two points is likelier, made of the two bumps."""

    advice: Advice
    """For a target without any access."""
    target: Target
    """What `convert` made of the answers; `origin` states what that assumes."""
    forward: Estimate
    """KL of the two bumps from it."""
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them."""
        origin: Any = self.target.origin
        return {**self.advice.to_dict(), "pairs": self.pairs, "origin": origin.to_dict(), "forward_kl": self.forward.to_dict()}


@dataclass(frozen=True)
class Demo:
    """Everything that the demo computed."""

    textbook: Textbook
    petals: Petals
    schools: Schools
    both: list[Direction]
    study: Study
    """The same choice by `compare`: both directions from several seeds, in pairs."""
    neither: Converted

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON can hold them; infinities as text."""
        return {
            "units": "nats",
            "textbook": self.textbook.to_dict(),
            "samples_only": {
                "advice": self.petals.fit.advice.to_dict(),
                "fit": self.petals.fit.to_dict(),
                "mean": self.petals.fit.model.mean.tolist(),
                "gap": self.petals.gap,
                "gap_mass": self.petals.gap_mass,
                "richer": [one.to_dict() for one in self.petals.richer],
            },
            "log_density_only": {
                "advice": self.schools.fit.advice.to_dict(),
                "fit": self.schools.fit.to_dict(),
                "effect_quantiles": self.schools.effects.tolist(),
            },
            "both": [one.to_dict() for one in self.both],
            "study": {"seeds": _SEEDS, "verdict": self.study.verdict.to_dict()},
            "neither": self.neither.to_dict(),
        }


def run_demo(progress: Callable[[int], None] = lambda step: None) -> Demo:
    """Run all five inputs; `progress` is called with the index in `STEPS` of each step as it begins."""
    progress(0)
    cases, infinity = list(textbook.cases()), textbook.infinity()
    capacity = textbook.capacity(cases[0])
    progress(1)
    branches = textbook.branches()
    progress(2)
    book = Textbook(cases, branches, *textbook.thresholds(), *infinity, capacity)
    progress(3)
    flowers = _petals()
    progress(4)
    schools = _schools()
    progress(5)
    measures = ["forward_kl", "reverse_kl", "jeffreys", "calibration"]
    both = _both()
    study = compare(_scaled(), objectives=["forward_kl", "reverse_kl"], seeds=_SEEDS, metrics=measures, draws=2_000)
    progress(6)
    return Demo(book, flowers, schools, both, study, _converted())


def _petals() -> Petals:
    target = petals()
    one = fit(target, Gaussian())
    samples = target.samples
    if samples is None:
        raise TypeError("petals are samples")
    lengths = samples[:, 0].sort().values
    widest = int(lengths.diff().argmax())
    low, high = float(lengths[widest]), float(lengths[widest + 1])
    margin = Normal(one.model.mean[0], one.model.variance[0].sqrt())
    mass = float(margin.cdf(lengths[widest + 1]) - margin.cdf(lengths[widest]))
    return Petals(one, [fit(target, Mixture(count)) for count in (2, 3)], (low, high), mass)


def _schools() -> Schools:
    result = fit(eight_schools())
    u = model_target(result.model, eight_schools()).draws(_UNSEEN_DRAWS, seed=1)
    effects = u[:, 8:9] + u[:, 9:10].exp() * u[:, :8]
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64, device="cpu")
    return Schools(result, effects.quantile(levels, dim=0))


def _scaled() -> Target:
    """Return the two bumps with their density times e⁷."""
    p = Target.of(bimodal(3.0))
    return Target(sampler=p.sampler, log_prob=lambda x: p.log_prob(x) + _SHIFT, dim=1)


def _converted() -> Converted:
    """Ask which of two points is likelier under the two bumps, and convert the answers."""
    law = bimodal(3.0)
    p, generator = Target.of(law), torch.Generator().manual_seed(0)
    a, b = 14 * torch.rand(2, _PAIRS, 1, generator=generator, dtype=torch.float64, device="cpu") - 7
    chance = torch.sigmoid(p.log_prob(a) - p.log_prob(b))
    is_first = (torch.rand(_PAIRS, generator=generator, dtype=torch.float64, device="cpu") < chance)[:, None]
    found = convert(Comparisons(winners=torch.where(is_first, a, b), losers=torch.where(is_first, b, a)), n=_POINTS)
    return Converted(advise(Target(dim=2)), found, estimate(p=law, q=found), _PAIRS)


def _both() -> list[Direction]:
    target, scaled = Target.of(bimodal(3.0)), _scaled()
    directions = []
    for name in ("forward_kl", "reverse_kl"):
        one = fit(target, objective=name)
        q = model_target(one.model, target)
        x, y = target.draws(_UNSEEN_DRAWS, seed=101), q.draws(_UNSEEN_DRAWS, seed=102)
        level = torch.tensor(0.01, dtype=torch.float64, device="cpu")
        coverage = float((q.log_prob(x) >= q.log_prob(y).quantile(level)).double().mean())
        precision = float((target.log_prob(y) >= target.log_prob(x).quantile(level)).double().mean())
        directions.append(
            Direction(
                fit=one,
                forward=monte_carlo.forward_kl(target, q, _UNSEEN_DRAWS, seed=103),
                reverse=monte_carlo.reverse_kl(target, q, _UNSEEN_DRAWS, seed=104),
                jeffreys=monte_carlo.weighted_kls(scaled, q, JeffreysSum(), _UNSEEN_DRAWS, seed=105),
                coverage=coverage,
                precision=precision,
            )
        )
    return directions
