"""Measures: the table of the measures that score a cell, with columns, words, units and directions; and the needs of users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from whichkl.study import measurements
from whichkl.study.measurements import Measurement, Sides

View = Literal["summary", "ranking"]
"""`summary`: printed by `print(study)`. `ranking`: ranks the arms of a pilot, and is drawn for each seed in a report."""


@dataclass(frozen=True)
class Column:
    """One number of a study's table, as tables, figures and verdicts show it."""

    name: str
    words: str
    """Its name in prose, in headings and on axes."""
    unit: Literal["nats", "as a share", "evaluations", "FLOPs", "seconds", "tokens", ""] = ""
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


class Measure:
    """A function that scores a model, and the columns that it fills."""

    def __init__(self, function: Callable[[Sides], Measurement | None], *columns: Column) -> None:
        """Take both."""
        self.function, self.columns = function, columns
        self.fields = tuple(name for column in columns for name in column.fields)
        """Names of all columns that it fills."""


_ERROR = ("_stderr",)
_KL = ("_stderr", "_up_to", "_reliable")
_JEFFREYS = ("_stderr", "_reliable")
_TEST = ("_stderr", "_p")
_SUMMARY: tuple[View, ...] = ("summary",)
_RANKING: tuple[View, ...] = ("ranking",)
_BOTH = (*_SUMMARY, *_RANKING)
MEASURES: dict[str, Measure] = {
    "forward_kl": Measure(
        measurements.forward_kl,
        Column("forward_kl", "forward KL", "nats", "lower", "KL(p‖q), what q misses of p", "closeness", _KL, _BOTH),
    ),
    "reverse_kl": Measure(
        measurements.reverse_kl,
        Column("reverse_kl", "reverse KL", "nats", "lower", "KL(q‖p), where q goes and p doesn't", "closeness", _KL, _BOTH),
    ),
    "jeffreys": Measure(
        measurements.jeffreys,
        Column("jeffreys", "Jeffreys", "nats", "lower", "KL(p‖q) + KL(q‖p); log Z cancels", "closeness", _JEFFREYS, _BOTH),
    ),
    "ess": Measure(
        measurements.ess,
        Column("ess_q", "ESS of q", "as a share", "higher", "draws of q that count when reweighted to p", "weights", (), _BOTH),
        Column("ess_p", "ESS of p", "as a share", "higher", "draws of p that count when reweighted to q", "weights"),
    ),
    "khat": Measure(measurements.khat, Column("khat", "k̂", "", "lower", "PSIS k̂ of the weights p/q at draws of q", "weights")),
    "c2st": Measure(
        measurements.c2st,
        Column("c2st", "C2ST", "", "lower", "AUC of a classifier of p's draws against q's; ½ is chance", "reach", _TEST),
    ),
    "mmd": Measure(
        measurements.mmd,
        Column("mmd", "MMD²", "", "lower", "squared maximum mean discrepancy, bandwidth from p's draws", "reach", _ERROR),
    ),
    "coverage": Measure(
        measurements.reach,
        Column("coverage", "coverage", "as a share", "higher", "draws of p that have a draw of q nearby", "reach", (), _BOTH),
        Column("density", "density", "", "", "draws of q near a draw of p; 1 where q = p", "reach"),
        Column("missed", "missed modes", "", "lower", "modes of p where q never goes"),
        Column("missed_mass", "missed mass", "", "lower", "share of p's draws where q never goes", "reach"),
    ),
    "calibration": Measure(
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
    Column("agreement", "agreement", "as a share", "higher", "decisions, or tokens, that are the teacher's", views=_SUMMARY),
    Column("nll", "nll", "nats", "lower", "−log of the chance of the label, or of the teacher's token", views=_SUMMARY),
    Column("ece", "ece", "as a share", "lower", "expected calibration error", views=_SUMMARY),
)
"""Scores of students, in addition to both KLs and Jeffreys."""

LANGUAGE_COLUMNS = (
    Column("forward_kl_per_token", "forward KL a token", "nats", "lower", "divided by the mean length of the teacher's texts"),
    Column("reverse_kl_per_token", "reverse KL a token", "nats", "lower", "divided by the mean length of the student's texts"),
    Column("data_nll", "nll of the data", "nats", "lower", "−log of the chance of a token of the data's completions"),
    Column("entropy", "entropy", "nats", "", "of a sequence of the student", views=_SUMMARY),
    Column("entropy_gap", "entropy gap", "nats", "lower", "distance from the teacher's entropy"),
    Column("length", "length", "tokens", "", "of the student's sequences", views=_SUMMARY),
    Column("length_gap", "length gap", "tokens", "lower", "distance from the teacher's length"),
    Column("distinct_2", "distinct pairs", "as a share", "", "of neighbouring tokens within a sequence", views=_SUMMARY),
    Column("cut", "cut", "as a share", "", "the student's sequences that reached the largest length"),
    Column("cpu_seconds", "CPU time", "seconds", "lower", "of training", views=_SUMMARY),
)
"""Scores of language models, in addition to those of students."""

COST = Column("evaluations", "evaluations", "evaluations", "lower", "what the solver used of the target", views=_SUMMARY)
FLOPS = Column("flops", "FLOPs", "FLOPs", "lower", "of trained and of generated tokens, counted", views=_SUMMARY)
"""Cost is counted, not estimated, so that it needs no test."""

_MEASURED = tuple(column for one in MEASURES.values() for column in one.columns)
COLUMNS = {column.name: column for column in (*DISTILLATION_COLUMNS, *_MEASURED, *LANGUAGE_COLUMNS, COST, FLOPS)}
"""Every column that holds a measured number, by its name."""

_UP_TO_FIELDS = ("forward_kl_up_to", "reverse_kl_up_to", "forward_kl_per_token_up_to", "reverse_kl_per_token_up_to")
TEXT_FIELDS = ("cell", "family", "objective", "status", "error", "solver", *_UP_TO_FIELDS, "notes")
"""Columns that hold text."""
_HEAD = ("cell", "family", "objective", "seed", "status", "error", "solver", "iterations", "optima")
_COUNTS = ("budget", "out_of_budget", COST.name, "log_prob", "score", "samples", "rows")
FIELDS = (*_HEAD, *_COUNTS, *(name for one in MEASURES.values() for name in one.fields), "notes")
"""The columns of every row, in their order; the user's own metrics come before the notes."""
RESERVED = frozenset((*FIELDS, *MEASURES, *(f"{name}{ending}" for name in FIELDS for ending in _KL), "details", "training"))
"""Names that a metric of the user's own can't have."""
_UP_TO = {
    "entropy_p": "+ H(p)",
    "log_z": "up to log Z",
    "temperature": "at an assumed temperature",
    "entropy_p, temperature": "+ H(p) at an assumed temperature",
    "log_z, temperature": "up to log Z, at an assumed temperature",
}


def columns_with(metrics: Iterable[str]) -> list[str]:
    """Return the columns of a study with these metrics of the user's own."""
    return [*FIELDS[:-1], *metrics, FIELDS[-1]]


def constants_of(rows: Iterable[Mapping[str, Any]], name: str) -> str:
    """Return what the values of a column include or rest on, as words of a heading; empty if nothing."""
    parts = ("forward_kl", "reverse_kl") if name == "jeffreys" else (name,)
    found = {row.get(f"{one}_up_to") for row in rows for one in parts if row.get(one) is not None}
    if name == "jeffreys":  # log Z cancels
        found = {"temperature"} if any(str(one).endswith("temperature") for one in found) else set()
    return " or ".join(words for constant, words in _UP_TO.items() if constant in found)


def columns_in(view: View) -> list[Column]:
    """Return the columns that a view shows, in their order."""
    return [column for column in COLUMNS.values() if view in column.views]


def cost_of(rows: Sequence[Mapping[str, Any]]) -> Column:
    """Return the column that counts what rows cost."""
    return next((one for one in (COST, FLOPS) if any(row.get(one.name) is not None for row in rows)), COST)


def column_words(name: str) -> str:
    """Return what a column is called in prose."""
    return COLUMNS[name].words if name in COLUMNS else name


def unit_of(name: str) -> str:
    """Return the unit of a column, as it is written after a number."""
    return COLUMNS[name].unit if name in COLUMNS else ""


@dataclass(frozen=True)
class Need:
    """One thing that a user may want; `decide` judges arms by each need separately."""

    name: str
    columns: tuple[str, ...]
    """Columns of the table; the first that has values is judged."""
    wish: str
    """In words, after "you want"."""
    less_is_better: bool = True
    absolute: float = 0.01
    """Differences below this don't matter, in the column's unit."""
    relative: float = 0.05
    """Nor do differences below this share of the better arm's mean; not used where a column is known up to a constant."""

    def column(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the column that counts for these rows."""
        return next((name for name in self.columns if any(row.get(name) is not None for row in rows)), None)

    def stand_in(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the column that counts where it isn't the first."""
        found = self.column(rows)
        return None if found == self.columns[0] else found


NEEDS = (
    Need("overall", ("jeffreys",), "q close to p in both directions"),
    Need("coverage", ("forward_kl",), "nothing of p to be missed"),
    Need("precision", ("reverse_kl",), "no draws where p has none"),
    Need("calibration", ("interval_gap",), "intervals that hold as much of p as they say", relative=0.0),
)
"""Needs by which fits are judged; units are those of the columns."""

DISTILLATION_NEEDS = (
    Need("accuracy", ("accuracy",), "labels to be right", less_is_better=False, absolute=0.005, relative=0.0),
    Need("agreement", ("agreement",), "the teacher's decisions", less_is_better=False, absolute=0.005, relative=0.0),
    Need("likelihood", ("nll",), "probabilities of the labels that are high", absolute=0.005),
    Need("calibration", ("ece",), "confidence that is right as often as it says", absolute=0.005, relative=0.0),
    Need("coverage", ("forward_kl",), "nothing to be missed that the teacher holds possible", absolute=0.005),
    Need("precision", ("reverse_kl",), "nothing that the teacher holds impossible", absolute=0.005),
)
"""Needs by which students are judged; units are those of the columns."""

LANGUAGE_NEEDS = (
    Need("coverage", ("forward_kl", "forward_kl_per_token"), "nothing to be missed that the teacher may write", relative=0.02),
    Need("precision", ("reverse_kl", "reverse_kl_per_token"), "nothing that the teacher wouldn't write", relative=0.02),
    Need("agreement", ("agreement",), "the teacher's likeliest token", less_is_better=False, absolute=0.005, relative=0.0),
    Need("calibration", ("ece",), "confidence that is right as often as it says", absolute=0.005, relative=0.0),
    Need("diversity", ("entropy_gap",), "texts as varied as the teacher's", absolute=0.1),
    Need("length", ("length_gap",), "texts as long as the teacher's", absolute=0.1),
)
"""Needs by which student language models are judged; KLs and entropies are those of whole sequences."""

NEEDS_OF_STUDENTS = {"distillation": DISTILLATION_NEEDS, "language model": LANGUAGE_NEEDS}
"""By the source of the target."""

CHEAPER = 0.1
"""An arm is cheaper than another where it uses less by more than this share."""
