"""The table of conversions: what a user may have instead of samples and a log density, and what it becomes."""

from __future__ import annotations

from dataclasses import dataclass

from whichkl._checks import InputError, cannot


@dataclass(frozen=True)
class Conversion:
    """What a user may have instead of samples and a log density, and what it can be turned into."""

    name: str
    """One word, as `whichkl advise --left` takes it."""
    left: str
    becomes: str
    source: str
    call: str
    """The line of code that does it."""
    command: str = ""
    """The command that does it for files; empty if it takes a program."""


CONVERSIONS = (
    Conversion(
        "simulator",
        "a simulator of data given parameters, and a prior, without a likelihood",
        "draws of the joint: fit q(parameters | data) by forward KL (neural posterior estimation)",
        "Papamakarios & Murray, 2016",
        "target = wk.convert(wk.Simulator(prior=prior, simulate=simulate))",
        "whichkl convert simulations TABLE.csv --prior 'rate=Gamma(2,1)' --out pairs.csv",
    ),
    Conversion(
        "comparisons",
        "answers to 'which of x, x′ is likelier?'",
        "a density up to a temperature (Bradley–Terry): reverse KL, and both KLs where a mixture explains the answers",
        "Mikkola et al., 2024",
        "target = wk.convert(wk.Comparisons(winners=a, losers=b))",
        "whichkl convert comparisons WINNERS.csv LOSERS.csv --noise 1 --out draws.csv",
    ),
    Conversion(
        "moments",
        "moments or other expectations of the target, and a reference",
        "the distribution nearest to the reference with these moments (I-projection)",
        "Csiszár, 1975",
        "target = wk.convert(wk.Moments(of=f, values=m, reference=frames))",
        'whichkl convert moments FRAMES.csv --of "x1, x1^2" --values 0.7,0.99 --out weighted.csv',
    ),
    Conversion(
        "labels",
        "pass/fail labels on draws of a model",
        "the draws that passed are samples, log model + log P(pass | x) is a log density: both accesses",
        "Sugiyama, Suzuki & Kanamori, 2012",
        "target = wk.convert(wk.Labels(draws=x, passed=y, model=q0))",
        "whichkl convert labels DRAWS.csv --passed COLUMN --out passed.csv",
    ),
    Conversion(
        "weights",
        "draws of another distribution, and weights or a density ratio",
        "weighted samples: forward KL by weighted maximum likelihood",
        "Sugiyama, Suzuki & Kanamori, 2012",
        "target = wk.Target(samples=x, log_weights=log_ratio)",
        "whichkl fit DRAWS.csv --log-weights COLUMN",
    ),
)
"""One row per conversion, the most common first."""


def conversion_named(name: str) -> Conversion:
    """Return the conversion of a name.

    Raises:
        InputError: there is none.
    """
    for one in CONVERSIONS:
        if one.name == name.strip().lower():
            return one
    known = ", ".join(one.name for one in CONVERSIONS)
    raise InputError(cannot(f"convert `{name}`", "it is no kind of evidence that is known", f"Choose among {known}"))
