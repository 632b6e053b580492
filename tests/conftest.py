"""Shared paths: known truths that lie next to some checkouts; without them, tests that need them are skipped with a reason."""

import os
from pathlib import Path

import pytest
import torch

# The tests' operations are small: on a busy machine, threads that wait for each other cost ten times the work. With more threads
# the rounding of sums is another one: `make test-portable` has tests run with two as well.
THREADS = int(os.environ.get("WHICHKL_TEST_THREADS", "1"))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
if THREADS < torch.get_num_threads():
    torch.set_num_threads(THREADS)
# Without this, on a machine that forbids to keep compiled files, each of two hundred commands would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _fixed_seed():
    before = _settings()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    assert _settings() == before, "a test, or what it called, left torch's settings changed"


def _settings():
    return torch.distributions.Distribution._validate_args, torch.get_default_dtype(), torch.get_num_threads()


@pytest.fixture
def compiling(monkeypatch):
    """Put back the validation of arguments, which torch.compile turns off for the rest of the process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", torch.distributions.Distribution._validate_args)


@pytest.fixture
def shared():
    if not (SHARED / "testbed.json").exists():
        pytest.skip("no folder `shared` next to this checkout: the published truths and posteriors aren't here")
    return SHARED
