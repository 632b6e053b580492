"""Saved fit: what `fit.json` holds, and the arguments of `Fit` that are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor

from whichkl.access import Access
from whichkl.advice import advise
from whichkl.diagnostics import FINDINGS, Diagnostics, carried
from whichkl.divergences import Estimate
from whichkl.families import Family
from whichkl.families.family import check_parameters
from whichkl.files.saving import Saved
from whichkl.fitting.summary import Summary
from whichkl.objectives import objective_of
from whichkl.samples import Reading
from whichkl.solvers import Optimum
from whichkl.targets.origin import Origin
from whichkl.targets.supports import Bijection

FIT = Saved("a fit", "fit.json", "model", "Fit again")


class OptimumFields(TypedDict):
    """One of `diagnostics.optima`."""

    loss: float
    converged: bool
    is_global: bool


class DiagnosticsFields(TypedDict):
    """What must be in `diagnostics`; `Diagnostics.from_dict` checks the rest, some of which older versions don't have."""

    optima: list[OptimumFields]
    iterations: int
    residual: float


class RequiredFields(TypedDict):
    """What `fit.json` must hold: everything but the parameters of a fit."""

    format: int
    family: Mapping[str, Any]
    objective: str
    solver: str
    status: Literal["converged", "stopped", "failed"]
    findings: tuple[str, ...]
    value: Estimate
    diagnostics: DiagnosticsFields
    access: str
    names: tuple[str, ...]
    support: list[str]
    seed: int


class FitFields(RequiredFields, total=False):
    """What `fit.json` holds; older versions have no further fields."""

    summary: Summary | None
    context_names: tuple[str, ...]
    reading: Reading
    origin: Origin


def read_fit(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read a saved fit and check its fields, without building its models."""
    fields, tensors = FIT.read(folder, FitFields)
    try:
        Diagnostics.from_dict(fields["diagnostics"], ())
    except ValueError as error:
        raise FIT.damaged(folder, str(error)) from error
    return fields, tensors


def rebuilt(fields: FitFields, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Any]:
    """Return the arguments of `Fit` that a saved one holds; a `ValueError` names what can't be that of a fit."""
    names = fields["names"]
    for name in fields["findings"]:
        if name not in FINDINGS:
            raise ValueError(f"there is no finding `{name[:40]}`")
    if fields["seed"] < 0 or not names or len(set(names)) < len(names):
        raise ValueError("its seed or its names can't be those of a fit")
    optima = _optima(fields["diagnostics"]["optima"], tensors, family)
    bijection = Bijection(fields["support"], len(names))  # type: ignore[arg-type]
    shape = getattr(optima[0].model, "event_shape", None)
    if shape is not None and not family.conditional and tuple(shape) not in ((bijection.free_dim,), ()):
        raise ValueError(f"its model has events of shape {tuple(shape)}, and it names {len(names)} columns")
    return {
        "model": carried(optima[0].model, bijection),
        "family": family,
        "objective": objective_of(fields["objective"]),
        "solver": fields["solver"],
        "advice": replace(advise(Access.parse(fields["access"]), family), dim=len(names), origin=fields.get("origin")),
        "value": fields["value"],
        "status": fields["status"],
        "findings": frozenset(fields["findings"]),
        "diagnostics": Diagnostics.from_dict(fields["diagnostics"], optima),
        "names": names,
        "bijection": bijection,
        "seed": fields["seed"],
        "saved_summary": fields.get("summary"),
        "context_names": fields.get("context_names", ()),
        "reading": fields.get("reading", Reading()),
    }


def _optima(described: list[OptimumFields], tensors: Mapping[str, Tensor], family: Family) -> tuple[Optimum, ...]:
    if not described:
        raise ValueError("it has no optimum")
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, rest = name.partition(".")
        groups.setdefault(number, {})[rest] = value
    if set(groups) != {str(i) for i in range(len(described))}:
        raise ValueError(f"it has {len(described)} optima, and weights of {len(groups)}")
    found = []
    for i, one in enumerate(described):
        parameters = groups[str(i)]
        check_parameters(parameters, family.config())
        model = family.model(parameters)
        again = family.parameters(model)
        if any(parameters[name].shape != again[name].shape for name in again if name in parameters):
            raise ValueError(f"the parameters of optimum {i} aren't those of `{family}`")
        found.append(Optimum(model, one["loss"], one["converged"], one["is_global"]))
    return tuple(found)
