"""The progress bar: on a terminal only, after two seconds, removed at the end, and never in the way of the work."""

import contextlib
import inspect
import os
import subprocess
import sys

import pytest

import whichkl as wk
from whichkl import progress

pty = pytest.importorskip("pty")  # not on Windows

SLOW = """
import time, whichkl as wk, whichkl.progress as progress
progress._SECONDS_WITHOUT_BAR = {wait}
def log_prob(x):
    time.sleep(0.02)
    return -x.square().sum(-1)
target = wk.Target(log_prob=log_prob, dim=2)
{call}
print("done")
"""
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def on_a_terminal(code, **streams):
    """What a process prints on a terminal; some of its streams may be elsewhere."""
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, **{"stdin": side, "stdout": side, "stderr": side, **streams}
    ) as child:
        os.close(side)
        seen = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal's output with an error
            while part := os.read(main, 65536):
                seen += part
        elsewhere = child.stdout.read().decode() if child.stdout is not None else ""
    os.close(main)
    assert child.returncode == 0, seen.decode()
    return seen.decode(), elsewhere


def test_a_bar_appears_for_a_long_call_and_is_removed():
    seen, _ = on_a_terminal(SLOW.format(wait=0.2, call="wk.fit(target)"))
    assert HIDE in seen and SHOW in seen
    assert "fresh draws" in seen or "judging" in seen or "looking for modes" in seen or "fitting" in seen
    assert seen.rstrip().endswith("done")
    assert "\x1b[2K" in seen[seen.index(SHOW) :]  # the line of the bar is erased


@pytest.mark.parametrize(
    ("wait", "call"),
    [
        (60, "wk.fit(target)"),
        (0.2, "wk.fit(target, tell=lambda step, done: None)"),
        (0.2, "progress.switch_off(); wk.fit(target)"),
    ],
)
def test_nothing_is_printed_for_a_short_call_or_where_the_user_listens(wait, call):
    assert on_a_terminal(SLOW.format(wait=wait, call=call))[0].split() == ["done"]


def test_nothing_is_printed_where_the_output_is_piped():
    seen, piped = on_a_terminal(SLOW.format(wait=0.2, call="wk.fit(target)"), stdout=subprocess.PIPE)
    assert seen == "" and piped == "done\n"


def test_a_study_has_one_bar_with_its_cells():
    call = "wk.compare(target, objectives=['reverse_kl'], seeds=2, metrics=['reverse_kl'])"
    seen, _ = on_a_terminal(SLOW.format(wait=0.2, call=call))
    assert "of 2 cells" in seen and "LiveError" not in seen and seen.count(HIDE) == 1


def test_a_bar_that_fails_does_not_break_the_call():
    call = "import rich.progress; rich.progress.Progress.start = rich.progress.Progress.update = None; wk.fit(target)"
    assert on_a_terminal(SLOW.format(wait=0.1, call=call))[0].split()[-1] == "done"


def test_a_bar_is_free_again_after_an_error(monkeypatch):
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    for _ in range(2):
        with pytest.raises(wk.InputError):
            wk.fit([[1.0, float("nan")]])
    assert progress._ONE_BAR.acquire(blocking=False)
    progress._ONE_BAR.release()


def test_a_decorated_function_keeps_its_name_and_arguments():
    for function in (wk.fit, wk.compare, wk.distill):
        assert "tell" in inspect.signature(function).parameters and function.__name__ in wk.__all__
