"""The table of conversions: what a user may have instead of samples and a log density, and what it becomes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conversion:
    """What a user may have instead of samples and a log density, and what it can be turned into."""

    left: str
    becomes: str
    source: str
    call: str
    """The line of code that does it."""


CONVERSIONS = (
    Conversion(
        "a simulator of data given parameters, and a prior, without a likelihood",
        "draws of the joint: fit q(parameters | data) by forward KL (neural posterior estimation)",
        "Papamakarios & Murray, 2016",
        "wk.Simulator(prior=prior, simulate=simulate)",
    ),
    Conversion(
        "answers to 'which of x, x′ is likelier?'",
        "a density up to a temperature (Bradley–Terry): reverse KL, and both KLs where a mixture explains the answers",
        "Mikkola et al., 2024",
        "wk.Comparisons(winners=a, losers=b)",
    ),
    Conversion(
        "moments or other expectations of the target, and a reference",
        "the distribution nearest to the reference with these moments (I-projection)",
        "Csiszár, 1975",
        "wk.Moments(of=f, values=m, reference=frames)",
    ),
    Conversion(
        "pass/fail labels on draws of a model",
        "the draws that passed are samples, log model + log P(pass | x) is a log density: both accesses",
        "Sugiyama, Suzuki & Kanamori, 2012",
        "wk.Labels(draws=x, passed=y, model=q0)",
    ),
    Conversion(
        "draws of another distribution, and weights or a density ratio",
        "weighted samples: forward KL by weighted maximum likelihood",
        "Sugiyama, Suzuki & Kanamori, 2012",
        "wk.Target(samples=x, log_weights=log_ratio)",
    ),
)
"""One row per conversion, the most common first; `call` is what `wk.convert` gets, or a target as it is."""
