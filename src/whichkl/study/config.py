"""Config: a study in a YAML file, checked field by field, with the line of whatever is wrong."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from whichkl import problems
from whichkl._checks import InputError, WhichklError, cannot
from whichkl.families import family_of
from whichkl.files.yaml_file import read_yaml
from whichkl.objectives import objective_of
from whichkl.problems.named import looks_named, named
from whichkl.study.plan import AnyPlan, Metric, add_metric, measure_named, plan_of, seeds_of
from whichkl.study.students import read_student_plan
from whichkl.targets import Target
from whichkl.user_code import call_user, load_function, looks_like_code

_FUNCTIONS = ("log_prob", "sampler", "score", "energy")
_READING = ("columns", "drop", "missing", "thousands", "categories")
_MAX_MISTAKES = 20
"""Largest number of mistakes that one message names."""
_PROBLEMS = tuple(name for name in problems.__all__ if name[0].islower() and name != "named")


def _check_problem(value: str) -> str:
    if value not in _PROBLEMS and not looks_named(value):
        raise ValueError(f"there is no such problem; choose among {', '.join(_PROBLEMS)}, or write, say, Normal(0, 1)")
    return value


def _check_metric(value: str) -> str:
    return value if looks_like_code(value) else measure_named(value)


def _checked_by(function: Callable[[Any], Any]) -> AfterValidator:
    """Have a value checked by a function that reads it, and keep it as it is."""
    return AfterValidator(lambda value: (function(value), value)[1])


def _target_fields(value: Any) -> Any:
    """Return the fields of a target written as one text: FILE.py:FUNCTION that makes it, a problem, or a file of samples."""
    if not isinstance(value, str):
        return value
    if looks_like_code(value):
        return {"make": value}
    return {"problem": value} if value in _PROBLEMS or looks_named(value) else {"samples": value}


_Count = Annotated[int, Field(ge=1)]
_AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TargetConfig(_Strict):
    """The target: a problem by its name, or the arguments of `Target`, with functions as FILE.py:FUNCTION."""

    problem: Annotated[str, AfterValidator(_check_problem)] | None = None
    """A name in `whichkl.problems`, with `arguments`; or a distribution such as ``Normal(0, 1)``."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    make: str | None = None
    """FILE.py:FUNCTION, which takes nothing and returns a `Target`, or what `Target.of` takes."""
    samples: str | list[str] | None = None
    log_prob: str | None = None
    sampler: str | None = None
    score: str | None = None
    energy: str | None = None
    dim: _Count | None = None
    support: str | dict[str, str] | None = None
    columns: list[str] | None = None
    drop: list[str] = Field(default_factory=list)
    missing: Literal["refuse", "drop"] = "refuse"
    thousands: str | None = None
    categories: list[str] = Field(default_factory=list)
    normalized: bool = False
    chains: _Count | None = None
    given: list[str] | None = None
    batched: bool = True

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        target_arguments = [getattr(self, name) for name in ("samples", *_FUNCTIONS)]
        ways = [self.problem, self.make, any(one is not None for one in target_arguments) or None]
        if sum(one is not None for one in ways) != 1:
            raise ValueError("give one of `problem`, `make`, or the arguments of a target (`samples`, `log_prob`, …)")
        if self.arguments and not self.problem:
            raise ValueError("`arguments` belong to a `problem`")
        return self


class StudyConfig(_Strict):
    """A study: see `compare` for what the fields mean."""

    target: Annotated[TargetConfig, BeforeValidator(_target_fields)]
    families: Annotated[list[Annotated[str, _checked_by(family_of)]] | None, _AsList] = None
    objectives: Annotated[list[Annotated[str, _checked_by(objective_of)]] | None, _AsList] = None
    seeds: Annotated[int | list[int], _checked_by(seeds_of)] = 10
    budget: _Count | None = None
    metrics: Annotated[list[Annotated[str, AfterValidator(_check_metric)]] | None, _AsList] = None
    held_out: Annotated[float, Field(ge=0.01, le=0.9)] = 0.2
    draws: Annotated[int, Field(ge=100)] = 10_000


def read_plan(path: Path) -> AnyPlan:
    """Read a study's YAML file, of fits or of students; relative paths in it start at its folder."""
    file = read_yaml(path, "target: bimodal")
    if "teacher" in file.values or "student" in file.values:
        return read_student_plan(path)
    try:
        config = StudyConfig.model_validate(file.values)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        found = sorted({(file.line_of(one["loc"]), _place(one["loc"]), _message(one)) for one in wrong[:_MAX_MISTAKES]})
        said = "; ".join(f"line {line}{f', `{place}`' if place else ''}: {message}" for line, place, message in found)
        more = f"; and {len(wrong) - _MAX_MISTAKES:,} more" if len(wrong) > _MAX_MISTAKES else ""
        raise InputError(cannot(f"read `{path}`", said + more, "Correct the file, and run it again")) from error
    folder, codes = path.parent, dict[str, str]()
    with file.naming("target"):
        target, source = _target(config.target, folder, codes)
    metrics: list[Any] | None = None if config.metrics is None else []
    own: dict[str, Metric] = {}
    for i, name in enumerate(config.metrics or ()):
        with file.naming("metrics", i):
            metric = _function(name, folder, codes) if looks_like_code(name) else name
            if callable(metric):
                add_metric(own, metric)
            metrics.append(metric)  # type: ignore[union-attr]
    with file.naming("objectives"):
        asked = config.model_dump(exclude={"target", "metrics"})
        return plan_of(target, **asked, metrics=metrics, source=source, codes=codes)


def _target(config: TargetConfig, folder: Path, codes: dict[str, str]) -> tuple[Target, str]:
    """Open the target, and return it with its name."""
    if config.problem is not None:
        if config.problem not in _PROBLEMS:
            return Target.of(named(config.problem)), config.problem
        said = ", ".join(f"{name}={value}" for name, value in config.arguments.items())
        source = f"{config.problem}({said})" if said else config.problem
        arguments = {name: _path(value, folder) if name == "folder" else value for name, value in config.arguments.items()}
        try:
            return Target.of(getattr(problems, config.problem)(**arguments)), source
        except WhichklError:
            raise
        except Exception as error:  # whatever torch makes of numbers that nobody meant
            takes = ", ".join(f"`{name}`" for name in inspect.signature(getattr(problems, config.problem)).parameters)
            instead = f"It takes {takes}" if takes else "It takes none"
            raise InputError(cannot(f"make the problem `{source}`", str(error)[:200], instead)) from error
    if config.make is not None:
        function = _function(config.make, folder, codes)
        instead = "Write a function that takes nothing and returns a Target; name a log density under `log_prob:`"
        return Target.of(call_user(function, f"make a target by `{config.make}`", instead)), config.make
    samples: Any = config.samples
    if isinstance(samples, str) and not Path(samples).suffix and not os.path.exists(folder / samples):
        near = get_close_matches(samples, _PROBLEMS, 1)
        meant = f"Did you mean `{near[0]}`? " if near else ""
        because = "it's neither a problem of that name nor a file or folder next to the study"
        instead = f"{meant}Problems are {', '.join(_PROBLEMS)}; files are .csv, .parquet, .arrow or .npy"
        raise InputError(cannot(f"use the target `{samples}`", because, instead))
    if samples is not None:
        samples = _path(samples, folder) if isinstance(samples, str) else [_path(one, folder) for one in samples]
    functions = {name: getattr(config, name) for name in _FUNCTIONS if getattr(config, name) is not None}
    called = {name: _function(place, folder, codes) for name, place in functions.items()}
    asked = config.model_dump(include={"dim", "support", "normalized", "chains", "given", "batched", *_READING})
    target = Target(samples=samples, **asked, **called)
    shown = [config.samples if isinstance(config.samples, str) else f"{len(config.samples)} files"] if config.samples else []
    return target, ", ".join([*shown, *functions.values()])


def _function(place: str, folder: Path, codes: dict[str, str]) -> Any:
    function = load_function(place, place, folder)
    path = place.rpartition(":")[0]
    codes[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()[:16]
    return function


def _path(value: Any, folder: Path) -> Any:
    return str(folder / value) if isinstance(value, str) else value


def _message(error: Any) -> str:
    """Return the error of a field, in plain words where pydantic's are about code."""
    if error["type"] == "extra_forbidden":
        known = TargetConfig.model_fields if error["loc"][0] == "target" else StudyConfig.model_fields
        near = get_close_matches(str(error["loc"][-1]), known, 1)
        return "there is no such field" + (f" (did you mean `{near[0]}`?)" if near else f"; there are {', '.join(known)}")
    if error["type"] == "missing":
        return "it's missing"
    if error["loc"][:1] == ("seeds",) and error["type"] in ("int_type", "list_type"):
        return "it's neither a whole number nor a list of them"
    said = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return said[0].lower() + said[1:] if said else said


def _place(loc: tuple[Any, ...]) -> str:
    words = [one for one in loc if isinstance(one, int) or re.fullmatch(r"[a-z_]+", one)]
    return ".".join(str(one) for one in words if one not in ("int", "str", "list"))
