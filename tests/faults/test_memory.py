"""Memory that runs out, and work whose size says before it begins that it would: exit 4 with the number."""

import errno
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError, ResourceError
from whichkl.families import Gaussian, Mixture
from whichkl.process.memory import _of_group, available_memory, check_memory, ran_out, refuse_if_ran_out, shown_bytes
from whichkl.solvers.nodes.gaussian_rule import gaussian_rule
from whichkl.solvers.nodes.starts import _normal_points

resource = pytest.importorskip("resource")
MODEL = """
import numpy as np, torch
from pathlib import Path
def f(x):
    Path("called").touch()
    return -x.square().sum(-1)
def greedy(x):
    torch.ones(10**13)
    return -x.square().sum(-1)
def greedy_arrays(x):
    np.ones(10**13)
    return -np.square(x).sum(-1)
def greedy_lists(x):
    raise MemoryError
def loss(*, teacher, student, mask=None):
    return torch.ones(10**13).sum()
def metric(model, x):
    return float(torch.ones(10**13).sum())
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m.py").write_text(MODEL)
    return tmp_path


def limited(size, *arguments, cwd):
    """Run the command in a fresh Python whose address space is limited to `size` bytes."""
    return subprocess.run(
        [sys.executable, "-m", "whichkl", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )


def too_much(allocate):
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        allocate()
    return caught.value


def test_what_says_that_memory_ran_out_is_recognised():
    real = [too_much(lambda: torch.empty(10**15)), too_much(lambda: np.ones(10**15)), too_much(lambda: bytearray(2**62))]
    real.append(too_much(lambda: pa.allocate_buffer(2**50)))
    said = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 80 bytes"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        pa.ArrowMemoryError("malloc of size 64 failed"),
    ]
    for error in real + said:
        assert ran_out(error), error
        with pytest.raises(ResourceError, match="memory ran out"):
            refuse_if_ran_out(error)
    wrapped = InputError("Cannot call this teacher: it fails.")
    wrapped.__cause__ = said[0]
    assert ran_out(wrapped)


def test_other_errors_are_not():
    for error in (
        RuntimeError("singular matrix"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "full"),
        InputError("no"),
        None,
    ):
        assert not ran_out(error)


def test_available_memory_obeys_the_limit_of_the_process():
    code = "from whichkl.process.memory import available_memory; print(available_memory())"
    size = 600_000_000
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )
    assert 100_000_000 < float(done.stdout) < size
    assert available_memory() > 0


@pytest.mark.parametrize(
    ("lines", "folder", "names"),
    [
        ("0::/a/b\n", "a", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/a/b\n0::/\n", "memory/a/b", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        ("0::/elsewhere\n", "", ("memory.max", "memory.current", "inactive_file")),
    ],
)
def test_available_memory_obeys_control_groups(tmp_path, lines, folder, names):
    root = tmp_path / "cgroup"
    (root / folder).mkdir(parents=True)
    for name, text in zip(names, ("1000", "700"), strict=False):
        (root / folder / name).write_text(text)
    (root / folder / "memory.stat").write_text(f"{names[2]} 100\nother 5\n")
    (tmp_path / "mine").write_text(lines)
    assert _of_group(tmp_path / "mine", root) == 400


def test_a_group_without_a_limit_or_without_files_has_none(tmp_path):
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "mine").write_text("0::/\n")
    assert _of_group(tmp_path / "mine", tmp_path) == _of_group(tmp_path / "nothing", tmp_path) == float("inf")


def test_a_forecast_names_both_numbers():
    with pytest.raises(ResourceError, match=r"Cannot do it: it takes at least 1,000 TB of memory, and [\d.,]+ .B are free. Less"):
        check_memory(1e15, "do it", "Less")
    check_memory(1, "do it")
    assert [shown_bytes(one) for one in (3, 4_400, 15e6, 2e9)] == ["3 bytes", "4.4 kB", "15 MB", "2.0 GB"]


@pytest.mark.parametrize("arguments", [("fit", "--dim", "{}"), ("fit", "--dim", "{}", "--family", "mixture:3")])
def test_a_fit_that_cannot_fit_is_refused_before_the_log_density_is_minimised(folder, arguments):
    done = limited(3_000_000_000, *[one.format(21_202) for one in arguments], "--log-prob", "m.py:f", cwd=folder)
    assert done.returncode == 4, done.stderr
    assert re.search(r"in 21,202 dimensions: it takes at least [\d.,]+ GB of memory, and [\d.,]+ [GM]B are free", done.stderr)
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("dim", ["1000000000", "1000001", "0", "-1", "true", "1e3", "2.5", "99999999999999999999"])
def test_absurd_dimensions_are_refused_before_anything_runs(folder, dim):
    result = whichkl("fit", "--log-prob", "m.py:f", "--dim", dim, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "called").exists()


@pytest.mark.parametrize("dim", [True, 0, -3, 2.0, "2", 10**9])
def test_absurd_dimensions_of_a_target(dim):
    with pytest.raises(InputError, match="Cannot use `dim="):
        wk.Target(log_prob=lambda x: x, dim=dim)
    assert wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=np.int64(3)).dim == 3


def test_starts_and_nodes_do_without_sobol_points_above_their_last_dimension():
    dim = torch.quasirandom.SobolEngine.MAXDIM
    for d in (dim, dim + 1):
        z = _normal_points(d, 0)
        assert z.shape == (256, d) and bool(z.isfinite().all())
        assert abs(float(z.square().mean()) - 1) < 0.02
    assert not torch.equal(_normal_points(dim + 1, 0)[:, :9], _normal_points(dim + 1, 1)[:, :9])
    z, w = gaussian_rule(dim + 1, 64, 0)
    assert float((w @ z).abs().max()) < 1e-12


@pytest.mark.slow
def test_a_factorised_fit_works_above_them(folder):
    result = whichkl("fit", "--log-prob", "m.py:f", "--dim", 21_500, "--family", "gaussian:diagonal", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("function", ["greedy", "greedy_arrays", "greedy_lists"])
def test_a_log_density_that_runs_out_of_memory(folder, function):
    result = whichkl("fit", "--log-prob", f"m.py:{function}", "--dim", 2, cwd=folder)
    assert result.returncode == 4, result.stderr
    assert "Cannot evaluate `log_prob` at 1 point: memory ran out" in result.stderr
    assert result.stderr.count("\n") == 1


def test_losses_and_metrics_that_run_out_of_memory(folder):
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(60, 2)))
    (folder / "s.yaml").write_text('target: x.npy\nfamilies: [gaussian]\nseeds: 1\nmetrics: [forward_kl, "m.py:metric"]\n')
    for arguments in (("audit", "m.py:loss"), ("compare", "s.yaml")):
        result = whichkl(*arguments, cwd=folder)
        assert result.returncode == 4, result.stderr
        assert "memory ran out" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("size", [250_000_000, 900_000_000, 1_100_000_000, 1_200_000_000])
def test_a_fit_in_too_little_memory_has_one_line(folder, size):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs Linux, which counts address space")
    np.save(folder / "b.npy", np.random.default_rng(0).normal(size=(1_000_000, 24)))
    done = limited(size, "fit", "b.npy", cwd=folder)
    assert done.returncode == 4 or (done.returncode == 0 and size > 10**9), done.stderr
    if done.returncode:
        assert "memory" in done.stderr and done.stderr.count("\n") == 1


def test_forecasts_grow_with_what_is_allocated():
    from whichkl.solvers.nodes.mean_field import MeanField
    from whichkl.solvers.nodes.natural_gradient import NaturalGradient
    from whichkl.solvers.nodes.sample_average import SampleAverage

    assert NaturalGradient().least_memory(Gaussian(), 30_000) > 8 * 30_000**2 * 8
    assert NaturalGradient().least_memory(Gaussian(), 1_000) < 1e9
    assert MeanField().least_memory(Gaussian("diagonal"), 30_000) < 1e9
    one, three = (SampleAverage().least_memory(Mixture(k), 1_000) for k in (1, 3))
    assert 0 < one < three
