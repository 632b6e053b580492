"""Floors: the lowest version of every package that pyproject.toml allows, as constraints for pip, and the tests run on them.

torch stays at the version of constraints.txt, the one build that `make` installs. The extra `lm` isn't part of it, since
transformers needs later versions of what the core needs.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED_ELSEWHERE = ("torch",)


def floors(extra="dev"):
    """Return the lowest version of each package of the core and of an extra, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, found = project["optional-dependencies"], {}
    wanted = [*project["dependencies"], *extras[extra]]
    for requirement in wanted:
        own = re.fullmatch(r"whichkl\[(.*)\]", requirement)
        if own:
            wanted += [one for name in own[1].split(",") for one in extras[name]]
            continue
        name, lowest = re.match(r"([\w.-]+)>=([\w.]+)", requirement).groups()
        found[name] = lowest
    return {name: lowest for name, lowest in found.items() if name not in PINNED_ELSEWHERE}


TESTS = (
    *("inputs", "samples", "streams", "cli", "fitting", "families", "study", "study_config", "energies", "adapters", "sklearn"),
    *("plots", "reporting", "package"),
)
FAULTS = ("console", "late_checks", "sample_files", "stored_results", "user_code", "yaml_files")
"""Tests that together call every package."""


if __name__ == "__main__":
    if "--tests" in sys.argv:
        print(*(f"tests/test_{name}.py" for name in TESTS), *(f"tests/faults/test_{name}.py" for name in FAULTS))
    else:
        sys.stdout.writelines(f"{name}=={lowest}\n" for name, lowest in sorted(floors().items()))
