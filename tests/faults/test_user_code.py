"""A user's file or function that calls sys.exit, or raises what isn't an Exception: an error of ours, never a silent end."""

import asyncio
import sys

import numpy as np
import pytest
import torch
from torch import nn

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError, TargetError
from whichkl.distillation.networks import Teacher
from whichkl.user_code import load_function

AT_IMPORT = {
    "sys.exit(0)": "it called sys.exit(0)",
    "sys.exit()": "it called sys.exit()",
    "exit()": "it called sys.exit()",
    "quit(3)": "it called sys.exit(3)",
    "raise SystemExit('done')": "it called sys.exit('done')",
    "raise GeneratorExit": "it raised GeneratorExit",
    "import asyncio; raise asyncio.CancelledError('no')": "it raised CancelledError: no",
    "raise BaseException('base')": "it raised BaseException: base",
    "raise ValueError('plain')": "it raised ValueError: plain",
}


def leave(*_, **__):
    sys.exit(0)


@pytest.mark.parametrize("code", AT_IMPORT)
def test_a_file_that_ends_the_process_when_it_is_imported(tmp_path, code):
    (tmp_path / "m.py").write_text(f"import sys\ndef f(x): return -x.square().sum(-1)\n{code}\n")
    with pytest.raises(InputError, match=r"Cannot import `m.py`") as caught:
        load_function("m.py:f", "m.py:f", tmp_path)
    assert AT_IMPORT[code] in str(caught.value)
    assert ("__main__" in str(caught.value)) == ("sys.exit" in AT_IMPORT[code])


def test_a_keyboard_interrupt_passes(tmp_path):
    (tmp_path / "m.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_function("m.py:f", "m.py:f", tmp_path)

    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wk.fit(wk.Target(log_prob=stop, dim=1))


def raising(kind):
    def function(*_, **__):
        raise kind

    return function


LEAVERS = {
    "exit": leave,
    "builtin": lambda *_: exit(),
    "generator": raising(GeneratorExit),
    "cancelled": raising(asyncio.CancelledError),
}
TARGETS = {
    "log_prob": lambda f: wk.Target(log_prob=f, dim=2),
    "one point": lambda f: wk.Target(log_prob=f, dim=2, batched=False),
    "energy": lambda f: wk.Target(energy=f, dim=2),
    "score": lambda f: wk.Target(log_prob=lambda x: -x.square().sum(-1), score=f, dim=2),
    "score alone": lambda f: wk.Target(score=f, dim=2),
    "pair": lambda f: wk.Target(log_prob=f, score=True, dim=2),
    "sampler": lambda f: wk.Target(sampler=lambda n: f(n), dim=2),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("leaver", LEAVERS)
def test_functions_of_a_target(kind, leaver):
    with pytest.raises(TargetError, match=r"it called sys.exit|it raised (GeneratorExit|CancelledError)"):
        wk.fit(TARGETS[kind](LEAVERS[leaver]))


def leave_far_out(x):
    if bool((x.abs() > 5).any()):
        sys.exit(0)
    return -x.square().sum(-1)


def test_a_log_density_that_leaves_far_out_only():
    with pytest.raises(TargetError, match=r"it called sys.exit\(0\)"):
        wk.fit(wk.Target(log_prob=leave_far_out, dim=2))


def test_a_metric_that_leaves_is_a_note_and_a_log_density_fails_its_cell():
    x = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    study = wk.compare(x, "gaussian", seeds=1, metrics=["forward_kl", leave])
    assert study.rows[0]["leave"] is None
    assert "it called sys.exit(0)" in study.rows[0]["notes"]
    failed = wk.compare(wk.Target(log_prob=leave_far_out, dim=2), "gaussian", "reverse_kl", seeds=1)
    assert failed.rows[0]["status"] == "failed" and "it called sys.exit(0)" in failed.rows[0]["error"]


def test_an_audited_loss():
    with pytest.raises(InputError, match=r"it called sys.exit\(0\)"):
        wk.audit(leave)


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x):
        sys.exit(0)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        sys.exit(0)


def test_networks_and_data_of_a_distillation():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    for given in ({"teacher": leave}, {"student": leave}, {"teacher": Leaves()}, {"student": Leaves()}, {"data": Rows()}):
        arguments = {"teacher": nn.Linear(2, 2), "student": nn.Linear(2, 2), "data": x, **given}
        with pytest.raises(InputError, match=r"it called sys.exit\(0\)"):
            wk.distill(**arguments, epochs=1)
    with pytest.raises(InputError, match="it called"):
        Teacher(Leaves())(x)
    with pytest.raises(InputError, match=r"Cannot read this DataLoader: it called sys.exit\(0\)"):
        wk.fit(Rows())


MODEL = """
import sys, torch
from torch import nn
def f(x): sys.exit(0)
def fine(x): return -x.square().sum(-1)
def loss(*, teacher, student, mask=None): sys.exit()
def net(): return nn.Linear(2, 2)
def none(): sys.exit(0)
def data(): return torch.randn(60, 2)
def metric(model, x): sys.exit(0)
def asks(x):
    input()
    return -x.square().sum(-1)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("fit", "--log-prob", "m.py:f", "--dim", 2), 3),
        (("fit", "--log-prob", "m.py:asks", "--dim", 2), 3),
        (("advise", "--log-prob", "m.py:f", "--dim", 2), 3),
        (("audit", "m.py:loss"), 2),
        (("distill", "--teacher", "m.py:none", "--student", "m.py:net", "--data", "m.py:data"), 2),
        (("distill", "--teacher", "m.py:net", "--student", "m.py:none", "--data", "m.py:data"), 2),
        (("distill", "--teacher", "m.py:net", "--student", "m.py:net", "--data", "m.py:none"), 2),
        (("compare", "make.yaml"), 2),
    ],
)
def test_commands_have_a_line_and_a_code(tmp_path, arguments, code):
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "make.yaml").write_text("target: m.py:none\n")
    result = whichkl(*arguments, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert "it called sys.exit" in result.stderr or "EOFError" in result.stderr
    assert result.stdout == ""


def test_an_exit_that_nothing_else_catches_is_an_error_all_the_same(tmp_path):
    (tmp_path / "m.py").write_text(
        "import sys\nclass Odd:\n    def __call__(self, x): return -x.square().sum(-1)\n"
        "    @property\n    def __name__(self): sys.exit(0)\nloss = Odd()\n"
    )
    result = whichkl("audit", "m.py:loss", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1


def test_an_unforeseen_error_is_one_line_and_a_traceback_on_demand(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    (tmp_path / "m.py").write_text(
        "class F:\n    @property\n    def __name__(self): return 1 / 0\n    def __call__(self, **k): pass\nf = F()\n"
    )
    plain = whichkl("audit", "m.py:f", cwd=tmp_path)
    assert plain.returncode in (1, 2) and plain.stderr.count("\n") == 1
    debug = whichkl("audit", "m.py:f", "--debug", cwd=tmp_path)
    assert "Traceback (most recent call last)" in debug.stderr
    assert debug.returncode == plain.returncode


def test_a_metric_that_fails_is_named_in_the_printed_result():
    def bad(model, draws):
        sys.exit(0)

    rows = torch.randn(120, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = wk.compare(wk.Target(samples=rows), families="gaussian", objectives="forward_kl", seeds=2, metrics=["khat", bad])
    assert "bad wasn't measured in 2 of 2 cells: it called sys.exit(0)" in str(found)
