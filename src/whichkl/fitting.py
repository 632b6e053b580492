"""fit: target, family, objective → the model, how well it does, and what to do next."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.distributions import Distribution

from whichkl._checks import InputError, IntegrityError, TargetError, WhichklError, cannot, plain, write_whole
from whichkl.access import Access
from whichkl.advice import Advice, advise
from whichkl.diagnostics import Diagnostics, explain, judge, model_target, shown_khat
from whichkl.divergences import Estimate
from whichkl.families import Family, Gaussian, family_from_config
from whichkl.families.family import cast
from whichkl.objectives import OBJECTIVES, Objective, objective_of
from whichkl.solvers import Optimum, Solver, solver_for
from whichkl.supports import Bijection
from whichkl.targets import Target

_FORMAT = 1


@dataclass(frozen=True)
class Fit:
    """The result of `fit`."""

    model: Distribution
    """The fitted q: `log_prob`, `sample`, and `rsample` where it exists."""
    family: Family
    objective: Objective
    solver: str
    advice: Advice
    value: Estimate
    """What was minimised, on draws that the fit hasn't seen, or exactly."""
    status: str
    """`converged` or `stopped`."""
    findings: frozenset[str]
    """Names from `diagnostics.FINDINGS`; `explanations` has the sentences."""
    diagnostics: Diagnostics
    names: tuple[str, ...]
    bijection: Bijection
    seed: int
    target: Target | None = None
    """What was fitted; None after `Fit.load`."""

    @property
    def explanations(self) -> tuple[str, ...]:
        """A sentence with the next step for each finding."""
        return explain(self.findings, self.family, self.diagnostics)

    def __str__(self) -> str:
        """A few lines: what was minimised, how it ended, the value, the findings."""
        d = self.diagnostics
        lines = [f"{self.objective.name} over {self.family} by {self.solver}: {self.status}", f"  {self.value}"]
        if d.elbo is not None:
            lines.append(f"  ELBO {d.elbo.number} nats, importance ESS {d.ess:,.0f} of {d.elbo.n:,}, PSIS k̂ {shown_khat(d.khat)}")
        if len(d.optima) > 1:
            lines.append(f"  {len(d.optima)} distinct optima, losses " + ", ".join(f"{one.loss:.4f}" for one in d.optima))
        return "\n".join(
            lines + [f"  {name}: {text}" for name, text in zip(sorted(self.findings), self.explanations, strict=True)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the parameters as JSON can hold it."""
        d = self.diagnostics
        return {
            "format": _FORMAT,
            "family": self.family.config(),
            "objective": self.objective.name,
            "solver": self.solver,
            "status": self.status,
            "findings": sorted(self.findings),
            "explanations": list(self.explanations),
            "value": self.value.to_dict(),
            "diagnostics": {
                **{name: getattr(d, name) for name in _NUMBERS},
                **{name: None if getattr(d, name) is None else getattr(d, name).to_dict() for name in _ESTIMATES},
                "optima": [{"loss": o.loss, "converged": o.converged, "is_global": o.is_global} for o in d.optima],
            },
            "access": self.advice.access.label,
            "names": list(self.names),
            "support": self.bijection.describe(),
            "seed": self.seed,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `fit.json` and the weights that it names (every optimum's parameters, in free coordinates).

        An earlier fit in that folder is replaced in one step, when the new `fit.json` is renamed into its place; killed
        before, it stays as it was.

        Raises:
            InputError: the folder holds something other than a fit.
            ResourceError: it can't be written.
        """
        path = Path(folder)
        if path.is_dir() and any(not _ours(one.name) for one in path.iterdir()):
            raise InputError(cannot(f"save a fit in `{path}`", "it holds something else", "Name a new or empty folder"))
        tensors = {
            f"{i}.{name}": value.detach().cpu().contiguous()
            for i, optimum in enumerate(self.diagnostics.optima)
            for name, value in self.family.parameters(optimum.model).items()
        }
        weights = save(tensors)
        digest = hashlib.sha256(weights).hexdigest()
        name = f"model-{digest[:16]}.safetensors"
        fields = {**plain(self.to_dict()), "weights": name, "sha256": digest}
        text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1, allow_nan=False)
        write_whole(path / name, weights)
        write_whole(path / "fit.json", text.encode())
        for one in path.iterdir():
            if one.name not in ("fit.json", name):
                one.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], family: Family | None = None) -> Fit:
        """Read a saved fit.

        Args:
            folder: what `save` was given.
            family: the family, where it isn't one of this library's.

        Raises:
            InputError: there is no fit in that folder.
            IntegrityError: a file was changed, cut short, or written by a newer version.
        """
        path = Path(folder)
        try:
            fields = json.loads((path / "fit.json").read_bytes())
            if fields["format"] > _FORMAT:
                raise IntegrityError(cannot(f"load `{path}`", "a newer version wrote it", "Upgrade whichkl"))
            if not _ours(fields["weights"]):
                raise KeyError("weights")
            if _checksum(fields) != fields["checksum"]:
                raise IntegrityError(cannot(f"load `{path}`", "fit.json isn't what was saved (its checksum differs)", "Fit anew"))
            weights = (path / fields["weights"]).read_bytes()
            if hashlib.sha256(weights).hexdigest() != fields["sha256"]:
                because = f"{fields['weights']} isn't what was saved (SHA-256 differs)"
                raise IntegrityError(cannot(f"load `{path}`", because, "Fit anew"))
            return _rebuild(fields, load(weights), family or family_from_config(fields["family"]))
        except FileNotFoundError as error:
            raise InputError(cannot(f"load a fit from `{path}`", f"`{error.filename}` is missing", "Correct the path")) from error
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, WhichklError):
                raise
            because = f"fit.json isn't what was saved ({type(error).__name__}: {error})"
            raise IntegrityError(cannot(f"load `{path}`", because, "Fit anew")) from error


def fit(
    target: Any,
    family: Family | None = None,
    *,
    objective: Objective | str | None = None,
    solver: Solver | str | None = None,
    seed: int = 0,
) -> Fit:
    """Fit a family to a target by the objective that its access allows.

    Args:
        target: a `Target`, or anything that `Target.of` takes.
        family: which models are allowed; a full Gaussian unless said.
        objective: an objective or its name; unless said, the only possible one, and forward KL where both are.
        solver: a solver or its name; the best for the job unless said.
        seed: fixes every random choice; the same seed gives the same fit.

    Raises:
        InputError: samples or arguments are bad.
        TargetError: the target can't do what the objective requires, or its log density is broken.

    >>> result = fit(Target(log_prob=lambda x: -(x - 1).square().sum(-1), dim=2))
    >>> result.objective.name, result.status
    ('reverse_kl', 'converged')
    >>> [round(m, 6) for m in result.model.mean.tolist()]
    [1.0, 1.0]
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(cannot(f"use `seed={seed!r}`", "it isn't a whole number of at least 0", "Give, say, seed=0"))
    p = Target.of(target)
    family = _check_family(family)
    _check_pairs(p, family)
    advice = advise(p, family)
    chosen = _choose(objective, advice)
    engine = solver_for(chosen, family, p.access, solver)
    free = p.unconstrained()
    if free.samples is not None:
        family.check_samples(free.samples, p.names)
    solution = engine.solve(free, family, seed)
    model = p.bijection.wrap(cast(family, solution.best.model, p.dtype, p.device))
    q = model_target(model, p)
    judgement = judge(p, family, chosen, engine, solution, q, seed)
    return Fit(
        model=model,
        family=family,
        objective=chosen,
        solver=engine.name,
        advice=advice,
        value=judgement.value,
        status=judgement.status,
        findings=judgement.findings,
        diagnostics=judgement.diagnostics,
        names=p.names,
        bijection=p.bijection,
        seed=seed,
        target=p,
    )


def _check_family(family: Any) -> Family:
    if family is None:
        return Gaussian()
    if isinstance(family, Family):
        return family
    because = f"it is a `{type(family).__name__}`, and this version fits {', '.join(Family.kinds)}"
    raise InputError(cannot("fit this family", because, "Use, say, whichkl.families.Gaussian()"))


def _check_pairs(target: Target, family: Family) -> None:
    """Refuse pairs (x, y) for a family of one distribution, and single rows for a conditional one."""
    if target.context is not None and not family.conditional:
        because = "its samples are pairs (x, y), and this family is one distribution, not q(y|x)"
        raise InputError(
            cannot(f"fit `{family}` to this conditional target", because, "Use a conditional family, or pass y alone")
        )
    if target.context is None and family.conditional and not family.optional_context:
        because = "it models y given x, and the samples aren't pairs"
        raise InputError(cannot(f"fit `{family}` to this target", because, "Pass `samples=(x, y)`"))


def _choose(objective: Objective | str | None, advice: Advice) -> Objective:
    """The wanted objective if the access allows it, else the advised one."""
    if objective is None:
        if advice.best is None:
            do, because = "fit this target", f"{advice.situation[0].lower()}{advice.situation[1:-1]}"
            raise TargetError(cannot(do, because, "See `whichkl.advise(target)` for what could be converted"))
        return advice.best.objective
    wanted = objective_of(objective)
    if not wanted.requires.met_by(advice.access):
        because = f"it requires {wanted.requires.label}, but the target only has {advice.access.label}"
        able = f"Use `{type(advice.best.objective).__name__}`, or pass" if advice.best else "Pass"
        words = {word for one in wanted.requires.alternatives for word in one.label.split(", ")}
        instead = f"{able} {' or '.join(f'`{word}=`' for word in sorted(words))}"
        raise TargetError(cannot(f"use `{type(wanted).__name__}` with this target", because, instead))
    return wanted


_NUMBERS = ("iterations", "residual", "nodes", "node_error", "ess", "khat", "least_kl", "separate", "evaluations")
_ESTIMATES = ("elbo", "held_out", "richer_gain", "simpler_gain")


def _rebuild(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], family: Family) -> Fit:
    d = fields["diagnostics"]
    optima = []
    for i, one in enumerate(d["optima"]):
        parameters = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.split(".", 1)[0] == str(i)}
        optima.append(Optimum(family.model(parameters), one["loss"], one["converged"], one["is_global"]))
    numbers: dict[str, Any] = {name: float(d[name]) if isinstance(d[name], str) else d[name] for name in _NUMBERS}
    estimates: dict[str, Any] = {name: None if d[name] is None else Estimate.from_dict(d[name]) for name in _ESTIMATES}
    bijection = Bijection(fields["support"], len(fields["names"]))
    best = optima[0].model
    return Fit(
        model=bijection.wrap(best),
        family=family,
        objective=OBJECTIVES[fields["objective"]],
        solver=fields["solver"],
        advice=replace(advise(Access.parse(fields["access"]), family), dim=len(fields["names"])),
        value=Estimate.from_dict(fields["value"]),
        status=fields["status"],
        findings=frozenset(fields["findings"]),
        diagnostics=Diagnostics(optima=tuple(optima), **numbers, **estimates),
        names=tuple(fields["names"]),
        bijection=bijection,
        seed=fields["seed"],
    )


def _checksum(fields: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in fit.json."""
    rest = {key: value for key, value in fields.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _ours(name: str) -> bool:
    """Whether a file in a fit's folder is one that `save` writes (also half-written ones, left by a kill)."""
    return name == "fit.json" or re.fullmatch(r"model-[0-9a-f]{16}\.safetensors|\.(fit|model)[^/]*", name) is not None
