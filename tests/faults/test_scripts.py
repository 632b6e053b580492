"""Scripts that each show one fault, where a folder of them is next to this checkout: none of the faults is there any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import SHARED

SCRIPTS = sorted((SHARED / "faults").glob("f[0-9]*.py"))
_SECONDS = 900


@pytest.mark.skipif(not SCRIPTS, reason="no folder of such scripts next to this checkout")
@pytest.mark.parametrize("script", SCRIPTS or [None], ids=lambda one: one.stem if one else "none")
def test_the_fault_is_mended(script, tmp_path):
    command = Path(sys.executable).parent / "whichkl"
    sources = str(Path(__file__).resolve().parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": sources, "WHICHKL": str(command), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
