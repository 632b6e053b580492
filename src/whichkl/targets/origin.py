"""Origin: what a converted target was made of, what that assumes, and how far to trust it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from whichkl.importance import MIN_ROWS_OF_KHAT, doubt_of_weights, effective_sample_size, pareto_smooth, shown_khat

_WIDTH = 96


@dataclass(frozen=True)
class Origin:
    """What `convert` made a target of. Every part is whole sentences.

    >>> print(Origin("30 simulations.", assumed=("θ has the prior's density.",), trust="Trust it where simulations were made."))
    Made of 30 simulations.
      assumed: θ has the prior's density.
      trust: Trust it where simulations were made.
    """

    source: str
    """What it was made of, and how much of that."""
    assumed: tuple[str, ...] = ()
    """What was taken for granted: a noise scale, a prior, a proposal, a reference."""
    unknown: tuple[str, ...] = ()
    """What this evidence can't tell."""
    left_out: tuple[str, ...] = ()
    """What wasn't used, how much of it, and what that means."""
    trust: str = ""
    """How far to trust the target, with the numbers that say so."""
    reliable: bool = True
    """False if what was converted can't carry a conclusion; every value of a fit is then unreliable."""
    is_corrected: bool = False
    """Whether it is unreliable for fits to the weighted rows alone: networks learn from all rows, and correct their draws."""
    up_to: Literal["temperature"] | None = None
    """The constant that can't be known and that every value rests on, if there is one."""
    log_z_stderr: float = 0.0
    """Standard error, in nats, of the log of the converted log density's integral; part of the error of what rests on it."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What is shown, in order: (heading, sentence); what can't be relied on begins with that."""
        parts = (("assumed", self.assumed), ("can't be known", self.unknown), ("left out", self.left_out))
        rows = [(name, sentence) for name, sentences in parts for sentence in sentences]
        trust = [("trust" if self.reliable else "not reliable", self.trust)] if self.trust else []
        return rows + trust if self.reliable else trust + rows

    def to_dict(self) -> dict[str, Any]:
        """Return the origin as JSON can hold it."""
        return {
            "source": self.source,
            "assumed": list(self.assumed),
            "unknown": list(self.unknown),
            "left_out": list(self.left_out),
            "trust": self.trust,
            "reliable": self.reliable,
            "up_to": self.up_to,
            "log_z_stderr": self.log_z_stderr,
        }

    def __str__(self) -> str:
        lines = [textwrap.fill(f"Made of {self.source}", _WIDTH, subsequent_indent="  ")]
        for name, text in self.rows:
            lines.append(textwrap.fill(f"{name}: {text}", _WIDTH, initial_indent="  ", subsequent_indent="    "))
        return "\n".join(lines)


def inherited(origin: Origin, **sources: Any) -> Origin:
    """Return the origin of a conversion whose sources may be converted themselves: it keeps their doubts and sentences.

    Args:
        origin: that of the conversion alone.
        sources: by the name of the argument, the origin of what it started from; others than an `Origin` say nothing.

    >>> first = Origin("30 answers.", trust="They are a coin's.", reliable=False, up_to="temperature")
    >>> print(inherited(Origin("1 moment of a reference.", trust="λ is 2."), reference=first))
    Made of 1 moment of a reference. The `reference` was made of 30 answers.
      not reliable: The `reference`: They are a coin's. λ is 2.
    """
    known = {name: one for name, one in sources.items() if isinstance(one, Origin)}
    known = {name: one for at, (name, one) in enumerate(known.items()) if one not in [*known.values()][:at]}
    if not known:
        return origin
    every = [origin, *known.values()]
    trusts = [(origin, origin.trust), *((one, f"The `{name}`: {one.trust}") for name, one in known.items() if one.trust)]
    trusts.sort(key=lambda pair: pair[0].reliable)  # what can't be relied on begins with that
    return replace(
        origin,
        source=" ".join([origin.source, *(f"The `{name}` was made of {one.source}" for name, one in known.items())]),
        assumed=tuple(dict.fromkeys(text for one in every for text in one.assumed)),
        unknown=tuple(dict.fromkeys(text for one in every for text in one.unknown)),
        left_out=tuple(dict.fromkeys(text for one in every for text in one.left_out)),
        trust=" ".join(text for _, text in trusts if text),
        reliable=all(one.reliable for one in every),
        is_corrected=origin.is_corrected and all(one.reliable for one in known.values()),
        up_to=next((one.up_to for one in every if one.up_to is not None), None),
    )


def worth_of_rows(weights: Float[Tensor, " n"]) -> str:
    """Return a sentence on how many rows of equal weight the weighted rows are worth, and k̂ of the weights' tail.

    >>> import torch
    >>> worth_of_rows(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    'The 4 weighted rows are worth 3 of equal weight (ESS 75 %).'
    """
    logs = weights.double().log()
    ess, n = effective_sample_size(logs), len(logs)
    khat = f"; k̂ of the weights is {shown_khat(pareto_smooth(logs)[1])}" if n >= MIN_ROWS_OF_KHAT else ""
    worth = f"{ess:,.0f}" if ess >= 100 else f"{ess:.3g}"
    return f"The {n:,} weighted rows are worth {worth} of equal weight (ESS {100 * ess / n:.3g} %{khat})."


def origin_of_weights(weights: Float[Tensor, " n"] | None, samples: Origin | None) -> Origin | None:
    """Return the origin of samples, with their own, that were drawn from another law and weighted by the density ratio."""
    if weights is None:
        return None
    zeros = int((weights == 0).sum())
    are_sound = doubt_of_weights(weights) is None
    doubt = "" if are_sound else " Few rows may carry every result: draw from a distribution that is nearer to the target."
    found = Origin(
        f"{len(weights):,} draws of another distribution, with a log weight each.",
        assumed=("Each log weight is log p minus the log density that drew the row, up to one constant.",),
        unknown=("Mass of the target where the other distribution drew no row.",),
        left_out=(f"{zeros:,} rows have the weight 0 and count for nothing.",) if zeros else (),
        trust=worth_of_rows(weights) + doubt,
        reliable=are_sound,
    )
    return inherited(found, samples=samples)
