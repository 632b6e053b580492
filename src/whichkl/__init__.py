"""whichkl: forward or reverse KL? Say what you can do with your target; see which is possible, fit it, see if it worked.

Every name is loaded at first use, so that importing whichkl is instant.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whichkl import distillation, families, losses, problems  # noqa: F401
    from whichkl._checks import InputError, IntegrityError, ResourceError, TargetError, WhichklError  # noqa: F401
    from whichkl.access import Access
    from whichkl.advice import advise
    from whichkl.arviz import to_arviz
    from whichkl.conversions.comparisons import Comparisons  # noqa: F401
    from whichkl.conversions.convert import convert
    from whichkl.conversions.labels import Labels  # noqa: F401
    from whichkl.conversions.moments import Moments  # noqa: F401
    from whichkl.conversions.simulations import Simulations  # noqa: F401
    from whichkl.conversions.simulator import Simulator  # noqa: F401
    from whichkl.distillation import distill
    from whichkl.distillation.audit import audit
    from whichkl.divergences import Estimate
    from whichkl.divergences.dispatch import estimate
    from whichkl.fitting import Fit, fit
    from whichkl.objectives import ForwardKL, ReverseKL
    from whichkl.plots import plot
    from whichkl.reporting import report
    from whichkl.study import compare
    from whichkl.targets import Target

__version__ = "0.1.0"

_HOMES = {
    "Access": "access",
    "Comparisons": "conversions.comparisons",
    "Estimate": "divergences",
    "Fit": "fitting",
    "ForwardKL": "objectives",
    "InputError": "_checks",
    "IntegrityError": "_checks",
    "ResourceError": "_checks",
    "Labels": "conversions.labels",
    "Moments": "conversions.moments",
    "ReverseKL": "objectives",
    "Simulations": "conversions.simulations",
    "Simulator": "conversions.simulator",
    "Target": "targets",
    "TargetError": "_checks",
    "WhichklError": "_checks",
    "advise": "advice",
    "audit": "distillation.audit",
    "compare": "study",
    "convert": "conversions.convert",
    "distill": "distillation",
    "distillation": "",
    "estimate": "divergences.dispatch",
    "families": "",
    "fit": "fitting",
    "losses": "",
    "plot": "plots",
    "problems": "",
    "report": "reporting",
    "to_arviz": "arviz",
}
"""The module of each name; a room such as `families` is loaded under its own name."""

__all__ = [
    "Access",
    "Estimate",
    "Fit",
    "ForwardKL",
    "ReverseKL",
    "Target",
    "advise",
    "audit",
    "compare",
    "convert",
    "distill",
    "estimate",
    "fit",
    "plot",
    "report",
    "to_arviz",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'whichkl' has no attribute {name!r}")
    home = _HOMES[name]
    value = _loaded(f"whichkl.{home or name}")
    return getattr(value, name) if home else value


def _loaded(name: str) -> Any:
    """Import a module without the garbage collector, whose walks over all objects of torch take a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if collects:
            gc.enable()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
