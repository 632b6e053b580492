"""Workers: the same bits from one thread, several, and a Ray cluster, also one that loses a machine."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import whichkl as wk
from whichkl._checks import InputError, ResourceError
from whichkl.cluster import AHEAD, Ray, Threads, workers_of
from whichkl.solvers import ClosedForm
from whichkl.solvers.work import Work


def gram(seed):
    x = torch.randn(20_000, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x


def slowly(seed):
    time.sleep(0.4)
    return gram(seed), os.getpid()


def half(number):
    return number / 2 if number < 3 else 1 / 0


def refuse(number):
    raise InputError(f"Cannot use part {number}: it is bad. Drop it.")


def die(_):
    os._exit(1)


def total(workers, items=12):
    result = torch.zeros(9, 9, dtype=torch.float64)
    for one in workers.map(gram, range(items)):
        result += one
    return result


def folder_of(path):
    path.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(3):
        x = rng.standard_normal((30_000 + 7 * shard, 3)) @ np.array([[1, 0.3, 0], [0, 2, 0.1], [0, 0, 1]]) + shard
        table = pa.table(dict(zip("abc", x.T, strict=True)))
        pyarrow.parquet.write_table(table, path / f"{shard}.parquet", row_group_size=10_000)
    return path


def solved(target, workers):
    model = ClosedForm().solve(target.unconstrained(), wk.families.Gaussian(), 0, Work(workers=workers)).best.model
    return torch.cat([model.loc[None], model.scale_tril])


def test_threads_give_the_same_bits_in_the_order_of_the_parts():
    first = total(Threads(1))
    assert torch.equal(first, total(Threads(2)))
    assert torch.equal(first, total(Threads(5)))
    assert list(Threads(3).map(str, range(20))) == [str(i) for i in range(20)]
    assert list(Threads(3).map(str, [])) == []


def test_threads_leave_torchs_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for count in (1, 2):
            seen = list(Threads(count).map(lambda _: torch.get_num_threads(), range(4)))
            assert seen == [1] * 4
            assert torch.get_num_threads() == 2
            abandoned = Threads(count).map(gram, range(4))
            next(abandoned)
            abandoned.close()
            assert torch.get_num_threads() == 2
        with pytest.raises(InputError, match="part 0"):
            list(Threads(2).map(refuse, range(4)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_run_a_bounded_number_of_parts_ahead():
    started, lock = [], threading.Lock()

    def note(item):
        with lock:
            started.append(item)
        return item

    results = Threads(2).map(note, range(100))
    next(results)
    time.sleep(0.05)
    assert len(started) <= AHEAD * 2 + 1
    results.close()
    assert len(started) <= AHEAD * 2 + 1


def test_without_a_cluster_nothing_of_ray_is_imported():
    code = (
        "import sys, torch, whichkl as wk; from whichkl.cluster import workers_of; "
        "fit = wk.fit(torch.randn(100, 2, dtype=torch.float64)); workers_of(None); workers_of('auto'); "
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_cluster_that_has_nothing_to_do_is_mentioned():
    target = wk.Target(log_prob=lambda x: -x.square().sum(-1), dim=1)
    notes = [wk.fit(target, cluster=cluster).diagnostics.notes for cluster in (None, Threads())]
    assert not any("cluster" in note for note in notes[0]) and any("the cluster wasn't used" in note for note in notes[1])


@pytest.mark.parametrize("wrong", ["here", 3, "", object()])
def test_other_clusters_are_refused(wrong):
    with pytest.raises(InputError, match="neither 'auto' nor an address"):
        workers_of(wrong)


def test_an_address_where_nobody_answers_is_refused():
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    with pytest.raises(ResourceError, match=r"cluster='127.0.0.1:1'.*no Ray cluster answers there.*ray start --head"):
        list(Ray("127.0.0.1:1").map(gram, range(2)))


def in_fresh_process(function, *arguments):
    """Ray leaves threads and sockets behind, which later tests would be blamed for."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_sent, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        kind, value = receive.recv()
    finally:
        process.join()
        receive.close()
    if kind == "error":
        pytest.fail(value)
    return value


def _sent(send, function, arguments):
    import traceback

    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import tests
    try:
        send.send(("value", function(*arguments)))
    except BaseException:
        send.send(("error", traceback.format_exc()))


def settings():
    kept = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return signal.getsignal(signal.SIGTERM), sys.excepthook, faulthandler.is_enabled(), kept


def one_node(folder):
    import ray

    signal.signal(signal.SIGTERM, lambda *_: None)
    before = settings()
    workers, messages = Ray("local", most=2), []
    assert list(workers.map(half, range(3))) == [0.0, 0.5, 1.0]
    assert settings() == before, "Ray's own settings end with the pass that started it"
    try:
        for function, count in ((half, 9), (refuse, 3), (die, 3)):
            try:
                list(Ray(retries=0).map(function, range(count)))
            except (ZeroDivisionError, InputError, ResourceError) as error:
                messages.append((type(error).__name__, str(error)))
            assert settings() == before
        time.sleep(1)  # Ray reports errors that nobody took a second later
        return total(Ray()).numpy(), solved(wk.Target.of(folder), Ray()).numpy(), messages
    finally:
        ray.shutdown()


def test_ray_gives_the_same_bits_and_readable_errors_and_leaves_the_process_as_it_was(tmp_path, capfd):
    pytest.importorskip("ray")
    folder = folder_of(tmp_path / "data")
    by_ray, fit_by_ray, messages = in_fresh_process(one_node, folder)
    assert "ZeroDivisionError" not in capfd.readouterr().err  # an error that nobody took
    np.testing.assert_array_equal(by_ray, total(Threads(1)).numpy())
    target = wk.Target.of(folder)
    assert len(target.stream.parts) == 3
    np.testing.assert_array_equal(fit_by_ray, solved(target, Threads(1)).numpy())
    np.testing.assert_array_equal(fit_by_ray, solved(target, Threads(2)).numpy())
    assert messages[0] == ("ZeroDivisionError", "division by zero")
    assert messages[1] == ("InputError", "Cannot use part 0: it is bad. Drop it.")
    assert messages[2][0] == "ResourceError"
    assert messages[2][1].startswith("Cannot go on with this pass: a part of the data was lost 1 times (WorkerCrashedError")


def two_nodes(folder):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        result, processes = torch.zeros(9, 9, dtype=torch.float64), []
        for number, (one, process) in enumerate(Ray().map(slowly, range(12))):
            result += one
            processes.append(process)
            if number == 3:
                cluster.remove_node(lost, allow_graceful=False)
        for _ in range(60):  # the head notices a loss by heartbeats
            alive = sum(node["Alive"] for node in ray.nodes())
            if alive == 1:
                break
            time.sleep(0.5)
        return result.numpy(), len(set(processes[:4])), alive, solved(wk.Target.of(folder), Ray()).numpy()
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_a_machine_lost_in_mid_pass_changes_no_bit(tmp_path):
    pytest.importorskip("ray")
    folder = folder_of(tmp_path / "data")
    by_ray, at_work, alive, fit_by_ray = in_fresh_process(two_nodes, folder)
    assert at_work == 2, "both machines were at work before one was lost"
    assert alive == 1
    np.testing.assert_array_equal(by_ray, total(Threads(1)).numpy())
    np.testing.assert_array_equal(fit_by_ray, solved(wk.Target.of(folder), Threads(1)).numpy())
