"""Two writers in one folder: one waits or is refused, and readers never see half a result."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import whichkl as wk
from programs import Program, whichkl
from whichkl._checks import ResourceError, WhichklError
from whichkl.files import locks as _locks
from whichkl.files.locks import LOCK, locked

HOLD = """
import sys, time
sys.modules["fcntl"] = {fcntl}
from pathlib import Path
from whichkl.files.locks import locked
with locked(Path(sys.argv[1]), "test"):
    print("held", flush=True)
    time.sleep(60)
"""
"""A process that holds a lock. `None` in the place of a module makes Python behave as where there is none."""


@contextlib.contextmanager
def holding(folder, fcntl="__import__('fcntl')"):
    """Have another process hold the lock of a folder, and kill it."""
    command = [sys.executable, "-c", HOLD.format(fcntl=fcntl), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture(params=["by the system", "by name"])
def way(request, monkeypatch):
    """Both kinds of lock: `flock`, and a file's name where the system has no locks."""
    if request.param == "by name":
        monkeypatch.setattr(_locks, "_system_lock", lambda: None)
        return "None"
    return "__import__('fcntl')"


def test_a_lock_that_another_process_holds_is_refused_with_its_number(tmp_path, way):
    with holding(tmp_path, way) as process:
        said = f"another run is working in .*process {process.pid}"
        with pytest.raises(ResourceError, match=said), locked(tmp_path, "start this"):
            pass


def test_a_lock_ends_with_a_killed_process(tmp_path, way):
    with holding(tmp_path, way):
        assert (tmp_path / LOCK).exists()
    with locked(tmp_path, "start this", wait=5.0):
        assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_leaves_nothing_behind_and_comes_again(tmp_path, way):
    for _ in range(3):
        with locked(tmp_path / "new", "start this"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_threads_exclude_each_other(tmp_path, way):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path, "work", wait=60.0):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert most == [1] * 80


def test_a_lock_file_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(WhichklError, match="it is a link"), locked(tmp_path, "start this"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "x"


RACE = """
import sys, torch, whichkl as wk
k = int(sys.argv[2])
fit = wk.fit(torch.randn(60, 2, generator=torch.Generator().manual_seed(k)).double() + k, judge=False)
for _ in range(60):
    fit.save(sys.argv[1])
    wk.Fit.load(sys.argv[1])
"""


def test_savers_and_readers_in_one_folder_never_fail(tmp_path):
    started = [Program("-c", RACE, tmp_path / "fit", k) for k in range(3)]
    assert [one.wait() for one in started] == [0, 0, 0]
    assert len(list((tmp_path / "fit").iterdir())) == 2


def test_a_second_command_into_one_folder_is_exit_four(tmp_path):
    np.save(tmp_path / "x.npy", torch.randn(50, 2).numpy())
    with holding(tmp_path / "out"):
        found = whichkl("fit", "x.npy", "--out", "out", cwd=tmp_path)
    assert found.returncode == 4
    assert "another run is working in" in found.stderr
    assert whichkl("fit", "x.npy", "--out", "out", cwd=tmp_path).returncode == 0
    assert LOCK not in {one.name for one in (tmp_path / "out").iterdir()}


def test_studies_run_where_the_system_has_no_locks(tmp_path):
    (tmp_path / "s.yaml").write_text("target: Normal(0, 1)\nfamilies: gaussian\nseeds: 1\nmetrics: [khat]\ndraws: 500\n")
    code = "import sys; sys.modules['fcntl'] = None; sys.argv = ['whichkl', 'compare', 's.yaml', '--out', 'o']\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "from whichkl.__main__ import main; main()"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "table.csv").exists()


def test_a_reader_waits_for_no_lock(tmp_path):
    wk.fit(torch.randn(60, 2).double(), judge=False).save(tmp_path / "fit")
    with locked(tmp_path / "fit", "hold"):
        assert wk.Fit.load(tmp_path / "fit").model.mean.shape == (2,)
