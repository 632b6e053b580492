"""Fit: the result of `fit`: the model, its value, its findings, what can be computed from them, and how it is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from jaxtyping import Float
from torch import Tensor, nn

from whichkl._checks import IntegrityError, WhichklError
from whichkl.access import Access
from whichkl.advice import Advice, advise
from whichkl.diagnostics import FINDINGS, Diagnostics, carried, explain, shown_weights
from whichkl.diagnostics import linear_response as responses
from whichkl.divergences import Estimate
from whichkl.families import Family, family_from_config, family_of
from whichkl.families.family import check_parameters
from whichkl.files.saving import FORMAT, Saved
from whichkl.fitting.correction import Expectation, Weighted, check_draws, draw, expectation
from whichkl.fitting.correction import corrected as corrected_points
from whichkl.objectives import Objective, objective_of
from whichkl.process.torch_modes import plain_modes
from whichkl.samples import Reading
from whichkl.solvers import Optimum
from whichkl.targets import Target
from whichkl.targets.supports import Bijection

FIT = Saved("a fit", "fit.json", "model", "Fit again")
_DRAWS_FOR_CORRECTION = 10_000


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
    """What `fit.json` holds; fits of unconditional models of tables of numbers have no further fields."""

    context_names: tuple[str, ...]
    reading: Reading


@dataclass(frozen=True)
class Fit:
    """The result of `fit`."""

    model: Any
    """The fitted q, a `Distribution`: `log_prob`, `sample`, and `rsample` where it exists. Conditional: x ↦ `Distribution`."""
    family: Family
    objective: Objective
    solver: str
    advice: Advice
    value: Estimate
    """What was minimised, on draws that the fit hasn't seen, or exactly."""
    status: str
    """`converged` or `stopped`."""
    findings: frozenset[str]
    """Names from `diagnostics.FINDINGS`; `explanations` has a sentence for each, in the order of `sorted(findings)`."""
    diagnostics: Diagnostics
    names: tuple[str, ...]
    bijection: Bijection
    seed: int
    target: Target | None = None
    """What was fitted; None after `Fit.load`."""
    context_names: tuple[str, ...] = ()
    """The columns of x of a conditional fit."""
    reading: Reading = Reading()
    """How a table was read, with the labels of its categories; `score` reads rows in the same way."""

    @property
    def explanations(self) -> tuple[str, ...]:
        """A sentence with the next step for each of `sorted(findings)`."""
        return explain(self.findings, self.family, self.diagnostics)

    def __str__(self) -> str:
        """A few lines: what was minimised, how it ended, the value, the findings."""
        d = self.diagnostics
        lines = [f"{self.objective.spec} over {self.family} by {self.solver}: {self.status}", f"  {self.value}"]
        if d.elbo is not None:
            weights = ""
            if d.ess is not None and d.elbo.n is not None:
                tail = shown_weights(d.ess, d.khat, d.elbo.n)
                weights = f", importance ESS {d.ess:,.0f} of {d.elbo.n:,}, PSIS k̂ {tail}"
            lines.append(f"  ELBO {d.elbo.number} nats{weights}")
        if len(d.optima) > 1:
            lines.append(f"  {len(d.optima)} distinct optima, losses " + ", ".join(f"{one.loss:.4f}" for one in d.optima))
        lines += [f"  {one}" for one in (d.two_sample, d.calibration) if one is not None and one.p_value is not None]
        if d.missing_modes is not None and (d.missing_modes.found or d.missing_modes.reason):
            lines.append(f"  {d.missing_modes}")
        lines += [f"  {note}" for note in d.notes]
        lines += [f"  {name}: {text}" for name, text in zip(sorted(self.findings), self.explanations, strict=True)]
        return "\n".join(lines)

    @plain_modes()
    def draws(
        self, n: int = 1_000, *, corrected: bool = False, seed: int = 0, target: Target | None = None
    ) -> Float[Tensor, "n d"]:
        """Draw n points of q in the coordinates of the target, or, corrected, of p.

        Args:
            n: number of points.
            corrected: whether to resample draws of q by Pareto-smoothed importance weights, or, if k̂ is too large, to move
                particles from q to p (see `whichkl.fitting.correction.corrected`). Corrected points can repeat.
            seed: fixes the draws.
            target: what was fitted, for a loaded fit.

        Raises:
            InputError: the fit is conditional, or n isn't a whole number of at least 1.
            TargetError: there is no log density to correct by, or neither weights nor particles can be trusted.

        Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024); Dai, Heng, Jacob & Whiteley (2022).

        >>> from whichkl import fit
        >>> fit(Target(log_prob=lambda x: -x.square().sum(-1), dim=2)).draws(5, corrected=True).shape
        torch.Size([5, 2])
        """
        check_draws(self.model, self.names, n)
        return draw(self.model, self._weighted(max(_DRAWS_FOR_CORRECTION, n), seed, target) if corrected else None, n, seed)

    @plain_modes()
    def expect(
        self,
        f: Callable[[Tensor], Any],
        *,
        corrected: bool = True,
        n: int = _DRAWS_FOR_CORRECTION,
        seed: int = 0,
        target: Target | None = None,
    ) -> Expectation:
        """Return E f(x) with its standard error, under p, or under q.

        Args:
            f: (n, d) → (n,) or (n, k), of points in the coordinates of the target.
            corrected: whether the expectation is under p, by importance weights or particles as in `draws`.
            n: number of draws of q.
            seed: fixes the draws.
            target: what was fitted, for a loaded fit.

        Raises:
            InputError: the fit is conditional, f returns something else, or n isn't a whole number of at least 1.
            TargetError: there is no log density to correct by, or neither weights nor particles can be trusted.

        >>> from whichkl import fit
        >>> print(fit(Target(log_prob=lambda x: -(x - 1).square().sum(-1) / 2, dim=2)).expect(lambda x: x[:, 0]))
        0.999 ± 0.01 (importance weights, 10,000 of 10,000)
        """
        check_draws(self.model, self.names, n)
        weighted = self._weighted(n, seed, target) if corrected else None
        return expectation(f, draw(self.model, None, n, seed) if weighted is None else weighted.x, weighted)

    @plain_modes()
    def linear_response(
        self, columns: Sequence[int | str] | None = None, *, target: Target | None = None
    ) -> Float[Tensor, "k d"]:
        """Return rows of the covariance that a mean-field fit by reverse KL implies: the response of its means to a tilt of p.

        Mean field makes columns independent, and too narrow if they are correlated. Σ = [∇² (−ELBO)]⁻¹, in the rows and columns
        of the means, has their correlations and spreads: exactly for a Gaussian target, to first order for others.

        Args:
            columns: names or numbers of the rows; by default all, up to 500 dimensions.
            target: what was fitted, for a loaded fit.

        Returns:
            Rows of Σ in the order of `columns`, in the squared units of x; if the target has a support other than ℝᵈ, in free
            coordinates (those of `diagnostics.optima`), whose columns have only numbers unless there are d of them.

        Raises:
            InputError: it's another fit, a column isn't known, or all of more than 500 columns are requested.
            TargetError: there is no target, the fit isn't a minimum, or the equations can't be solved to nine digits.

        Source: Giordano, Broderick & Jordan (2018); Giordano, Ingram & Broderick (2024).

        >>> from whichkl import fit
        >>> tilted = Target(log_prob=lambda x: -(x[:, 0] ** 2 + x[:, 1] ** 2 - 1.2 * x[:, 0] * x[:, 1]) / 1.28, dim=2)
        >>> mean_field = fit(tilted, "gaussian:diagonal")
        >>> mean_field.model.variance, mean_field.linear_response(["x1"])
        (tensor([0.6400, 0.6400], dtype=torch.float64), tensor([[1.0000, 0.6000]], dtype=torch.float64))
        """
        p = self.target if target is None else Target.of(target)
        return responses(p, self.family, self.objective, self.diagnostics, columns, self.seed)

    def _weighted(self, n: int, seed: int, target: Target | None) -> Weighted:
        p = self.target if target is None else Target.of(target)
        misses_modes = "modes_missing" in self.findings or self.diagnostics.leaves_optima_out
        return corrected_points(p, self.model, n, seed, misses_modes=misses_modes)

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the parameters, as JSON can hold it."""
        return {
            "format": FORMAT,
            "family": self.family.config(),
            "objective": self.objective.spec,
            "solver": self.solver,
            "status": self.status,
            "findings": sorted(self.findings),
            "explanations": list(self.explanations),
            "value": self.value.to_dict(),
            "diagnostics": self.diagnostics.to_dict(),
            "access": self.advice.access.label,
            "names": list(self.names),
            "support": self.bijection.describe(),
            "seed": self.seed,
            **({"context_names": list(self.context_names)} if self.context_names else {}),
            **({} if self.reading.is_default else {"reading": asdict(self.reading)}),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `fit.json` and the weights that it names (every optimum's parameters, in free coordinates).

        An earlier fit in that folder is replaced in one step, when the new `fit.json` gets its name. If the process is killed
        before, the earlier fit is unchanged. Processes that save into one folder wait for each other.

        Raises:
            InputError: the folder holds anything but a fit.
            ResourceError: it can't be written.
        """
        FIT.write(Path(folder), self.files())

    @plain_modes()
    def files(self) -> dict[str, bytes]:
        """Return the files that `save` writes: the weights, and `fit.json`, which names them."""
        models = [one.model for one in self.diagnostics.optima]
        tensors = {f"{i}.{name}": part for i, one in enumerate(models) for name, part in self.family.parameters(one).items()}
        return FIT.files(self.to_dict(), tensors)

    @classmethod
    @plain_modes()
    def load(cls, folder: str | os.PathLike[str], family: Family | nn.Module | None = None) -> Fit:
        """Read a saved fit.

        Args:
            folder: what `save` was given.
            family: the family or the module, if it isn't one of this library.

        Raises:
            InputError: there is no fit in that folder.
            IntegrityError: a file was changed, cut short, or written by a newer version, or holds impossible values.
            ResourceError: a file can't be read.
        """
        path = Path(folder)
        fields, tensors = FIT.read(path, FitFields)
        is_given = family is not None or fields["family"].get("family") == "Module"
        try:
            chosen = family_from_config(fields["family"]) if family is None else family_of(family)
            return cls(**_rebuilt(fields, tensors, chosen))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, IntegrityError) or (is_given and isinstance(error, WhichklError)):
                raise
            raise FIT.damaged(path, " ".join(str(error).split())[:300]) from error


def read_fit(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Read a saved fit and check its fields, without building its models."""
    fields, tensors = FIT.read(folder, FitFields)
    try:
        Diagnostics.from_dict(fields["diagnostics"], ())
    except ValueError as error:
        raise FIT.damaged(folder, str(error)) from error
    return fields, tensors


def _rebuilt(fields: FitFields, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Any]:
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
        "advice": replace(advise(Access.parse(fields["access"]), family), dim=len(names)),
        "value": fields["value"],
        "status": fields["status"],
        "findings": frozenset(fields["findings"]),
        "diagnostics": Diagnostics.from_dict(fields["diagnostics"], optima),
        "names": names,
        "bijection": bijection,
        "seed": fields["seed"],
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
        if any(name not in parameters or parameters[name].shape != again[name].shape for name in again if name in parameters):
            raise ValueError(f"the parameters of optimum {i} aren't those of `{family}`")
        found.append(Optimum(model, one["loss"], one["converged"], one["is_global"]))
    return tuple(found)
