"""Many fits in one process leave nothing behind, and commands that are killed at random moments come to the same bytes."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from canaries import plant, seen

MANY = """
import gc, json, os, sys, tempfile, threading
from pathlib import Path
import numpy as np, torch, whichkl as wk

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

def state():
    return threading.active_count(), len(os.listdir("/proc/self/fd")), sorted(os.listdir(tempfile.gettempdir()))

def density(x):
    return -(x - 1).square().sum(-1) - x[:, 0].pow(4)

x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
kinds = [lambda: wk.fit(x), lambda: wk.fit(wk.Target(log_prob=density, dim=2)), lambda: wk.fit(x, "mixture:2", judge=False),
         lambda: wk.fit(x, "gaussian:diagonal", journal="journal")]
warm, count = map(int, sys.argv[1:])
for i in range(warm):
    kinds[i % 4]()
before, begun = resident(), state()
for i in range(count):
    kinds[i % 4]()
after, ended = resident(), state()
print(json.dumps({"grown": after - before, "before": begun, "after": ended, "left": sorted(os.listdir("."))}))
"""


def many(folder, warm, count):
    command = [sys.executable, "-c", MANY, str(warm), str(count)]
    (folder / "tmp").mkdir()
    environment = {**__import__("os").environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_some_fits_leave_no_thread_descriptor_or_file(tmp_path):
    found = many(tmp_path, 8, 16)
    assert found["before"] == found["after"]
    assert found["left"] == ["tmp"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_two_hundred_fits_leave_memory_flat(tmp_path):
    found = many(tmp_path, 40, 200)
    assert found["before"] == found["after"]
    assert found["grown"] <= 5 * 2**20


NETS = """
import torch
from torch import nn
def teacher():
    return nn.Linear(6, 4)
def student():
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
def data():
    return torch.randn(2_000, 6, generator=torch.Generator().manual_seed(0)), torch.arange(2_000) % 4
"""
STUDY = """target: "0.5*Normal(-3,1) + 0.5*Normal(3,1)"
families: [gaussian, "mixture:2"]
seeds: 8
metrics: [forward_kl]
draws: 500
"""
COMMANDS = {
    "mixture": (["fit", "x.npy", "--family", "mixture:auto"], "fit"),
    "flow": (["fit", "few.npy", "--family", "flow"], "fit"),
    "distill": (
        ["distill", "--teacher", "nets.py:teacher", "--student", "nets.py:student", "--data", "nets.py:data", "--epochs", "60"],
        "student",
    ),
    "compare": (["compare", "s.yaml"], "."),
}


def digests(folder):
    """What must be the same: all files but reports, whose nonce is random, and times."""
    names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    own = [path for path in names if path.name not in ("report.html", "times.jsonl", "DONE")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in own}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_twenty_kills_at_random_moments_come_to_the_same_bytes(tmp_path, name):
    arguments, result = COMMANDS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3_000, 2)) + 4 * (np.arange(3_000) % 2)[:, None]
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "few.npy", x[:300])
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "s.yaml").write_text(STUDY)
    command = [sys.executable, "-m", "whichkl", *arguments, "--out"]
    whole = tmp_path / "whole"
    subprocess.run([*command, str(whole)], cwd=tmp_path, check=True, capture_output=True)
    out = tmp_path / "out"
    if name != "compare":
        plant(out)
    chance, kills = random.Random(1), 0  # noqa: S311
    canaries = seen(out) if name != "compare" else {}
    while kills < 20:
        process = subprocess.Popen([*command, str(out)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ended = process.wait(timeout=chance.uniform(1.5, 7.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert ended == 0
            begin_again(out, out / result)
        if name == "compare" and not canaries and (out / "study.json").exists():
            plant(out)
            canaries = {key: one for key, one in seen(out).items() if "cells" not in key[1] and not key[1].startswith("study")}
            canaries = {key: one for key, one in canaries.items() if ".whichkl-lock" not in key[1] and ".new-" not in key[1]}
    assert subprocess.run([*command, str(out)], cwd=tmp_path, check=False, capture_output=True, timeout=600).returncode == 0
    assert seen(out).items() >= canaries.items()
    here = digests(out / result)
    assert {key: one for key, one in here.items() if key in digests(whole / result)} == digests(whole / result)
    assert not list(out.rglob(".new-*")) and not list(out.rglob(".whichkl-lock"))


def begin_again(out, result):
    """Take a finished result away, so that there is something to kill: the cells of a study, the files of a fit."""
    cells = out / "cells"
    if cells.exists():
        for cell in cells.iterdir():
            shutil.rmtree(cell)
        return
    for path in sorted(result.iterdir()) if result.exists() else []:
        path.unlink()
