"""Access: the closed set of things that one can do with a distribution, and what an objective requires."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot


class Access(enum.Flag):
    """What can be done with a distribution. A target *exposes* an `Access`; an objective *declares* one.

    >>> Access.SAMPLES | Access.LOG_PROB
    <Access: samples, log_prob>
    >>> Access.parse("sampler, log_prob").cell
    'both'
    """

    SAMPLES = enum.auto()
    """A fixed set of draws."""
    SAMPLER = enum.auto()
    """Fresh draws, any number of them."""
    LOG_PROB = enum.auto()
    """The natural log of the density, at least up to a constant."""
    NORMALIZED = enum.auto()
    """`log_prob` integrates to one."""
    DIFFERENTIABLE = enum.auto()
    """`log_prob` can be differentiated by autograd."""
    SCORE = enum.auto()
    """The gradient of the log density."""
    RSAMPLE = enum.auto()
    """Draws through which gradients flow."""
    ENUMERABLE = enum.auto()
    """A finite set of atoms that can be listed."""

    @classmethod
    @typed
    def parse(cls, text: str) -> Access:
        """Read a comma-separated list such as ``"samples,log_prob"``; "nothing", or an empty text, means no access.

        Raises:
            InputError: a word isn't one of the closed set.
        """
        access = cls(0)
        if text.strip() == "nothing":
            return access
        for word in filter(None, (part.strip() for part in text.split(","))):
            if word.upper() not in cls.__members__:
                known = ", ".join(member.label for member in cls)
                raise InputError(cannot(f"read the access `{word}`", "it isn't a known one", f"Choose among {known}"))
            access |= cls[word.upper()]
        return access

    @property
    def label(self) -> str:
        """The names of the members, lower case, separated by commas; ``"nothing"`` for none."""
        return ", ".join(str(member.name).lower() for member in type(self) if member in self) or "nothing"

    @property
    def can_sample(self) -> bool:
        """Whether draws of the distribution are available, fixed or fresh."""
        return bool(self & (Access.SAMPLES | Access.SAMPLER))

    @property
    def can_evaluate(self) -> bool:
        """Whether log p is available up to a constant, directly or by integrating the score along lines."""
        return bool(self & (Access.LOG_PROB | Access.SCORE))

    @property
    def cell(self) -> str:
        """The cell of the access table: ``samples``, ``log_prob``, ``both`` or ``neither``."""
        if self.can_sample:
            return "both" if self.can_evaluate else "samples"
        return "log_prob" if self.can_evaluate else "neither"

    def __str__(self) -> str:
        return self.label

    def __repr__(self) -> str:
        return f"<Access: {self.label}>"


@dataclass(frozen=True)
class Requirement:
    """A set of alternatives; an access meets it if it contains all of at least one alternative.

    >>> Requirement(Access.SAMPLES, Access.SAMPLER).met_by(Access.SAMPLER | Access.LOG_PROB)
    True
    """

    alternatives: tuple[Access, ...]

    def __init__(self, *alternatives: Access) -> None:
        object.__setattr__(self, "alternatives", alternatives)

    def met_by(self, access: Access) -> bool:
        """Whether `access` contains all of one alternative."""
        return any(one in access for one in self.alternatives)

    def lacking(self, access: Access) -> set[str]:
        """Return what must be passed in addition to `access`, for each alternative that needs the fewest arguments.

        >>> sorted(Requirement(Access.LOG_PROB, Access.SCORE).lacking(Access.SAMPLES))
        ['`log_prob=`', '`score=`']
        """
        gaps = [one & ~access for one in self.alternatives]
        fewest = min(len(gap) for gap in gaps)
        words = [" with ".join(f"`{word}={'True' * (word == 'normalized')}`" for word in gap.label.split(", ")) for gap in gaps]
        return {text for text, gap in zip(words, gaps, strict=True) if len(gap) == fewest}

    @property
    def label(self) -> str:
        """The alternatives in words: ``"`samples` or `sampler`"``."""
        ways = [[f"`{part}`" for part in one.label.split(", ")] for one in self.alternatives]
        return " or ".join(" with ".join([first, *([" and ".join(rest)] if rest else [])]) for first, *rest in ways)
