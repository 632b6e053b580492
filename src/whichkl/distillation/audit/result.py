"""Audit: what was found about a loss, printed as a table with one line per check."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from whichkl.distillation.audit.matching import Identified
from whichkl.printable import HTML, shorten

_MAX_LINE_WIDTH = 118


@dataclass(frozen=True)
class Check:
    """One check of an audit.

    Attributes:
        name: what was checked; the audit sets it.
        outcome: "pass", "fail" or "not applicable".
        seen: what the loss did.
        change: what to change where it failed.
        finding: a short name of the failure, for programs.
        decides: whether a failure makes the audit fail, since the number itself is wrong; other failures are limits of
            dtype, infinities and padding that many losses have.
    """

    name: str
    outcome: str
    seen: str
    change: str = ""
    finding: str = ""
    decides: bool = True

    def __str__(self) -> str:
        mark = {"pass": "pass", "fail": "FAIL" if self.decides else "fail", "not applicable": "n/a "}[self.outcome]
        text = self.seen + (f" → {self.change}" if self.change else "")
        lines = textwrap.wrap(text, _MAX_LINE_WIDTH - 30)
        return "\n".join(f"{mark if not i else '':<6}{self.name if not i else '':<24}{line}" for i, line in enumerate(lines))


def passed(seen: str) -> Check:
    """Return a check that found nothing wrong."""
    return Check("", "pass", seen)


def failed(seen: str, change: str, finding: str, *, decides: bool = True) -> Check:
    """Return a check that found a mistake."""
    return Check("", "fail", seen, change, finding, decides)


def not_applicable(why: str) -> Check:
    """Return a check that this loss, or this way of calling it, doesn't allow."""
    return Check("", "not applicable", why)


@dataclass(frozen=True)
class Audit(HTML):
    """What an audit found: `identified` is what the loss computes, `checks` what was checked.

    `passed` is False where the number itself is wrong: a cross-entropy in place of a KL, a sign, a mask that is ignored, a
    mean over the vocabulary, a renormalised top-k, a gradient of something else. `findings` names every failure.
    """

    subject: str
    adapter: str
    identified: Identified
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed that decides."""
        return not any(check.outcome == "fail" and check.decides for check in self.checks)

    @property
    def findings(self) -> frozenset[str]:
        """The names of all failures."""
        return frozenset(check.finding for check in self.checks if check.outcome == "fail")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "subject": self.subject,
            "adapter": self.adapter,
            "passed": self.passed,
            "identified": asdict(self.identified),
            "findings": sorted(self.findings),
            "checks": [asdict(check) for check in self.checks],
        }

    def __repr__(self) -> str:
        passed = "passed" if self.passed else "not passed"
        return (
            f"Audit({shorten(self.subject, 80)}: {shorten(str(self.identified), 100)}, {passed}, {len(self.findings)} findings)"
        )

    def __str__(self) -> str:
        count = sum(check.outcome == "fail" for check in self.checks)
        verdict = "passed" if self.passed else "not passed"
        found = f"{verdict}; {count or 'no'} finding{'s' if count > 1 else ''}"
        head = f"Audit of {self.subject}, called as `{self.adapter}`: {found}\nIt is {self.identified}."
        return "\n".join([head, "", *(str(check) for check in self.checks)])
