"""Fit file: the fields of a saved fit, written and read back with checks."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_type_hints

from torch import Tensor

from whichkl.access import Access
from whichkl.advice import advise
from whichkl.diagnostics import Diagnostics, carried
from whichkl.diagnostics.findings import FINDINGS
from whichkl.divergences import Estimate
from whichkl.families import Family
from whichkl.families.parameter_checks import check_parameters
from whichkl.files.saving import FORMAT, Saved
from whichkl.objectives import objective_of
from whichkl.solvers import Optimum
from whichkl.targets.supports import Bijection

FIT = Saved("a fit", "fit.json", "model", "Fit again")


class OptimumFields(TypedDict):
    """One of `diagnostics.optima`."""

    loss: float
    converged: bool
    is_global: bool


_MEASURED = {one.name: one for one in fields(Diagnostics) if one.name not in ("optima", "curve", "held")}
"""Fields of `Diagnostics` that are saved as they are."""
if TYPE_CHECKING:
    DiagnosticsFields = Mapping[str, Any]
else:
    _HINTS = get_type_hints(Diagnostics)
    DiagnosticsFields = TypedDict(
        "DiagnosticsFields",
        {
            "optima": list[OptimumFields],
            "curve": NotRequired[list[Any] | None],
            **{name: _HINTS[name] if one.default is MISSING else NotRequired[_HINTS[name]] for name, one in _MEASURED.items()},
        },
    )
    """`Fit.diagnostics` without the parameters; what older versions didn't measure may be missing."""


class FitFields(TypedDict):
    """Everything of a fit but its parameters, as `fit.json` holds it."""

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


def described(fit: Any) -> dict[str, Any]:
    """Return everything of a `Fit` but its parameters, as JSON can hold it."""
    d = fit.diagnostics
    kept = {name: getattr(d, name) for name in _MEASURED}
    return {
        "format": FORMAT,
        "family": fit.family.config(),
        "objective": fit.objective.spec,
        "solver": fit.solver,
        "status": fit.status,
        "findings": sorted(fit.findings),
        "explanations": list(fit.explanations),
        "value": fit.value.to_dict(),
        "diagnostics": {
            **{name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in kept.items()},
            "curve": None if d.curve is None else [[count, one.to_dict()] for count, one in d.curve],
            "optima": [{"loss": o.loss, "converged": o.converged, "is_global": o.is_global} for o in d.optima],
        },
        "access": fit.advice.access.label,
        "names": list(fit.names),
        "support": fit.bijection.describe(),
        "seed": fit.seed,
    }


def tensors_of(family: Family, optima: tuple[Optimum, ...]) -> dict[str, Tensor]:
    """Return every optimum's parameters, under names such as ``0.loc``."""
    return {f"{i}.{name}": value for i, one in enumerate(optima) for name, value in family.parameters(one.model).items()}


def rebuilt_fit(saved: FitFields, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Any]:
    """Return the arguments of `Fit` that a saved one holds.

    Raises:
        ValueError: a value can't be that of a fit; the message names it.
    """
    names = saved["names"]
    unknown = [name for name in saved["findings"] if name not in FINDINGS]
    if unknown:
        raise ValueError(f"there is no finding `{unknown[0][:40]}`")
    if saved["seed"] < 0 or not names or len(set(names)) < len(names):
        raise ValueError("its seed or its names can't be those of a fit")
    optima = _optima(saved["diagnostics"]["optima"], tensors, family)
    model = optima[0].model
    bijection = Bijection(saved["support"], len(names))  # type: ignore[arg-type]
    shape = getattr(model, "event_shape", None)
    if shape is not None and not family.conditional and tuple(shape) not in ((bijection.free_dim,), ()):
        raise ValueError(f"its model has events of shape {tuple(shape)}, and it names {len(names)} columns")
    return {
        "model": carried(model, bijection),
        "family": family,
        "objective": objective_of(saved["objective"]),
        "solver": saved["solver"],
        "advice": replace(advise(Access.parse(saved["access"]), family), dim=len(names)),
        "value": saved["value"],
        "status": saved["status"],
        "findings": frozenset(saved["findings"]),
        "diagnostics": _diagnostics(saved["diagnostics"], optima),
        "names": names,
        "bijection": bijection,
        "seed": saved["seed"],
    }


def _diagnostics(d: Mapping[str, Any], optima: tuple[Optimum, ...]) -> Diagnostics:
    measured = {name: d[name] for name in _MEASURED if name in d}
    curve = d.get("curve")
    measured["curve"] = None if curve is None else tuple((int(count), Estimate.from_dict(one)) for count, one in curve)
    return Diagnostics(optima=optima, **measured)


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
        if any(name not in parameters or parameters[name].shape != again[name].shape for name in again if name in parameters):
            raise ValueError(f"the parameters of optimum {i} aren't those of `{family}`")
        found.append(Optimum(model, one["loss"], one["converged"], one["is_global"]))
    return tuple(found)
