"""No public call changes the process, none depends on what the process was set to, and several threads can call at once."""

import ast
import contextlib
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import public_calls
import pytest
import torch
from process_state import of_the_process
from public_calls import CALLS, ROWS, of_density, sampler, text

import whichkl as wk
from whichkl.cluster import Threads
from whichkl.process.lock import PROCESS_LOCK, without_warnings
from whichkl.process.seeds import seeded
from whichkl.user_code import load_function

SOURCE = Path(wk.__file__).parent
HERE = Path(__file__).parent
TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "MKL_NUM_THREADS": "2"}


@pytest.fixture(scope="module")
def expected():
    return {name: text(name) for name in CALLS}


def in_fresh_process(*command):
    """Run Python where torch has two threads; the tests' own process has one."""
    path = os.pathsep.join([str(SOURCE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **TWO_THREADS, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


# ---- what a call leaves behind


def test_no_public_call_changes_the_process():
    done = in_fresh_process(str(HERE / "process_state.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_torchs_linear_algebra_stays_right_for_every_number_of_parts_and_threads():
    code = """
import torch
from process_state import of_a_new_thread, of_a_thread
from whichkl.cluster import Threads
from whichkl.process.threads import one_thread
before = of_a_thread(), of_a_new_thread()
assert before[0]["threads of torch"] == 2 and not before[0]["wrong linear algebra"]
for count in (1, 2, 5):
    for parts in (1, 2, 7):
        during = []
        for seen in Threads(count).map(lambda _: torch.get_num_threads(), range(parts)):
            during.append((seen, torch.get_num_threads()))
        assert during == [(1, 2)] * parts, during
        assert (of_a_thread(), of_a_new_thread()) == before
with one_thread():
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1
    assert of_a_new_thread() == before[1]
assert (of_a_thread(), of_a_new_thread()) == before
"""
    done = in_fresh_process("-c", code)
    assert done.returncode == 0, done.stderr


def test_small_work_has_one_thread_and_large_work_the_users_number():
    code = """
import torch, whichkl as wk
from whichkl.process.threads import few_threads, one_thread, threads_for
weights = torch.ones(1 << 12, dtype=torch.float64)  # 2.4 million numbers at 600 points
seen = {"small": set(), "large": set()}
def small(x):
    seen["small"].add((len(x) > 1, torch.get_num_threads()))
    return -x.square().sum(-1)
def large(x):
    seen["large"].add((len(x) > 600, torch.get_num_threads()))
    return -x.square().sum(-1) * (x.sum(-1, keepdim=True) * 0 + weights).mean(-1)
for function in (small, large):
    wk.fit(wk.Target(log_prob=function, dim=1))
    assert torch.get_num_threads() == 2
assert (True, 1) in seen["small"] and (True, 2) not in seen["small"], seen
assert (True, 2) in seen["large"] and (True, 1) not in seen["large"], seen
with few_threads():
    with threads_for(1), few_threads():
        assert torch.get_num_threads() == 1
    with threads_for(1 << 30), threads_for(1 << 30):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
    with one_thread(), threads_for(1 << 30):  # a part of a pass: its rounding must not depend on the number
        assert torch.get_num_threads() == 1
assert torch.get_num_threads() == 2
with one_thread(), few_threads(), threads_for(1 << 30):
    assert torch.get_num_threads() == 1
with threads_for(1 << 30):
    assert torch.get_num_threads() == 2
"""
    done = in_fresh_process("-c", code)
    assert done.returncode == 0, done.stderr


def test_a_threads_own_number_is_put_back_and_not_taken_for_the_processs():
    code = """
import threading, torch
from whichkl.process.threads import one_thread
from process_state import of_a_new_thread
torch.set_num_threads(3)
def mine():
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
thread = threading.Thread(target=mine); thread.start(); thread.join()
assert torch.get_num_threads() == 3 and of_a_new_thread()["threads of torch"] == 2
"""
    done = in_fresh_process("-c", code)
    assert done.returncode == 0, done.stderr


def test_wide_rows_are_fitted_right_also_where_the_user_has_set_torchs_threads():
    code = """
import torch, whichkl as wk
torch.set_num_threads(2)
x = torch.randn(1000, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
fit = wk.fit(x, "mixture:2", judge=False)
assert bool(fit.model.log_prob(x).isfinite().all()) and fit.status == "converged"
full = wk.fit(x, judge=False).model
centred = x - x.mean(0)
torch.testing.assert_close(full.covariance_matrix, centred.T @ centred / len(x))
"""
    done = in_fresh_process("-c", code)
    assert done.returncode == 0, done.stderr
    assert "oneMKL ERROR" not in done.stdout + done.stderr


def test_a_file_of_the_users_that_changes_the_path_loses_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text("import sys\nsys.path.insert(0, 'first')\ndef f(x):\n    return x\n")
    before = list(sys.path)
    assert load_function(f"{tmp_path}/own.py:f", "--log-prob own.py:f")(1) == 1
    assert sys.path == ["first", *before]


# ---- modes

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
    "warnings are errors": lambda: every_warning("error"),
}

TOGETHER = [("inference mode", "NumPy raises", "warnings are errors"), ("float16 by default", "meta by default")]
"""Modes that the quick run sets at once; the slow one sets each alone."""


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def every_warning(action):
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
@pytest.mark.parametrize("modes", [*TOGETHER, *(pytest.param((one,), marks=pytest.mark.slow) for one in MODES)], ids=" and ".join)
def test_no_mode_of_the_user_changes_a_result(modes, expected):
    other = {}
    public_calls.networks.cache_clear()  # what several calls share is made under the mode, too
    public_calls.some_fit.cache_clear()
    for name in CALLS:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(MODES[mode]())
            try:
                found = text(name)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
        if found != expected[name]:
            other[name] = (found[:300], expected[name][:300])
    assert not other


def test_tensors_made_under_inference_mode_are_as_good_as_others():
    with torch.inference_mode():
        place, weight = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
        rows, net = ROWS.clone(), torch.nn.Linear(2, 3)
        law = torch.distributions.Normal(place, weight.sqrt())
        target = wk.Target(log_prob=lambda x: -(weight * (x - place).square()).sum(-1), dim=2)
        energy = wk.Target(energy=torch.nn.Linear(2, 1), dim=2, support="unit_interval")
    assert rows.is_inference()
    for mode in (torch.inference_mode(), contextlib.nullcontext()):
        with mode:
            torch.testing.assert_close(wk.fit(target).model.mean, place.clone())
            wk.fit(target, "mixture:2", objective="reverse_kl")
            wk.fit(torch.distributions.Independent(law, 1), "mixture:2", objective="reverse_kl")
            wk.fit(energy)
            wk.fit(rows, wk.families.Flow(transforms=1, bins=4, hidden=(4,)), solver=public_calls.SHORT)
            wk.fit(wk.Target(samples=rows, weights=torch.ones(len(rows))), "mixture:2")
            wk.distill(teacher=net, student=net, data=rows.float(), epochs=1)
    value, score = target.value_and_score(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(score, torch.tensor([[2.0, -6.0]] * 2, dtype=torch.float64))


def test_a_users_functions_see_the_users_own_defaults():
    seen = set()

    def log_prob(x):
        seen.add((torch.get_default_dtype(), str(torch.empty(0).device)))
        return -x.square().sum(-1)

    def draw(n):
        seen.add((torch.get_default_dtype(), str(torch.empty(0).device)))
        return torch.zeros(n, 2, device="cpu") + torch.arange(n, device="cpu")[:, None] * torch.tensor([1.0, -2.0], device="cpu")

    with default_dtype(torch.float16), torch.device("meta"):
        wk.fit(wk.Target(log_prob=log_prob, dim=2))
        wk.Target(sampler=draw, dim=2).draws(5, seed=0)
    assert seen == {(torch.float16, "meta")}


def test_a_gradient_that_is_nan_outside_the_support_needs_no_search_without_anomaly_detection():
    target = of_density(public_calls.edged)
    plain = target.trial(ROWS)
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = of_density(public_calls.edged).trial(ROWS)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


# ---- threads at once


def test_four_threads_at_once_get_the_same_answers_as_one(expected):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = of_the_process()
    names = [name for name in CALLS for _ in range(2)]
    random.Random(0).shuffle(names)  # noqa: S311
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(text, names))
    assert [name for name, one in zip(names, found, strict=True) if one != expected[name]] == []
    after = of_the_process()
    assert {name: after[name] for name in before if after[name] != before[name]} == {}


def slow_sampler(n):
    first = torch.randn(n, 1).double()
    time.sleep(0.005)
    return torch.cat([first, first / 2 + torch.from_numpy(np.random.normal(size=(n, 1)))], 1)


def test_a_slow_sampler_without_a_generator_gives_every_thread_the_same_fit():
    def one(_=0):
        return wk.fit(wk.Target(sampler=slow_sampler, dim=2), judge=False).model.loc.tolist()

    alone = one()
    states = torch.get_rng_state(), np.random.get_state()[1]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(8))) == [alone] * 8
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])


def test_seeds_set_within_seeds_are_put_back_in_order():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(3)
        with seeded(4):
            torch.rand(3)
        second = torch.rand(3)
    with seeded(3):
        assert torch.equal(torch.rand(6), torch.cat([first, second]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sampler_that_fits_for_itself_does_not_wait_for_ever():
    def inner(n):
        model = wk.fit(ROWS, public_calls.Bell(), solver=public_calls.SHORT).model
        means = list(Threads(2).map(lambda _: model.mean, range(4)))
        return sampler(n) + means[0]

    done = []
    thread = threading.Thread(target=lambda: done.append(wk.Target(sampler=inner, dim=2).draws(5, seed=0)), daemon=True)
    thread.start()
    thread.join(60)
    assert len(done) == 1


def test_parts_that_draw_under_seeds_do_not_wait_for_their_caller():
    def part(i):
        with seeded(i):
            return float(torch.rand(()))

    alone = [part(i) for i in range(6)]
    assert list(Threads(2).map(part, range(6))) == alone
    with seeded(7):
        assert list(Threads(2).map(part, range(6))) == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")
def test_a_child_forked_while_another_thread_holds_the_lock_is_not_stuck():
    held, free = threading.Event(), threading.Event()

    def hold():
        with seeded(0):
            held.set()
            free.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with seeded(1):
                list(Threads(2).map(str, range(3)))
            code = 0
        finally:
            os._exit(code)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    free.set()
    thread.join()
    assert ended, "the child waited for a lock that nobody holds"
    assert os.waitstatus_to_exitcode(status) == 0


def test_filters_of_warnings_are_put_back_whichever_thread_ends_first():
    before = list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with without_warnings():
            inside.set()
            leave.wait(0.2)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(60)
    with without_warnings():
        leave.set()
    thread.join()
    assert warnings.filters == before


def test_the_lock_knows_its_owner():
    assert not PROCESS_LOCK.is_mine
    with PROCESS_LOCK.held(), PROCESS_LOCK.held():
        assert PROCESS_LOCK.is_mine
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lambda: PROCESS_LOCK.is_mine).result()
    assert not PROCESS_LOCK.is_mine


# ---- rules that hold for every file


def calls_in_the_source():
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node, ast.unparse(node.func)


_OF_NUMBERS = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace", "logspace", "tensor", "as_tensor", "asarray"}
_OF_WHOLE_NUMBERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}


def test_every_tensor_is_made_with_a_dtype_and_a_device():
    """A call of torch that makes a tensor names `dtype=` and `device=`, since the defaults are the user's.

    Calls that make whole numbers need no dtype, nor does `arange` of whole numbers. `x.new_zeros` and `torch.zeros_like` follow
    their tensor and need neither.
    """
    missing = []
    for place, node, name in calls_in_the_source():
        short = name.removeprefix("torch.")
        if name == short or short not in _OF_NUMBERS | _OF_WHOLE_NUMBERS or any(one.arg is None for one in node.keywords):
            continue
        needed = {"device"} | ({"dtype"} if short in _OF_NUMBERS or has_a_fraction(node) else set())
        missing += [(place, name, gap)] if (gap := needed - {one.arg for one in node.keywords}) else []
    assert not missing


def test_no_choice_is_between_two_plain_numbers():
    """`torch.where(condition, 1.0, 2.0)` has the default dtype: at least one of the two has to be a tensor."""
    wrong = [
        place
        for place, node, name in calls_in_the_source()
        if name == "torch.where" and all(is_a_number(one) for one in node.args[1:]) and has_a_fraction(node)
    ]
    assert not wrong


def test_global_states_are_set_in_one_place_each():
    """Threads, seeds and filters of warnings are each set by one file of `process`; nobody sets defaults."""
    homes = {
        "set_num_threads": None,
        "set_num_interop_threads": None,
        "set_default_dtype": None,
        "set_default_device": None,
        "set_grad_enabled": None,
        "set_detect_anomaly": None,
        "use_deterministic_algorithms": None,
        "seterr": None,
        "chdir": None,
        "fork_rng": "process/seeds.py",
        "catch_warnings": "process/lock.py",
        "simplefilter": "process/lock.py",
        "filterwarnings": "process/lock.py",
    }
    wrong = [
        (place, name)
        for place, _, name in calls_in_the_source()
        if (last := name.split(".")[-1]) in homes
        and place.split(":")[0] not in (homes[last], "distillation/examples.py" if last == "fork_rng" else None)
    ]
    wrong += [(place, name) for place, _, name in calls_in_the_source() if name in ("torch.manual_seed", "np.random.seed")]
    assert [one for one in wrong if not one[0].startswith("process/seeds.py")] == []


def test_matrices_in_batches_are_not_factorised_by_lu():
    """Torch's LU of a batch can be wrong once anybody has set its threads (pytorch/pytorch#141358); Cholesky is right.

    The calls that are left take one matrix, or run in one thread.
    """
    by_lu = ("inv", "solve", "slogdet", "det", "lu_factor", "lu", "inv_ex", "solve_ex")
    names, left = ("torch.logdet", "torch.det", "torch.inverse", *(f"torch.linalg.{one}" for one in by_lu)), {}
    for place, _, name in calls_in_the_source():
        if name in names:
            left.setdefault(place.split(":")[0], []).append(name.split(".")[-1])
    assert left == {
        "diagnostics/columns.py": ["slogdet"],
        "diagnostics/weights.py": ["solve", "logdet", "logdet", "logdet"],
        "divergences/exact/charts.py": ["solve", "solve"],
        "divergences/exact/gaussians.py": ["inv"],
        "divergences/exact/line_distances.py": ["solve"],
        "families/linear_gaussian.py": ["solve"],
        "solvers/draws/sticking_the_landing.py": ["solve"],
    }


_FRACTIONS = ("math.inf", "math.nan", "math.pi", "torch.inf", "torch.nan", "torch.pi")


def has_a_fraction(node):
    parts = [one for one in ast.walk(node) if isinstance(one, (ast.Constant, ast.Attribute))]
    return any(isinstance(getattr(one, "value", None), float) or ast.unparse(one) in _FRACTIONS for one in parts)


def is_a_number(node):
    if isinstance(node, ast.UnaryOp):
        return is_a_number(node.operand)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "torch.where" and all(is_a_number(one) for one in node.args[1:])
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) in _FRACTIONS
    return isinstance(node, ast.Constant)


def test_autocast_around_a_call_changes_no_result():
    def weights():
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        teacher = torch.nn.Linear(4, 3)
        found = wk.distill(teacher=teacher, student=lambda: torch.nn.Linear(4, 3), data=x, epochs=2)
        return found.student.weight.detach()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = weights()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(under, weights())
