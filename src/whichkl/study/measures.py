"""Measures: the columns of a study's table, and what each is."""

from __future__ import annotations

MEASURES: dict[str, tuple[str, ...]] = {
    "forward_kl": ("forward_kl", "forward_kl_stderr", "forward_kl_up_to", "forward_kl_reliable"),
    "reverse_kl": ("reverse_kl", "reverse_kl_stderr", "reverse_kl_up_to", "reverse_kl_reliable"),
    "jeffreys": ("jeffreys", "jeffreys_stderr", "jeffreys_reliable"),
    "ess": ("ess_q", "ess_p"),
    "khat": ("khat",),
    "c2st": ("c2st", "c2st_stderr", "c2st_p"),
    "mmd": ("mmd", "mmd_stderr"),
    "coverage": ("coverage", "density", "missed", "missed_mass"),
    "calibration": ("interval_50", "interval_90", "interval_gap"),
}
"""What a cell is scored by, and the columns that each fills."""

HEAD = ("cell", "family", "objective", "seed", "status", "error", "solver", "iterations", "optima")
COST = ("budget", "out_of_budget", "evaluations", "log_prob", "score", "samples", "rows")
FIELDS = (*HEAD, *COST, *(column for columns in MEASURES.values() for column in columns), "notes")
"""The columns of every row, in their order; the user's own metrics come before the notes."""

_SUFFIXES = ("_stderr", "_up_to", "_reliable")
"""What tables and reports look for next to a column."""
RESERVED = frozenset((*FIELDS, *MEASURES, *(f"{name}{end}" for name in FIELDS for end in _SUFFIXES), "details", "training"))
"""Names that a metric of the user's own can't have."""


def columns_with(metrics: tuple[str, ...] | list[str]) -> list[str]:
    """Return the columns of a study with such metrics of the user's own, by their names."""
    return [*FIELDS[:-1], *metrics, FIELDS[-1]]
