"""Scripts that each show one fault, where a folder of them is next to this checkout: none of the faults is there any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SHARED

SCRIPTS = sorted((SHARED / "faults").glob("f[0-9]*.py"))
_SECONDS = 900
_SLEEPER, _MEANWHILE = "f24", "f12"
"""A script that sleeps for twelve seconds, and another one that runs in that time."""


def groups():
    """Each script alone, but for the one that sleeps, if another one is there to run in that time."""
    pair = [one for one in SCRIPTS if one.stem.startswith((_SLEEPER, _MEANWHILE))]
    return [*([one] for one in SCRIPTS if one not in pair), *([pair] if pair else [])]


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="no folder of such scripts next to this checkout")
@pytest.mark.parametrize("scripts", groups() or [[]], ids=lambda some: " and ".join(one.stem for one in some) or "none")
def test_the_fault_is_mended(scripts, tmp_path):
    command = Path(sys.executable).parent / "whichkl"
    sources = str(Path(__file__).resolve().parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": sources, "WHICHKL": str(command), "TMPDIR": str(tmp_path)}
    environment |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun = [subprocess.Popen([sys.executable, str(one)], cwd=tmp_path, env=environment, **pipes) for one in scripts]
    for process in begun:
        out, _ = process.communicate(timeout=_SECONDS)
        assert process.returncode == 0, out
