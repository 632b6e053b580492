"""A cluster that is lost says nothing of the cells in flight: none is booked, exit 4, and the same command resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from whichkl._checks import ResourceError
from whichkl.cluster import Ray, _refuse_lost_node, is_workers_fault
from whichkl.study.engines import on_ray
from whichkl.study.plan import plan_of

METRIC = """
import os, time
from pathlib import Path
def slow(model, x):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return 1.0
"""


def test_only_a_worker_that_died_is_the_cells_fault():
    exceptions = pytest.importorskip("ray").exceptions
    assert is_workers_fault(exceptions.WorkerCrashedError())
    assert is_workers_fault(exceptions.OutOfMemoryError("the node ran low on memory"))
    for error in (
        exceptions.LocalRayletDiedError(),
        exceptions.NodeDiedError("node"),
        exceptions.RaySystemError("gone"),
        exceptions.RpcError("unavailable"),
        exceptions.ObjectLostError("00", None, "call"),
        ConnectionError("no answer"),
    ):
        assert not is_workers_fault(error), error


class Lost(Ray):
    """Workers that end as Ray's do: after some cells the cluster is gone."""

    def as_completed(self, function, take):
        bundle = take(2)
        yield bundle, function(bundle)
        assert take(2) is not None
        raise ResourceError("Cannot go on: the cluster is gone (LocalRayletDiedError: …). Look at its machines.")


def test_cells_in_flight_stay_undone():
    plan = plan_of([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0], [0.5, 3.0], [4.0, 1.0]] * 8, "gaussian", seeds=6, metrics=["forward_kl"])
    found = []
    with pytest.raises(ResourceError, match="the cluster is gone"):
        for cell, outcome in on_ray(plan, plan.cells, Lost()):
            found.append((cell.seed, outcome.row["status"]))
    assert found == [(0, "converged")]


def test_a_process_of_the_cluster_that_has_ended_is_seen():
    class Started:
        def __init__(self, code):
            self.process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
            self.process.wait()

    class Module:
        class _private:
            class worker:
                class _global_node:
                    all_processes = {"raylet": [Started(1)], "gcs_server": []}

    with pytest.raises(ResourceError, match="the cluster is gone \\(its process `raylet` has ended\\).*same command again"):
        _refuse_lost_node(Module)
    Module._private.worker._global_node = None  # a cluster of others
    _refuse_lost_node(Module)
    _refuse_lost_node(object())


def children(pid):
    """The processes below another, by their names."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [(child, Path(f"/proc/{child}/comm").read_text().strip()), *children(child)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["raylet", "gcs_server"])
def test_a_lost_node_books_nothing_and_the_same_command_resumes(tmp_path, lost):
    pytest.importorskip("ray")
    if not Path("/proc/self/task").exists():
        pytest.skip("needs Linux, which shows a process's children")
    (tmp_path / "m.py").write_text(METRIC)
    lines = ['target: "0.5*Normal(-3,1) + 0.5*Normal(3,1)"', "families: [gaussian]", "objectives: [forward_kl, reverse_kl]"]
    lines += ["seeds: 5", 'metrics: [forward_kl, "m.py:slow"]', "draws: 1000"]
    (tmp_path / "s.yaml").write_text("\n".join(lines))

    def command(out, *more):
        return [sys.executable, "-m", "whichkl", "compare", "s.yaml", "--out", out, *more]

    def done():
        return list((tmp_path / "o" / "cells").glob("*/DONE"))

    process = subprocess.Popen(
        command("o", "--workers", "2"),
        cwd=tmp_path,
        env={**os.environ, "SLOW": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while len(done()) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    (victim,) = [pid for pid, name in children(process.pid) if name == lost]
    os.kill(victim, signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 4, error
    assert out == "" and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: Cannot go on: the cluster is gone (")
    assert error.rstrip().endswith("run the same command again to resume.")
    rows = [json.loads((path.parent / "cell.json").read_text())["row"] for path in done()]
    assert 2 <= len(rows) < 10 and {row["status"] for row in rows} == {"converged"}
    for arguments in (command("o", "--workers", "2"), command("here")):
        again = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
    assert (tmp_path / "o" / "table.csv").read_bytes() == (tmp_path / "here" / "table.csv").read_bytes()
