"""The state of a process: everything that a call could leave changed for the code around it.

Run as a script, it makes every public call in a fresh process with two threads of torch, and prints what each one changed.
"""

import decimal
import faulthandler
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import torch
from torch.distributions import Distribution

BATCH = torch.randn(4, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 14 * torch.eye(200).double()
SYMMETRIC = BATCH @ BATCH.mT
LOG_DET = torch.linalg.qr(BATCH)[1].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def linear_algebra(*, whole):
    """Return which of torch's factorisations of a batch are wrong; of the log determinant alone, which shows it, or of all."""
    eye = torch.eye(200, dtype=torch.float64)
    checks = {
        "slogdet": lambda: torch.linalg.slogdet(BATCH)[1] - LOG_DET,
        "inv": lambda: torch.linalg.inv(BATCH) @ BATCH - eye,
        "solve": lambda: BATCH @ torch.linalg.solve(BATCH, SYMMETRIC) - SYMMETRIC,
        "eigh": lambda: torch.linalg.eigh(SYMMETRIC)[0].log().sum(-1) / 2 - LOG_DET,
    }
    wrong = []
    for name, off in checks.items():
        if name != "slogdet" and not whole:
            continue
        try:
            wrong += [name] if float(off().abs().max()) > 1e-6 else []
        except RuntimeError:
            wrong.append(name)
    return wrong


def of_a_thread(*, whole=True):
    """Return what holds for the calling thread."""
    return {
        "threads of torch": torch.get_num_threads(),
        "wrong linear algebra": linear_algebra(whole=whole),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "NumPy's errors": np.geterr(),
        "default device": str(torch.get_default_device()),
        "decimals": str(decimal.getcontext()),
    }


def of_a_new_thread(*, whole=True):
    found = {}
    thread = threading.Thread(target=lambda: found.update(of_a_thread(whole=whole)))
    thread.start()
    thread.join()
    return found


def of_libraries():
    """Return the settings of libraries that are loaded."""
    found = {}
    if "matplotlib" in sys.modules:
        found["matplotlib"] = {name: str(value) for name, value in sys.modules["matplotlib"].rcParams.items()}
    if "pandas" in sys.modules:
        found["pandas"] = str(sys.modules["pandas"].describe_option(_print_desc=False))
    if "plotly.io" in sys.modules:
        io = sys.modules["plotly.io"]
        found["plotly"] = (io.templates.default, io.renderers.default)
    if "jax" in sys.modules:
        found["jax"] = {name: str(value) for name, value in sys.modules["jax"].config.values.items()}
    return found


def of_the_process(*, whole=True):
    """Return the state of the process, by name."""
    signals = {one.name: str(signal.getsignal(one)) for one in signal.valid_signals() if isinstance(one, signal.Signals)}
    return {
        **of_a_thread(whole=whole),
        "a new thread": of_a_new_thread(whole=whole),
        "threads between operations": torch.get_num_interop_threads(),
        "random states": (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()[1].tolist()) + str(np.random.get_state()[2:]),
            hash(random.getstate()),
        ),
        "default dtype": str(torch.get_default_dtype()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "validation of arguments": Distribution._validate_args,
        "filters of warnings": [str(one) for one in warnings.filters],
        "signals": signals,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "logging": (logging.root.level, [str(one) for one in logging.root.handlers], logging.root.manager.disable),
        "hooks": [str(one) for one in (sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook)],
        "streams": [id(one) for one in (sys.stdin, sys.stdout, sys.stderr)],
        "limits": (
            sys.getrecursionlimit(),
            sys.getswitchinterval(),
            gc.isenabled(),
            gc.get_threshold(),
            faulthandler.is_enabled(),
        ),
        "locale": locale.setlocale(locale.LC_ALL),
        "printing": (str(np.get_printoptions()), str(vars(torch._tensor_str.PRINT_OPTS))),
        "libraries": of_libraries(),
    }


def changed(before, after):
    """Return what is different, by name."""
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def load_others():
    """Import what other libraries change when they're first used: environment, filters of warnings, settings of their own."""
    import arviz  # noqa: F401
    import pandas  # noqa: F401
    import plotly.graph_objects
    import plotly.io
    import plotly.subplots
    import scipy.special  # noqa: F401
    import sklearn.datasets  # noqa: F401

    plotly.subplots.make_subplots()
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()


def main():
    """Make every call, and print what each one changed."""
    from public_calls import CALLS, text

    load_others()
    first = of_the_process()
    for name in CALLS:
        before = of_the_process(whole=False)
        text(name)
        for what, (old, new) in changed(before, of_the_process(whole=False)).items():
            print(f"`{name}` changed {what}: {old} became {new}")
    for what, (old, new) in changed(first, of_the_process()).items():
        print(f"all calls together changed {what}: {old} became {new}")
    print("done")


if __name__ == "__main__":
    main()
