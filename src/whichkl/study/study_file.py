"""Study file: `study.json`, which holds what a study is, written and read back with checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

from whichkl._checks import InputError, IntegrityError, cannot
from whichkl.files.reading import checked, read_file, read_json
from whichkl.files.saving import checksum
from whichkl.files.writing import write_whole

STUDY = "study.json"


class RequiredFields(TypedDict):
    """The fields that every `study.json` has."""

    target: Mapping[str, Any]
    families: list[Any]
    objectives: list[str]
    seeds: list[int]


class StudyFields(RequiredFields, total=False):
    """All fields of `study.json`, except for its checksum, which earlier versions didn't write."""

    format: Any
    code: Any
    budget: Any
    metrics: Any
    held_out: Any
    draws: Any
    files: Any
    pilot: Any


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a study with its checksum."""
    text = json.dumps({**config, "checksum": checksum(config)}, indent=1, allow_nan=False)
    write_whole(folder / STUDY, text.encode())


def is_study(path: Path) -> bool:
    """Whether a file is a study's configuration, even a damaged one: it has most of the names that every study has."""
    if path.is_symlink() or not path.is_file():
        return False
    content = path.read_bytes()
    return sum(f'"{name}":'.encode() in content for name in get_type_hints(RequiredFields)) > 1


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the study in a folder."""
    path = folder / STUDY
    if path.exists() and not is_study(path):
        because = f"its {STUDY} isn't one that whichkl wrote"
        raise InputError(cannot(f"read a study from `{folder}`", because, "Correct the path"))
    try:
        found = read_json(read_file(path))
        if not isinstance(found, dict):
            raise ValueError("it isn't an object")
        if "checksum" in found and found.pop("checksum") != checksum(found):
            raise ValueError("its checksum differs")
        if unknown := [name for name in found if name not in get_type_hints(StudyFields)]:
            raise ValueError(f"`{unknown[0][:40]}` has no meaning there")
        return {**found, **checked(StudyFields, found)}
    except FileNotFoundError as error:
        raise InputError(cannot(f"read a study from `{folder}`", f"it has no {STUDY}", "Correct the path")) from error
    except (OSError, ValueError) as error:
        instead = "Run the study's command again with `--recompute` (recompute=True), which writes it again and keeps the cells"
        raise IntegrityError(cannot(f"read `{folder}`", f"{STUDY} isn't what was written: {error}", instead)) from error


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Return where two configurations differ, one text per difference.

    >>> differences({"seeds": [0, 1], "budget": None}, {"seeds": [0, 1, 2], "budget": None})
    ['seeds was [0, 1] and is [0, 1, 2]']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for name in dict.fromkeys([*before, *now]):
            lines += differences(before.get(name), now.get(name), f"{place}.{name}" if place else name)
        return lines
    return [] if before == now else [f"{place} was {json.dumps(before)} and is {json.dumps(now)}"]


def grows(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two studies differ only in that the new one has more seeds. Its cells stay valid: each is named by its own hash."""
    return {**before, "seeds": 0} == {**now, "seeds": 0} and set(before["seeds"]) <= set(now["seeds"])
