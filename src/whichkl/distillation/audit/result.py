"""Audit: what was found about a loss, printed as a table with one line per check."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from whichkl.distillation.audit.search import Identified
from whichkl.printable import HTML, shorten

_MAX_LINE_WIDTH, _MAX_LINES = 118, 40
NOT_TRIED = "not tried after the failure of"
_GRADES = {
    "wrong": "the number or its gradient isn't what it should be, on ordinary logits.",
    "fragile": "right on ordinary logits; it breaks at an edge, as stated.",
}


@dataclass(frozen=True)
class Check:
    """One check of an audit.

    Attributes:
        name: what was checked; the audit sets it.
        outcome: "pass", "fail" or "not applicable".
        seen: what the loss did.
        change: what to change where it failed.
        finding: a short name of the failure, for programs.
        decides: whether a failure makes the audit fail: the number or its gradient is wrong on ordinary logits.
    """

    name: str
    outcome: str
    seen: str
    change: str = ""
    finding: str = ""
    decides: bool = True

    @property
    def grade(self) -> str:
        """The grade of a failure, "wrong" or "fragile"; "" otherwise.

        wrong: the number or its gradient is not what it should be, on ordinary logits. fragile: it is right on ordinary logits,
        and breaks at an edge: sure rows, infinities, padding, narrow dtypes, long sequences, a teacher that isn't detached.
        """
        return ("wrong" if self.decides else "fragile") if self.outcome == "fail" else ""

    def __str__(self) -> str:
        mark = self.grade or {"pass": "pass", "not applicable": "n/a"}[self.outcome]
        text = self.seen + (f" → {self.change}" if self.change else "")
        width = _MAX_LINE_WIDTH - 33
        lines = [shorten(text, width)] if self.outcome == "pass" else textwrap.wrap(text, width)
        return "\n".join(f"{mark if not i else '':<9}{self.name if not i else '':<24}{line}" for i, line in enumerate(lines))


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
    mean over the vocabulary, a renormalised top-k, a gradient of something else. `findings` names every failure, `wrong` and
    `fragile` by their grade. `call` states how the loss was called, and what was assumed about it.
    """

    subject: str
    adapter: str
    call: str
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

    @property
    def wrong(self) -> frozenset[str]:
        """The names of the failures that decide: the number or its gradient is wrong on ordinary logits."""
        return frozenset(check.finding for check in self.checks if check.grade == "wrong")

    @property
    def fragile(self) -> frozenset[str]:
        """The names of the other failures: right on ordinary logits, the loss breaks at an edge."""
        return self.findings - self.wrong

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "subject": self.subject,
            "adapter": self.adapter,
            "call": self.call,
            "passed": self.passed,
            "identified": asdict(self.identified),
            "findings": sorted(self.findings),
            "wrong": sorted(self.wrong),
            "fragile": sorted(self.fragile),
            "checks": [asdict(check) | {"grade": check.grade} for check in self.checks],
        }

    def __repr__(self) -> str:
        passed = "passed" if self.passed else "not passed"
        return (
            f"Audit({shorten(self.subject, 80)}: {shorten(str(self.identified), 100)}, {passed}, {len(self.findings)} findings)"
        )

    def __str__(self) -> str:
        counts = [f"{len(names)} {grade}" for grade, names in (("wrong", self.wrong), ("fragile", self.fragile)) if names]
        verdict = "passed" if self.passed else "not passed"
        head = f"Audit of {self.subject}: {verdict}; {', '.join(counts) or 'no finding'}"
        said = (f"Called as {self.call}.", f"It is {self.identified}.")
        lines = [line for one in said for line in textwrap.wrap(one, _MAX_LINE_WIDTH)]
        legend = [f"{grade}: {text}" for grade, text in _GRADES.items() if any(one.grade == grade for one in self.checks)]
        made = [check for check in self.checks if check.outcome != "not applicable"]
        text = [head, *lines, *legend, "", *(line for check in made for line in str(check).splitlines()), *self._not_made()]
        if len(text) <= _MAX_LINES:
            return "\n".join(text)
        failed = [line for check in made if check.grade for line in str(check).splitlines()]
        right = _paragraph("pass", ", ".join(check.name for check in made if not check.grade))
        return "\n".join([head, *lines, *legend, "", *failed, *right, *self._not_made()])

    def _not_made(self) -> list[str]:
        """Return the names of the checks that weren't made: first those that an earlier failure explains."""
        names: dict[str, list[str]] = {}
        for check in self.checks:
            if check.outcome == "not applicable":
                names.setdefault(check.seen if check.seen.startswith(NOT_TRIED) else "", []).append(check.name)
        texts = [", ".join(some) + (f": {reason}" if reason else "") for reason, some in sorted(names.items(), reverse=True)]
        return [line for text in texts for line in _paragraph("n/a", text)]


def _paragraph(mark: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _MAX_LINE_WIDTH - 9)
    return [f"{'' if i else mark:<9}{line}" for i, line in enumerate(lines)]
