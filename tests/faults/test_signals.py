"""SIGINT and SIGTERM in every phase of a command: one line, 130 or 143, no half-written file, and the work can be resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from programs import Program, whichkl

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
MODEL = """
import time
from pathlib import Path
import torch
from torch import nn
def f(x):
    Path("running").touch()
    time.sleep(0.2)
    return -x.square().sum(-1)
def stubborn(x):
    Path("running").touch()
    try:
        time.sleep(60)
    except:
        pass
    return -x.square().sum(-1)
def swallows(x):
    return f(x) if Path("running").exists() else stubborn(x)
class Destructor:
    def __del__(self):
        Path("running").touch()
        time.sleep(60)
def lost(x):
    if not Path("running").exists():
        Destructor()
    return f(x)
def loss(*, teacher, student, mask=None):
    Path("running").touch()
    time.sleep(0.2)
    return (student - teacher).square().sum()
def net():
    return nn.Linear(2, 2)
def data():
    return torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
def slow(model, x):
    Path("running").touch()
    time.sleep(0.5)
    return 1.0
"""
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(400, 2)))
    lines = ["target: x.npy", "families: [gaussian]", "seeds: 3", 'metrics: [forward_kl, "m.py:slow"]']
    (tmp_path / "s.yaml").write_text("\n".join(lines))
    return tmp_path


def begun(folder, *arguments):
    return Program("-m", "whichkl", *arguments, cwd=folder)


def begun_afresh(folder, *arguments):
    """The same without anything imported before."""
    command = [sys.executable, "-m", "whichkl", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when(process, condition):
    """Wait until the condition holds."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the moment didn't come"
        time.sleep(0.02)


def stopped(process, number, said):
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    assert re.fullmatch(rf"stopped; {said}\n", error), error
    assert out == ""


def mapped(process, library):
    """Whether a process has begun to load a library."""
    try:
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


NOTHING = "nothing was finished that could be kept"


@BOTH
@pytest.mark.parametrize("library", ["libtorch_cpu", "libtorch_python"])
def test_while_torch_is_imported(folder, number, library):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux, which shows what a process has loaded")
    process = begun_afresh(folder, "fit", "x.npy", "--out", "o")
    when(process, lambda: mapped(process, library))
    stopped(process, number, NOTHING)
    assert not (folder / "o").exists()


@BOTH
@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--log-prob", "m.py:f", "--dim", 2),
        ("fit", "--log-prob", "m.py:f", "--dim", 2, "--out", "o"),
        ("audit", "m.py:loss"),
    ],
    ids=["fit", "fit-out", "audit"],
)
def test_while_user_code_runs(folder, number, arguments):
    process = begun(folder, *arguments)
    when(process, (folder / "running").exists)
    stopped(process, number, NOTHING)
    assert not any(path.is_file() for path in (folder / "o").rglob("*"))


@pytest.mark.parametrize("function", ["swallows", "lost", "stubborn"])
def test_a_signal_that_user_code_swallows_comes_again(folder, function):
    process = begun(folder, "fit", "--log-prob", f"m.py:{function}", "--dim", 2)
    when(process, (folder / "running").exists)
    stopped(process, signal.SIGINT, NOTHING)


@BOTH
def test_a_study_says_that_it_is_kept_and_resumes(folder, number):
    process = begun(folder, "compare", "s.yaml", "--out", "o")
    when(process, lambda: any((folder / "o" / "cells").glob("*/DONE")))
    stopped(process, number, "what was done is kept in `o`: run the same command again to resume")
    cells = [path.name for path in (folder / "o" / "cells").iterdir()]
    assert 1 <= len(cells) < 3 and not any(name.startswith(".new-") for name in cells)
    before = {path: path.stat().st_mtime_ns for path in (folder / "o" / "cells").glob("*/DONE")}
    process = begun(folder, "compare", "s.yaml", "--out", "o")
    assert process.wait(120) == 0
    process.communicate()
    assert len(list((folder / "o" / "cells").glob("*/DONE"))) == 3
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def test_training_says_that_it_is_kept(folder):
    arguments = ("distill", "--teacher", "m.py:net", "--student", "m.py:net", "--data", "m.py:data", "--epochs", "400")
    process = begun(folder, *arguments, "--out", "o")
    when(process, lambda: any((folder / "o").rglob("*.safetensors")))
    stopped(process, signal.SIGINT, "what was done is kept in `o`: run the same command again to resume")
    assert not list((folder / "o").rglob(".*.safetensors-*"))


def test_a_signal_that_is_ignored_stays_ignored(folder):
    """As under nohup, and for what a script puts into the background."""
    code = "import signal, sys, runpy; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv = sys.argv[1:]; "
    code += "runpy.run_module('whichkl', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, "whichkl", "fit", "--log-prob", "m.py:f", "--dim", "1"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    when(process, (folder / "running").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    assert process.communicate()[1] == f"stopped; {NOTHING}\n"


def test_an_interrupt_that_user_code_raises_ends_as_one(folder):
    (folder / "m.py").write_text("def f(x):\n    raise KeyboardInterrupt\n")
    result = whichkl("fit", "--log-prob", "m.py:f", "--dim", 2, cwd=folder)
    assert (result.returncode, result.stderr) == (130, f"stopped; {NOTHING}\n")


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["gcs_server", "raylet", "a cell"])
def test_on_workers(folder, number, moment):
    pytest.importorskip("ray")
    process = begun(folder, "compare", "s.yaml", "--out", "o", "--workers", 2)
    threads = Path(f"/proc/{process.pid}/task")

    def is_there():
        if moment == "a cell":
            return (folder / "running").exists() or any((folder / "o" / "cells").glob("*/DONE"))
        pids = [pid for names in threads.glob("*/children") for pid in names.read_text().split()]
        return any(moment in Path(f"/proc/{pid}/comm").read_text() for pid in pids)

    when(process, is_there)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    has_cells = any((folder / "o" / "cells").glob("*/DONE"))
    assert f"stopped; {'what was done is kept in `o`: run the same command again to resume' if has_cells else NOTHING}" in error


@BOTH
def test_a_signal_during_torchs_import_stops_the_command_after_it(number):
    code = f"""
import importlib, signal
from whichkl.commands import exits
def slow(name):
    signal.raise_signal({int(number)})
    print("imported", flush=True)
importlib.import_module = slow
exits.run(lambda: (exits.load_torch(), print("went on")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "imported\n", f"stopped; {NOTHING}\n")
