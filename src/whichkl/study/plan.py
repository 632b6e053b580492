"""Plan: the families, objectives, metrics and seeds of a study, resolved to objects, and its cells; also of distillations."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from itertools import product
from typing import Any

from torch import nn

from whichkl._checks import InputError, TargetError, as_int, as_number, cannot, plain
from whichkl.advice import advise, default_family
from whichkl.distillation.teacher_target import Student, TeacherTarget, student_identity
from whichkl.families import Family, family_of
from whichkl.families.named import named_families
from whichkl.fitting.run import with_categories
from whichkl.objectives import Objective, objective_of
from whichkl.process.memory import check_memory
from whichkl.solvers.rows.rows import rows_of
from whichkl.study.measures import MEASURES, NEEDS_OF_STUDENTS, RESERVED
from whichkl.targets import Target
from whichkl.targets.fingerprint import code_version, target_fingerprint, tensor_hash

FORMAT = 1
_MAX_BYTES_IN_MEMORY = 2**30
_COPIES = 2
"""Draws of p and draws of q are in memory at the same time."""
_MAX_SEEDS = 100_000
"""Largest number of seeds: all cells are held in memory, a kilobyte each."""
_FIELDS_OF_CELLS = ("budget", "metrics", "held_out", "draws", "files")
"""Fields of a study's configuration that the configuration of each of its cells has too."""
Metric = Callable[..., Any]


@dataclass(frozen=True)
class Cell:
    """One fit of a study: an arm and a seed."""

    family: int
    """The number of its family in the plan."""
    objective: int
    seed: int
    names: tuple[str, str]
    """Its family and its objective as text."""
    config: dict[str, Any]

    @property
    def arm(self) -> str:
        """Its family and objective as one text."""
        return " · ".join(self.names)

    @cached_property
    def key(self) -> str:
        """SHA-256 of its configuration, which names its folder."""
        return config_hash(self.config)


@dataclass(frozen=True)
class Plan:
    """A study, resolved. `plan_of` makes one and checks it."""

    target: Target
    source: str
    """Name of the target in tables and pages."""
    families: tuple[Family, ...]
    objectives: tuple[Objective, ...]
    seeds: tuple[int, ...]
    budget: int | None
    """Evaluations of the target that a solver may use; None for no limit."""
    measures: tuple[str, ...]
    """Names of `MEASURES` that are computed."""
    metrics: dict[str, Metric]
    """The user's own, by name."""
    held_out: float
    """Share of fixed samples that no fit sees."""
    draws: int
    """Fresh draws on which cells are scored."""
    codes: dict[str, str]
    """Hashes of the user's files, by the names that the user gave them."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything on which a number depends, as JSON holds it."""
        target = {"source": self.source, **target_fingerprint(self.target)}
        families = [family_config(one) for one in self.families]
        own = (self.budget, [*self.measures, *self.metrics], self.held_out, self.draws, self.codes)
        config = study_config(target, families, [one.spec for one in self.objectives], self.seeds)
        return config | dict(zip(_FIELDS_OF_CELLS, own, strict=True))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed, since those of one seed share their held-out draws."""
        return cells_of(self.config, [family_text(one) for one in self.families], _FIELDS_OF_CELLS)


def study_config(target: dict[str, Any], families: list[Any], objectives: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Return the part of a configuration that all studies have."""
    config = {"format": FORMAT, "code": code_version(), "target": target, "families": families}
    return {**config, "objectives": list(objectives), "seeds": list(seeds)}


def cells_of(config: dict[str, Any], families: Sequence[str], further: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Return all cells of a study, seed by seed; `further` names fields of the study that each cell's configuration has too."""
    shared = {name: config[name] for name in ("format", "code", "target", *further)}
    found = []
    for seed, (i, family), (j, objective) in product(config["seeds"], enumerate(families), enumerate(config["objectives"])):
        one = {**shared, "family": config["families"][i], "objective": objective, "seed": seed}
        found.append(Cell(i, j, seed, (family, objective), one))
    return tuple(found)


def plan_of(
    target: Any,
    families: Any = None,
    objectives: Any = None,
    seeds: int | Sequence[int] = 10,
    budget: int | None = None,
    metrics: Sequence[str | Metric] | None = None,
    *,
    held_out: float = 0.2,
    draws: int = 10_000,
    source: str | None = None,
    codes: dict[str, str] | None = None,
) -> Plan:
    """Resolve names, and refuse what can't be compared."""
    given = Target.of(target)
    p = in_memory(given).noting_repeats()
    chosen = tuple(with_categories(given, one) for one in _families(given, families))
    wanted = _objectives(p, chosen[0], objectives)
    measures, own = _metrics(metrics)
    held_out, draws, budget = as_number(held_out), as_int(draws), as_int(budget)
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0.01 <= held_out <= 0.9:
        raise InputError(cannot(f"use `held_out={held_out!r}`", "it isn't between 0.01 and 0.9", "Correct it"))
    _check_count("draws", draws, 100)
    if budget is not None:
        _check_count("budget", budget, 1)
    check_memory(_COPIES * 8 * draws * p.dim, f"score on `draws={draws}`", "Give, say, 10,000")
    name = source or (target if isinstance(target, str) else type(target).__name__)
    numbers = seeds_of(seeds)
    return Plan(p, name, chosen, wanted, numbers, budget, measures, own, float(held_out), draws, codes or {})


def _families(p: Target, families: Any) -> tuple[Family, ...]:
    """Return the families, the one that `fit` takes by default; refuse those of another kind than the target."""
    chosen = distinct([default_family(p)] if families is None else [family_of(one) for one in listed(families)], family_text)
    for family in chosen:
        if bool(p.context_names) != family.conditional and not (family.conditional and family.optional_context):
            what = "pairs (x, y)" if p.context_names else "single rows"
            because = f"`{family_text(family)}` {'models y given x' if family.conditional else 'is one distribution'}"
            raise InputError(cannot(f"compare on {what}", because, "Name families of the same kind as the target"))
    return chosen


def _objectives(p: Target, family: Family, objectives: Any) -> tuple[Objective, ...]:
    """Return the objectives, both directions of KL by default; refuse those whose requirements the target doesn't meet."""
    access = p.access
    if objectives is None:
        wanted = [one.objective for one in advise(p, family).options if one.objective.name in ("forward_kl", "reverse_kl")]
    else:
        wanted = [objective_of(one) for one in listed(objectives)]
    for one in wanted:
        if not one.requires.met_by(access):
            because = f"it requires {one.requires.label}, but the target only has {access.label}"
            instead = "Leave it out, or give the target more access"
            raise TargetError(cannot(f"compare `{one.spec}` on this target", because, instead))
    if not wanted:
        raise TargetError(cannot("compare on this target", f"it has {access.label}", "See `whichkl.advise(target)`"))
    return distinct(wanted, lambda one: one.spec)


def seeds_of(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds that a number of them, or a list, means.

    >>> seeds_of(3), seeds_of([4, 7])
    ((0, 1, 2), (4, 7))
    """
    seeds = as_int(seeds)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        if seeds > _MAX_SEEDS:
            raise InputError(cannot(f"use `seeds={seeds}`", f"the largest number is {_MAX_SEEDS:,}", "Give, say, 10"))
        return tuple(range(seeds))
    several: Any = seeds
    is_list = isinstance(several, (list, tuple, range, set)) or getattr(several, "ndim", 0) == 1
    listed_ = list(map(as_int, several)) if is_list else []
    if not listed_ or any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in listed_):
        because = "it is neither a number of seeds nor a list of whole numbers of at least 0"
        raise InputError(cannot(f"use `seeds={seeds!r}`", because, "Give, say, 10"))
    if len(set(listed_)) < len(listed_):
        raise InputError(cannot(f"use `seeds={seeds!r}`", "one is in it twice, which adds no evidence", "Name each once"))
    return tuple(listed_)


def family_text(family: Family) -> str:
    """Return a family as text in the grammar of names, where it has one, such as ``"mixture:3:diagonal"``.

    >>> from whichkl.families import Gaussian, Mixture
    >>> family_text(Gaussian()), family_text(Mixture(3, "diagonal"))
    ('gaussian', 'mixture:3:diagonal')
    """
    name = next((text for text, kind in named_families().items() if type(family) is kind), None)
    values = [(getattr(family, one.name), one) for one in fields(family)] if name else []  # type: ignore[arg-type]
    while values and values[-1][0] == _default(values[-1][1]):
        values.pop()
    texts = [",".join(map(str, value)) if isinstance(value, tuple) else str(value) for value, _ in values]
    return ":".join([name, *texts]) if name and all(text and ":" not in text for text in texts) else repr(family)


def family_config(family: Family) -> dict[str, Any]:
    """Return a family's fields, or a module and the hashes of its weights, as JSON holds them."""
    module = getattr(family, "module", None)
    if isinstance(module, nn.Module):
        weights = {name: tensor_hash(value) for name, value in module.state_dict().items()}
        return {"family": type(family).__name__, "module": repr(module), "weights": weights}
    config: dict[str, Any] = json.loads(json.dumps(plain(family.config()), default=str))
    return config


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 of a configuration, its keys in order."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True, allow_nan=False).encode()).hexdigest()


def in_memory(target: Target) -> Target:
    """Return a target whose samples are in memory, since each seed holds out other rows."""
    stream = target.stream
    if stream is None:
        return target
    if stream.bytes_in_memory > _MAX_BYTES_IN_MEMORY:
        because = "its rows would take more than a gigabyte, and each seed holds out others of them"
        raise InputError(cannot("compare on this stream", because, "Compare on a sample of it, and fit the winner on all"))
    block = rows_of(target, 0).gather()
    y: Any = block.x[:, 0] if target.scalar else block.x
    weights = block.w if bool((block.w != block.w[0]).any()) else None
    samples = y if block.context is None else (block.context, y)
    return Target(samples=samples, weights=weights, names=target.names, support=target.bijection.constraints)


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING


def listed(values: Any) -> list[Any]:
    """Return a list: a single value becomes a list of one."""
    return list(values) if isinstance(values, (list, tuple)) else [values]


def distinct(values: Sequence[Any], text: Callable[[Any], str]) -> tuple[Any, ...]:
    """Return the values; refuse an empty list, and a value whose text is in it twice."""
    if not values:
        raise InputError(cannot("compare nothing", "the list is empty", "Name at least one"))
    for one, count in Counter(text(one) for one in values).items():
        if count > 1:
            raise InputError(cannot(f"compare `{one}` with itself", "it is in the list twice", "Name each once"))
    return tuple(values)


def _metrics(metrics: Sequence[str | Metric] | None) -> tuple[tuple[str, ...], dict[str, Metric]]:
    """Separate names of the scorecard from the user's own functions."""
    if metrics is None:
        return tuple(MEASURES), {}
    names: list[str] = []
    own: dict[str, Metric] = {}
    for one in listed(metrics):
        if callable(one):
            add_metric(own, one)
        else:
            names.append(measure_named(one))
    return tuple(names) if names else tuple(MEASURES), own


def measure_named(name: str) -> str:
    """Return the name of a measure of the scorecard."""
    if not isinstance(name, str) or name not in MEASURES:
        known = f"{', '.join(MEASURES)}, or a function; in a file or on the command line FILE.py:FUNCTION"
        raise InputError(cannot(f"measure `{name}`", "there is no such metric", f"Choose among {known}"))
    return name


def add_metric(own: dict[str, Metric], metric: Metric) -> None:
    """Add a function of the user's own to those already named; its `__name__` is the name of its column."""
    name = getattr(metric, "__name__", "metric")
    if name in RESERVED:
        because = f"a column of every study has the name `{name}`, and the metric would overwrite it"
        raise InputError(cannot(f"measure by {_described(name, metric)}", because, "Rename the function"))
    if name in own:
        because = f"it has the name of {_described(name, own[name])}, and both would fill one column"
        raise InputError(cannot(f"measure by {_described(name, metric)}", because, "Rename one of them"))
    own[name] = metric


def _described(name: str, metric: Metric) -> str:
    """The name of a metric and, where Python knows it, the file and line of its code."""
    code = getattr(metric, "__code__", None)
    return f"`{name}`" if code is None else f"`{name}` ({code.co_filename}, line {code.co_firstlineno})"


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(cannot(f"use `{name}={value!r}`", f"it isn't a whole number of at least {least}", "Correct it"))


@dataclass(frozen=True)
class DistillationPlan:
    """A study of distillations, resolved."""

    target: TeacherTarget
    students: dict[str, Student]
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything on which a number depends, as JSON holds it."""
        target = {"source": self.target.source, **self.target.identity}
        students = [student_identity(name, one) for name, one in self.students.items()]
        measures = [need.columns[0] for need in NEEDS_OF_STUDENTS[self.target.source]]
        own = {"budget": self.target.budget, "metrics": measures}
        return study_config(target, students, self.objectives, self.seeds) | own

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed."""
        return cells_of(self.config, list(self.students))


def distillation_plan_of(target: TeacherTarget, students: Any, objectives: Any, seeds: int | Sequence[int]) -> DistillationPlan:
    """Resolve names, and refuse what can't be compared."""
    named: Mapping[str, Any] = students if isinstance(students, Mapping) else {"student": students}
    for name, one in named.items():
        if not (isinstance(one, nn.Module) or callable(one)) or not isinstance(name, str):
            instead = "Give families={name: module, or a function that makes one}"
            raise InputError(cannot("compare these students", f"`{name}` is a `{type(one).__name__}`", instead))
    wanted = ["forward_kl", "reverse_kl"] if objectives is None else listed(objectives)
    specs = distinct([target.name_of(one) for one in wanted], str)
    distinct(list(named), str)
    return DistillationPlan(target, dict(named), specs, seeds_of(seeds))


AnyPlan = Plan | DistillationPlan
