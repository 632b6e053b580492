"""Config: a study in a YAML file, checked field by field, with the line of whatever is wrong."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from whichkl import problems
from whichkl._checks import InputError, WhichklError, cannot
from whichkl.families import family_of
from whichkl.files.yaml_file import YamlFile, read_yaml
from whichkl.objectives import objective_of
from whichkl.problems.named import looks_named, named
from whichkl.study.measures import MEASURES
from whichkl.study.plan import Metric, Plan, add_metric, plan_of, seeds_of
from whichkl.targets import Target
from whichkl.user_code import call_user, load_function, looks_like_code

_FUNCTIONS = ("log_prob", "sampler", "score", "energy")
_MAX_MISTAKES = 20
"""Most mistakes that one message names."""
_PROBLEMS = tuple(name for name in problems.__all__ if name[0].islower() and name != "named")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TargetConfig(_Strict):
    """What is known of p: a problem by its name, or the arguments of `Target`, functions as FILE.py:FUNCTION."""

    problem: str | None = None
    """A name in `whichkl.problems`, with `arguments`; or a distribution such as ``Normal(0, 1)``."""
    arguments: dict[str, str | int | float | bool] = Field(default_factory=dict)
    make: str | None = None
    """FILE.py:FUNCTION, which takes nothing and returns a `Target`, or what `Target.of` takes."""
    samples: str | list[str] | None = None
    log_prob: str | None = None
    sampler: str | None = None
    score: str | None = None
    energy: str | None = None
    dim: Annotated[int, Field(ge=1)] | None = None
    support: str | None = None
    normalized: bool = False
    chains: Annotated[int, Field(ge=1)] | None = None
    given: list[str] | None = None
    batched: bool = True

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        ways = [name for name in ("problem", "make") if getattr(self, name) is not None]
        of_target = [name for name in ("samples", *_FUNCTIONS) if getattr(self, name) is not None]
        if len(ways) + bool(of_target) != 1:
            raise ValueError("give one of `problem`, `make`, or the arguments of a target (`samples`, `log_prob`, …)")
        if self.arguments and not self.problem:
            raise ValueError("`arguments` belong to a `problem`")
        return self

    @field_validator("problem")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in _PROBLEMS and not looks_named(value):
            raise ValueError(f"there is no such problem; choose among {', '.join(_PROBLEMS)}, or write, say, Normal(0, 1)")
        return value


class StudyConfig(_Strict):
    """A study: see `compare` for what the fields mean."""

    target: TargetConfig
    families: list[str] | None = None
    objectives: list[str] | None = None
    seeds: int | list[int] = 10
    budget: Annotated[int, Field(ge=1)] | None = None
    metrics: list[str] | None = None
    held_out: Annotated[float, Field(ge=0.01, le=0.9)] = 0.2
    draws: Annotated[int, Field(ge=100)] = 10_000

    @field_validator("target", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        """A text alone is a problem, FILE.py:FUNCTION that makes a target, or a file of samples."""
        if not isinstance(value, str):
            return value
        if looks_like_code(value):
            return {"make": value}
        return {"problem": value} if value in _PROBLEMS or looks_named(value) else {"samples": value}

    @field_validator("families", "objectives", "metrics", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("families")
    @classmethod
    def _families(cls, value: list[str] | None) -> list[str] | None:
        return _each(value, family_of)

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: list[str] | None) -> list[str] | None:
        return _each(value, objective_of)

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: list[str] | None) -> list[str] | None:
        def check(one: str) -> None:
            if one not in MEASURES and not looks_like_code(one):
                known = f"{', '.join(MEASURES)}, or FILE.py:FUNCTION"
                raise InputError(cannot(f"measure `{one}`", "there is no such metric", f"Choose among {known}"))

        return _each(value, check)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, value: int | list[int]) -> int | list[int]:
        seeds_of(value)
        return value


def read_plan(path: Path) -> Plan:
    """Read a study's YAML file; relative paths in it start at its folder.

    Raises:
        InputError: the file can't be read, or something in it is wrong: every message names the line.
        TargetError: the target can't do what an objective requires.
    """
    file = read_yaml(path, "target: bimodal")
    try:
        config = StudyConfig.model_validate(file.values)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        places = [(_located(one), one) for one in wrong[:_MAX_MISTAKES]]
        found = sorted({(file.line_of(place), _place(place), _message(one)) for place, one in places})
        said = "; ".join(f"line {line}{f', `{place}`' if place else ''}: {message}" for line, place, message in found)
        more = f"; and {len(wrong) - _MAX_MISTAKES:,} more" if len(wrong) > _MAX_MISTAKES else ""
        raise InputError(cannot(f"read `{path}`", said + more, "Correct the file, and run it again")) from error
    return _plan(config, path, file)


def _plan(config: StudyConfig, path: Path, file: YamlFile) -> Plan:
    folder = path.parent
    codes: dict[str, str] = {}
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
        return plan_of(
            target,
            config.families,
            config.objectives,
            config.seeds,
            config.budget,
            metrics,
            held_out=config.held_out,
            draws=config.draws,
            source=source,
            codes=codes,
        )


def _target(config: TargetConfig, folder: Path, codes: dict[str, str]) -> tuple[Target, str]:
    """Open the target, and say what it's called."""
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
    functions = {name: getattr(config, name) for name in _FUNCTIONS if getattr(config, name) is not None}
    samples: Any = config.samples
    if isinstance(samples, str) and not Path(samples).suffix and not os.path.exists(folder / samples):
        near = get_close_matches(samples, _PROBLEMS, 1)
        meant = f"Did you mean `{near[0]}`? " if near else ""
        because = "it's neither a problem of that name nor a file or folder beside the study"
        instead = f"{meant}Problems are {', '.join(_PROBLEMS)}; files are .csv, .parquet, .arrow or .npy"
        raise InputError(cannot(f"use the target `{samples}`", because, instead))
    if samples is not None:
        samples = _path(samples, folder) if isinstance(samples, str) else [_path(one, folder) for one in samples]
    target = Target(
        samples=samples,
        dim=config.dim,
        support=config.support,
        normalized=config.normalized,
        chains=config.chains,
        given=config.given,
        batched=config.batched,
        **{name: _function(place, folder, codes) for name, place in functions.items()},
    )
    shown = [config.samples if isinstance(config.samples, str) else f"{len(config.samples)} files"] if config.samples else []
    return target, ", ".join([*shown, *functions.values()])


def _function(place: str, folder: Path, codes: dict[str, str]) -> Any:
    function = load_function(place, place, folder)
    path = place.rpartition(":")[0]
    codes[path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()[:16]
    return function


def _path(value: Any, folder: Path) -> Any:
    return str(folder / value) if isinstance(value, str) else value


def _each(values: list[str] | None, check: Any) -> list[str] | None:
    """Check every entry; the first wrong one is named with its number, from which its line follows."""
    for i, one in enumerate(values or ()):
        try:
            check(one)
        except WhichklError as error:
            raise ValueError(f"[{i}] {error}") from error
    return values


def _located(error: Any) -> tuple[Any, ...]:
    entry = re.match(r"Value error, \[(\d+)\]", str(error["msg"]))
    return (*error["loc"], int(entry[1])) if entry else error["loc"]


def _message(error: Any) -> str:
    """What is wrong with a field, in words of ours where pydantic's speak of code."""
    if error["type"] == "extra_forbidden":
        known = TargetConfig.model_fields if error["loc"][0] == "target" else StudyConfig.model_fields
        near = get_close_matches(str(error["loc"][-1]), known, 1)
        return "there is no such field" + (f" (did you mean `{near[0]}`?)" if near else f"; there are {', '.join(known)}")
    if error["type"] == "missing":
        return "it's missing"
    if error["loc"][:1] == ("seeds",) and error["type"] in ("int_type", "list_type"):
        return "it's neither a whole number nor a list of them"
    said = re.sub(r"^Value error, (\[\d+\] )?", "", str(error["msg"])).rstrip(".")
    return said[0].lower() + said[1:] if said else said


def _place(loc: tuple[Any, ...]) -> str:
    words = [one for one in loc if isinstance(one, int) or re.fullmatch(r"[a-z_]+", one)]
    return ".".join(str(one) for one in words if one not in ("int", "str", "list"))
