"""Measures: the one table of what a cell is scored by: columns, words, units, directions, and how each is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from whichkl.study import measurements
from whichkl.study.measurements import Measured, Sides

View = Literal["summary", "ranking"]
"""`summary`: printed by `print(study)`. `ranking`: ranks the arms of a pilot, and is drawn for each seed in a report."""


@dataclass(frozen=True)
class Column:
    """One number of a study's table, as tables, figures and verdicts show it."""

    name: str
    words: str
    """Its name in prose, in headings and on axes."""
    unit: Literal["nats", "as a share", "evaluations", ""] = ""
    better: Literal["lower", "higher", ""] = ""
    meaning: str = ""
    table: Literal["closeness", "reach", "weights", ""] = ""
    """The table of a report that shows it; empty for a column that only the files have."""
    endings: tuple[str, ...] = ()
    """Endings of the columns that accompany it, such as `_stderr`."""
    views: tuple[View, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Its name, and the names of the columns that accompany it."""
        return (self.name, *(f"{self.name}{ending}" for ending in self.endings))


@dataclass(frozen=True)
class Measure:
    """A function that scores a model, and the columns that it fills."""

    function: Callable[[Sides], Measured | None]
    columns: tuple[Column, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all columns that it fills."""
        return tuple(name for column in self.columns for name in column.fields)


def _by(function: Callable[[Sides], Measured | None], *columns: Column) -> Measure:
    return Measure(function, columns)


_ERROR = ("_stderr",)
_KL = ("_stderr", "_up_to", "_reliable")
_JEFFREYS = ("_stderr", "_reliable")
_SUMMARY: tuple[View, ...] = ("summary",)
_RANKING: tuple[View, ...] = ("ranking",)
_BOTH = (*_SUMMARY, *_RANKING)
MEASURES: dict[str, Measure] = {
    "forward_kl": _by(
        measurements.forward_kl,
        Column("forward_kl", "forward KL", "nats", "lower", "KL(p‖q), what q misses of p", "closeness", _KL, _BOTH),
    ),
    "reverse_kl": _by(
        measurements.reverse_kl,
        Column("reverse_kl", "reverse KL", "nats", "lower", "KL(q‖p), where q goes and p doesn't", "closeness", _KL, _BOTH),
    ),
    "jeffreys": _by(
        measurements.jeffreys,
        Column("jeffreys", "Jeffreys", "nats", "lower", "KL(p‖q) + KL(q‖p); log Z cancels", "closeness", _JEFFREYS, _BOTH),
    ),
    "ess": _by(
        measurements.ess,
        Column("ess_q", "ESS of q", "as a share", "higher", "draws of q that count when reweighted to p", "weights", (), _BOTH),
        Column("ess_p", "ESS of p", "as a share", "higher", "draws of p that count when reweighted to q", "weights"),
    ),
    "khat": _by(measurements.khat, Column("khat", "k̂", "", "lower", "PSIS k̂ of the weights p/q at draws of q", "weights")),
    "c2st": _by(
        measurements.c2st,
        Column(
            "c2st", "C2ST", "", "lower", "AUC of a classifier of p's draws against q's; ½ is chance", "reach", ("_stderr", "_p")
        ),
    ),
    "mmd": _by(
        measurements.mmd,
        Column("mmd", "MMD²", "", "lower", "squared maximum mean discrepancy, bandwidth from p's draws", "reach", _ERROR),
    ),
    "coverage": _by(
        measurements.reach,
        Column("coverage", "coverage", "as a share", "higher", "draws of p that have a draw of q nearby", "reach", (), _BOTH),
        Column("density", "density", "", "", "draws of q near a draw of p; 1 where q = p", "reach"),
        Column("missed", "missed modes", "", "lower", "modes of p where q never goes"),
        Column("missed_mass", "missed mass", "", "lower", "share of p's draws where q never goes", "reach"),
    ),
    "calibration": _by(
        measurements.calibration,
        Column("interval_50", "50 % interval", "", "", "share of p in central 50 % intervals of q", "weights"),
        Column("interval_90", "90 % interval", "", "", "share of p in central 90 % intervals of q", "weights", (), _SUMMARY),
        Column(
            "interval_gap", "interval gap", "as a share", "lower", "worst miss of a central interval", "closeness", (), _RANKING
        ),
    ),
}
"""The measures of the scorecard; their order is that of the columns."""

DISTILLATION_COLUMNS = (
    Column("accuracy", "accuracy", "as a share", "higher", "labels that are right", views=_SUMMARY),
    Column("agreement", "agreement", "as a share", "higher", "decisions that are the teacher's", views=_SUMMARY),
    Column("nll", "nll", "nats", "lower", "−log of the chance given to the label", views=_SUMMARY),
    Column("ece", "ece", "as a share", "lower", "expected calibration error", views=_SUMMARY),
)
"""Scores of students, in addition to both KLs and Jeffreys."""

COST = Column("evaluations", "evaluations", "evaluations", "lower", "what the solver used of the target", views=_SUMMARY)
"""Cost is counted, not estimated, so that it needs no test."""

_MEASURED = tuple(column for one in MEASURES.values() for column in one.columns)
COLUMNS = {column.name: column for column in (*DISTILLATION_COLUMNS, *_MEASURED, COST)}
"""Every column that holds a measured number, by its name."""

TEXT_FIELDS = ("cell", "family", "objective", "status", "error", "solver", "forward_kl_up_to", "reverse_kl_up_to", "notes")
"""Columns that hold text."""
_HEAD = ("cell", "family", "objective", "seed", "status", "error", "solver", "iterations", "optima")
_COUNTS = ("budget", "out_of_budget", COST.name, "log_prob", "score", "samples", "rows")
FIELDS = (*_HEAD, *_COUNTS, *(name for one in MEASURES.values() for name in one.fields), "notes")
"""The columns of every row, in their order; the user's own metrics come before the notes."""
RESERVED = frozenset((*FIELDS, *MEASURES, *(f"{name}{ending}" for name in FIELDS for ending in _KL), "details", "training"))
"""Names that a metric of the user's own can't have."""
UP_TO = {"entropy_p": "+ H(p)", "log_z": "up to log Z"}
"""Words of a heading for a value that includes more than the divergence."""


def columns_with(metrics: Iterable[str]) -> list[str]:
    """Return the columns of a study with these metrics of the user's own."""
    return [*FIELDS[:-1], *metrics, FIELDS[-1]]


def columns_in(view: View) -> list[Column]:
    """Return the columns that a view shows, in their order."""
    return [column for column in COLUMNS.values() if view in column.views]


def column_words(name: str) -> str:
    """Return what a column is called in prose."""
    return COLUMNS[name].words if name in COLUMNS else name


def unit_of(name: str) -> str:
    """Return the unit of a column, as it is written after a number."""
    return COLUMNS[name].unit if name in COLUMNS else ""
