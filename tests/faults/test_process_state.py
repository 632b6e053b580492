"""No public call changes the process, and none depends on what the process was set to."""

import contextlib
import warnings

import numpy as np
import public_calls
import pytest
import torch
from public_calls import CALLS, text

MODES = {
    "inference mode": lambda: torch.inference_mode(),
    "no grad": lambda: torch.no_grad(),
    "NumPy raises": lambda: np.errstate(all="raise"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "deterministic algorithms": lambda: deterministic(),
    "warnings are errors": lambda: all_warnings("error"),
}


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def all_warnings(action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield


@pytest.fixture(scope="module")
def expected():
    return {name: text(name) for name in CALLS}


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_of_the_user_changes_a_result(mode, expected, subtests=None):
    wrong = {}
    for name in CALLS:
        public_calls.networks.cache_clear()
        public_calls.some_fit.cache_clear()
        with MODES[mode]():
            try:
                found = text(name)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
        if found != expected[name]:
            wrong[name] = (found[:300], expected[name][:300])
    assert not wrong
