"""The ledger under real kills, full disks and changed files: nothing lost, nothing repeated, the same table."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError, IntegrityError, ResourceError
from whichkl.study import Study
from whichkl.study.ledger import Ledger, differences, read_config

QUICK = {"families": ["gaussian", "mixture:2"], "objectives": "forward_kl", "metrics": ["khat", "coverage"], "draws": 200}


def laplace():
    """Rows of two columns: fits on them take some milliseconds."""
    x = torch.randn(120, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return wk.Target(samples=x * x.abs())


def study(out, seeds=3, **changes):
    return wk.compare(laplace(), **{**QUICK, "seeds": seeds, "out": out, **changes})


def script(out, seeds, **changes):
    """A program that runs the same study in a process of its own, and says which cell it has done."""
    root = Path(__file__).resolve().parent
    return textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(root)!r})
        import torch; torch.set_num_threads(1)
        from test_ledger import study
        def tell(p):
            print(p.done, p.of, p.skipped, flush=True)
        study({str(out)!r}, {seeds}, tell=tell, **{changes!r})
        print("finished", flush=True)
    """)


def launched(out, seeds, **changes):
    return subprocess.Popen([sys.executable, "-c", script(out, seeds, **changes)], stdout=subprocess.PIPE, text=True)


def finished(folder):
    """Every cell that is done, with the time at which it was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*/DONE")}


def test_a_study_is_kept_and_the_same_call_reruns_nothing(tmp_path):
    told = []
    first = study(tmp_path)
    table, kept = (tmp_path / "table.csv").read_bytes(), finished(tmp_path)
    second = study(tmp_path, tell=told.append)
    assert len(kept) == len(first.cells) == 6
    assert finished(tmp_path) == kept
    assert (tmp_path / "table.csv").read_bytes() == table
    assert [(p.done, p.of, p.skipped) for p in told] == [(6, 6, 6)]
    assert second.rows == first.rows == Study.load(tmp_path).rows
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {cell.key for cell in first.cells}
    times = [json.loads(line) for line in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert [one["cell"] for one in times] == [cell.key for cell in first.cells]


def test_two_folders_hold_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        study(tmp_path / name, seeds=2)
    for name in ("table.csv", "metrics.jsonl", "study.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for cell in Study.load(tmp_path / "a").cells:
        for path in sorted(cell.folder.rglob("*.*")):
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_saved_cell_has_its_fit(tmp_path):
    found = study(tmp_path, seeds=1, metrics=["forward_kl"])
    fit = wk.Fit.load(found.cells[1].folder / "fit")
    assert str(fit.family) == str(wk.families.Mixture(2))
    assert fit.value.value == pytest.approx(found.rows[1]["forward_kl"])
    assert fit.diagnostics.evaluations["rows"] == found.rows[1]["rows"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 2}, r"seeds was \[0, 1, 2\] and is \[0, 1\]"),
        ({"budget": 900}, "budget was null and is 900"),
        ({"families": ["gaussian"]}, "families was "),
        ({"draws": 300}, "draws was 200 and is 300"),
        ({"target": "other"}, "target.samples was "),
    ],
)
def test_a_changed_study_is_refused_and_the_difference_shown(tmp_path, changes, said):
    first = study(tmp_path)
    target = laplace()
    if changes.pop("target", None):
        target.samples[7, 1] += 1e-6
    before = finished(tmp_path)
    with pytest.raises(InputError, match=f"holds another study: {said}"):
        wk.compare(target, **{**QUICK, "seeds": 3, "out": tmp_path, **changes})
    assert finished(tmp_path) == before
    assert Study.load(tmp_path).rows == first.rows


def test_differences_are_named_by_their_place():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c was 2 and is 3", "d was null and is 4"]


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    study(tmp_path, seeds=1)
    config = read_config(tmp_path)
    with Ledger.opened(tmp_path, config):
        with pytest.raises(ResourceError, match=f"another run is working in .*process {os.getpid()}"):
            study(tmp_path, seeds=1)
    study(tmp_path, seeds=1)


@pytest.mark.parametrize("name", ["cell.json", "fit/fit.json", "DONE"])
def test_a_corrupt_cell_is_named_and_recomputed_on_request(tmp_path, name):
    study(tmp_path)
    table, bad = (tmp_path / "table.csv").read_bytes(), Study.load(tmp_path).cells[2]
    path = bad.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if name != "DONE" else data[:-20])
    others = {key: when for key, when in finished(tmp_path).items() if key != bad.key}
    for attempt in (lambda: study(tmp_path), lambda: Study.load(tmp_path)):
        with pytest.raises(IntegrityError, match=f"{bad.key}` isn't what was written.*--recompute"):
            attempt()
    study(tmp_path, recompute=True)
    assert (tmp_path / "table.csv").read_bytes() == table
    assert {key: when for key, when in finished(tmp_path).items() if key != bad.key} == others


def test_failed_cells_are_kept_shown_and_tried_again_on_request(tmp_path):
    folder, few = tmp_path / "out", torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = {**QUICK, "families": ["gaussian", "mixture:4"], "seeds": 2, "out": folder}
    found = wk.compare(wk.Target(samples=few), **asked)
    assert [row["status"] for row in found.rows] == ["converged", "failed"] * 2
    assert "it needs at least" in found.rows[1]["error"]
    assert "2 of 2" in str(found).splitlines()[2]
    assert found.rows[1]["forward_kl"] is None
    with pytest.raises(InputError, match="it failed: InputError"):
        found.fit(1)
    before = finished(folder)
    wk.compare(wk.Target(samples=few), **asked)
    assert finished(folder) == before
    wk.compare(wk.Target(samples=few), **asked, recompute=True)
    after = finished(folder)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {cell.key for cell in found.failed}


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Cannot write"):
        study(tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ResourceError, match="Cannot write"):
            study(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from whichkl._checks import ResourceError
from test_ledger import study
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, resource.RLIM_INFINITY))
try:
    study({out!r})
except ResourceError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
from pathlib import Path
print(sorted(path.name for path in (Path({out!r}) / "cells").iterdir()), (Path({out!r}) / "table.csv").exists())
study({out!r})
"""


def test_a_disk_that_takes_no_more_stops_the_study_whole_and_it_goes_on_later(tmp_path):
    study(tmp_path / "whole")
    most = (tmp_path / "whole" / "study.json").stat().st_size + 1  # enough for that file, too little for a cell
    program = FULL.format(tests=str(Path(__file__).parent), most=most, out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    assert said.startswith("Cannot write") and "File too large" in said
    assert left == "[] False"
    assert (tmp_path / "out" / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import pandas, pyarrow.parquet, torch; torch.set_num_threads(1)
import test_ledger
import whichkl.study
from whichkl.targets.fingerprint import code_version
code_version()
torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))  # what is imported here isn't by every child
ONE = {{"families": "gaussian", "seeds": 1}}  # no thread has begun here, so that forks are safe

def killed_at(count, out):
    left = count
    def counted(real):
        def call(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)
        return call
    os.fsync, Path.rename, Path.replace = counted(os.fsync), counted(Path.rename), counted(Path.replace)
    test_ledger.study(out, **ONE)

for count in range({most}):
    out = {folder!r} + "/" + str(count)
    child = os.fork()
    if child == 0:
        killed_at(count, out)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    child = os.fork()
    if child == 0:
        seen = []
        test_ledger.study(out, tell=seen.append, **ONE)
        print(count, os.WTERMSIG(ended), seen[0].skipped, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_killed_at_every_step_of_writing_it_goes_on_to_the_same_table(tmp_path):
    study(tmp_path / "whole", seeds=1, families="gaussian")
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), most=22)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    killed = [count for count, signalled, _ in lines if signalled == signal.SIGKILL]
    assert killed == list(range(len(killed)))
    assert 15 < len(killed) < 22, "the last ones end before they are killed"
    kept = [skipped for _, _, skipped in lines]
    assert kept == sorted(kept)
    assert set(kept) == {0, 1}
    for count in range(22):
        assert (tmp_path / str(count) / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()
        assert len(list((tmp_path / str(count) / "cells").iterdir())) == 1


def test_killed_by_another_process_it_goes_on(tmp_path):
    study(tmp_path / "whole", seeds=8)
    out = tmp_path / "out"
    with launched(out, 8) as process:
        for line in process.stdout:
            if int(line.split()[0]) >= 5:
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL
    done = finished(out)
    assert 0 < len(done) < 16
    told = []
    study(out, seeds=8, tell=told.append)
    assert told[0].skipped == len(done)
    assert {key: when for key, when in finished(out).items() if key in done} == done
    assert (out / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()


@pytest.mark.slow
def test_twenty_random_kills_over_sixty_cells(tmp_path):
    study(tmp_path / "whole", seeds=30)
    out, rng, kills, seen = tmp_path / "out", random.Random(0), 0, {}  # noqa: S311
    while True:
        with launched(out, 30) as process:
            process.stdout.readline()  # it has begun
            if kills < 20:
                time.sleep(rng.uniform(0.0, 0.25))
                process.kill()
                kills += 1
            said = process.stdout.read()
        now = finished(out)
        assert {key: now.get(key) for key in seen} == seen, "what was done is neither lost nor done again"
        seen = now
        if "finished" in said:
            break
    assert len(seen) == 60
    assert kills == 20
    assert (out / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()


def test_the_command_says_what_it_could_not_do_by_its_exit_code(tmp_path):
    (tmp_path / "study.yaml").write_text("target: Normal(0, 1)\nfamilies: gaussian\nseeds: 1\nmetrics: [khat]\ndraws: 500\n")
    (tmp_path / "file").write_text("")

    def run(*arguments):
        return whichkl("compare", "study.yaml", *arguments, cwd=tmp_path)

    assert run("--out", "file/out").returncode == 2
    assert run("--out", "out").returncode == 0
    cell = next((tmp_path / "out" / "cells").glob("*/cell.json"))
    cell.write_text(cell.read_text().replace("converged", "diverged"))
    corrupt = run("--out", "out")
    assert corrupt.returncode == 5
    assert re.search(cell.parent.name, corrupt.stderr.replace("\n", ""))
    assert run("--out", "out", "--recompute").returncode == 0


def test_a_cell_whose_law_is_exact_is_the_same_for_all_seeds():
    found = wk.compare(Normal(torch.tensor(1.0, dtype=torch.float64), 2.0), "gaussian", "forward_kl", 2, metrics=["forward_kl"])
    assert found.rows[0]["forward_kl"] == found.rows[1]["forward_kl"] < 1e-12
