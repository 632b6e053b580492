"""What the commands print, whatever the terminal, the encoding, the data or the end of the pipe."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from programs import whichkl
from whichkl.commands import console
from whichkl.printable import printable, spelled
from whichkl.study import Progress
from whichkl.study.ledger import Stored
from whichkl.study.live import LiveTable

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HOSTILE = {
    "clear": "\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;AAAA\x1b\\",
    "c1": "\x9b2J",
    "return": "all is well\rerror",
    "backspace": "a\x08b",
    "delete": "a\x7fb",
    "override": "a\u202etxt.csv",
    "isolate": "\u2066a\u2069",
    "marks": "\u200ea\u200fb\u061c",
}
MODEL = """
import torch
def f(x):
    return -x.square().sum(-1)
def loud(x):
    print("from the log density")
    return -x.square().sum(-1)
print("from the file")
"""


def fresh(*arguments, cwd=None, env=None, redirect=None, stdout=subprocess.PIPE):
    """Run the command in a Python of its own, whose streams are what this test is about; bytes come back."""
    settings = {**os.environ, "COLUMNS": "100", **(env or {})}
    command = [sys.executable, "-m", "whichkl", *map(str, arguments)]
    if redirect is not None:
        command = ["bash", "-c", f'"$@" {redirect}', "bash", *command]
    return subprocess.run(command, cwd=cwd, env=settings, stdout=stdout, stderr=subprocess.PIPE, check=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(60, 2)))
    return tmp_path


# Encodings

ESTIMATE = ("estimate", "--p", "Normal(0,1)", "--q", "Normal(1,2)")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "ascii:strict", "cp437", "latin-1", "utf-8"])
def test_a_table_and_its_sentences_are_readable_in_every_encoding(encoding):
    done = whichkl(*ESTIMATE, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert ("KL(p‖q)" if encoding == "utf-8" else "KL(p||q)") in done.stdout
    assert "0.443147 nats" in done.stdout
    assert "\\u" not in done.stdout and done.stderr == ""


def test_the_posix_locale_without_coercion_gets_ascii(folder):
    env = {"LC_ALL": "POSIX", "LANG": "", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = fresh("fit", "--log-prob", "model.py:f", "--dim", 2, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "k-hat below" in text and "+-" in text


def test_advice_help_and_errors_are_ascii_where_that_is_all_there_is(folder):
    for arguments, code in (
        (("advise", "--access", "log_prob"), 0),
        (("fit", "--help"), 0),
        (("fit", "x.npy", "--family", "é‖"), 2),
    ):
        done = whichkl(*arguments, cwd=folder, encoding="ascii")
        assert done.returncode == code
        assert (done.stdout + done.stderr).isascii() and "Traceback" not in done.stderr


def test_json_is_json_in_every_encoding(folder):
    for encoding in ("ascii", "cp1252"):
        done = whichkl(*ESTIMATE, "--json", encoding=encoding)
        assert done.stdout.isascii() and "KL(p‖q)" in json.loads(done.stdout)["sentence"]


def test_progress_and_live_tables_fit_an_ascii_terminal():
    for draw in (_progress, _live):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
        text = draw(stream, "k̂ ‖ …")
        assert "k-hat || ..." in text
        assert text.isascii()


def test_every_character_has_a_spelling_or_an_escape():
    assert spelled("‖ ± … k̂ ½ → ≥ − ·", "ascii") == "|| +- ... k-hat 1/2 -> >= - -"
    assert spelled("10⁴ x₁ σ²", "ascii") == "10^4 x_1 sigma^2"
    assert spelled("± ‖ …", "cp1252") == "± || …"
    assert spelled("日本", "ascii") == "\\u65e5\\u672c"
    assert spelled("😀", "latin-1") == "\\U0001f600"


# Control characters


def assert_safe(result, *shown):
    both = result.stdout + result.stderr
    assert not UNSAFE.search(both), repr(UNSAFE.search(both))
    assert "Traceback" not in both
    for one in shown:
        assert printable(one) in both or repr(one)[1:-1] in both  # an escape of either kind


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_of_a_column_name_are_shown(folder, text):
    pa.parquet.write_table(pa.table({text: [1.0, float("nan"), 3.0]}), folder / "e.parquet")
    result = whichkl("fit", "e.parquet", cwd=folder)
    assert result.returncode == 2
    assert_safe(result, text)


def test_control_characters_of_cells_files_options_and_usage_are_shown(folder):
    evil = HOSTILE["clear"] + HOSTILE["override"]
    (folder / "cell.csv").write_text(f"a,b\n1,{evil}\n")
    (folder / f"{evil}.csv").write_text("a,b\n1,x\n")
    (folder / "raises.py").write_text(f"def f(x):\n    raise ValueError({evil!r})\n")
    for arguments, code in (
        (("fit", "cell.csv"), 2),
        (("fit", f"{evil}.csv"), 2),
        (("fit", f"{evil}.npy"), 2),
        (("fit", "--log-prob", "raises.py:f", "--dim", "2"), 3),
        (("fit", "x.npy", "--family", evil), 2),
        (("fit", "x.npy", "--support", evil), 2),
        (("fit", "x.npy", evil), 2),
        (("fit", f"--{evil}"), 2),
        ((evil,), 2),
        (("compare", f"{evil}.yaml"), 2),
        (("estimate", "--p", evil, "--q", "Normal(0,1)"), 2),
    ):
        result = whichkl(*arguments, cwd=folder)
        assert result.returncode == code, (arguments, result.stderr)
        assert_safe(result)


def test_an_error_stays_one_line_whatever_newlines_a_name_has(folder):
    pa.parquet.write_table(pa.table({"a\nerror: forged\n": [1.0, float("nan"), 3.0]}), folder / "e.parquet")
    result = whichkl("fit", "e.parquet", cwd=folder)
    assert result.stderr.count("\n") == 1
    assert "a\\nerror: forged\\n" in result.stderr


def test_results_with_hostile_names_are_shown(folder):
    evil = HOSTILE["title"] + HOSTILE["isolate"]
    rows = np.random.default_rng(0).normal(size=(50, 2))
    pa.parquet.write_table(pa.table({evil: rows[:, 0], "b": rows[:, 1]}), folder / "e.parquet")
    for arguments in (("fit", "e.parquet", "--family", "product"), ("advise", "e.parquet")):
        result = whichkl(*arguments, cwd=folder)
        assert result.returncode == 0, result.stderr
        assert_safe(result)
    told = json.loads(whichkl("fit", "e.parquet", "--json", cwd=folder).stdout)
    assert told["names"] == [evil, "b"]


def test_hostile_names_of_metrics_and_notes_are_shown(folder):
    evil = "\x1b[31mred\u202e"
    (folder / "metric.py").write_text(f"def m(model, x):\n    raise ValueError({evil!r})\nm.__name__ = {evil!r}\n")
    lines = ["target: x.npy", "families: [gaussian]", "seeds: 1", 'metrics: [forward_kl, "metric.py:m"]']
    (folder / "s.yaml").write_text("\n".join(lines))
    result = whichkl("compare", "s.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert_safe(result)


def _progress(stream, text):
    terminal = console._Console(file=stream, force_terminal=True, width=80)
    before, console.ERR = console.ERR, terminal
    try:
        with console.progress() as tell:
            tell(text, 0.5)
    finally:
        console.ERR = before
    return _without_rich(stream)


def _live(stream, text):
    row = {"family": text, "objective": "forward_kl", "status": "converged", "seed": 0}
    with LiveTable(console._Console(file=stream, force_terminal=True, width=100)) as live:
        live.tell(Progress(1, 2, 0, 0, Stored("k", row, {}, {}, {})))
        live.live.refresh()
    return _without_rich(stream)


def _without_rich(stream):
    """What was drawn, less the sequences that rich itself sends: colours and movements of the cursor."""
    stream.flush()
    text = stream.buffer.getvalue().decode(stream.encoding)
    return re.sub(r"\x1b\[(\?25[lh]|[0-9;]*[mAK]|1A|2K)|\r", "", text)


@pytest.mark.parametrize("draw", [_progress, _live])
@pytest.mark.parametrize("text", ["\x1b[2J", "\x1b]52;c;AA\x07", "a\u202eb", "\x9b2J"])
def test_progress_and_live_tables_show_control_characters(draw, text):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    seen = draw(stream, text)
    assert not UNSAFE.search(seen)
    assert printable(text) in seen


# Where the output goes


def test_a_full_disk_under_standard_output_is_exit_four(folder):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    for arguments in (("fit", "x.npy"), ("fit", "x.npy", "--json"), ("--help",), ("--version",)):
        done = whichkl(*arguments, cwd=folder, stdout="/dev/full")
        assert done.returncode == 4, done.stderr
        assert done.stderr.startswith("error: Cannot print the result: No space left on device.")
        assert done.stderr.count("\n") == 1


def test_a_result_that_could_not_be_printed_is_said_to_be_saved(folder):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = whichkl("fit", "x.npy", "--out", "o", cwd=folder, stdout="/dev/full")
    assert done.returncode == 4
    first, last = done.stderr.splitlines()
    assert first == "The fit is saved in `o/fit`." and "No space left" in last
    assert (folder / "o" / "fit" / "fit.json").is_file()


def test_a_closed_pipe_ends_quietly(folder):
    read, write = os.pipe()
    os.close(read)
    for arguments in (("fit", "x.npy"), ("fit", "x.npy", "--json"), ("fit", "--help")):
        done = fresh(*arguments, cwd=folder, stdout=write)
        assert done.returncode == 141
        assert done.stderr == b""
    os.close(write)


def test_closed_standard_streams(folder):
    done = fresh("fit", "x.npy", "--out", "o", cwd=folder, redirect=">&-")
    assert done.returncode == 4
    assert done.stderr.decode().startswith("error: Cannot print the result: standard output is closed.")
    assert not (folder / "o").exists()
    done = fresh("fit", "x.npy", cwd=folder, redirect="2>&-")
    assert done.returncode == 0
    assert b"forward_kl" in done.stdout
    assert fresh("fit", "nowhere.npy", cwd=folder, redirect="2>&-").returncode == 2
    if os.path.exists("/dev/full"):
        assert fresh("fit", "x.npy", "--out", "o", cwd=folder, redirect="2> /dev/full").returncode == 0


def test_what_user_code_prints_stays_out_of_the_result(folder):
    result = whichkl("fit", "--log-prob", "model.py:loud", "--dim", "2", "--json", cwd=folder)
    assert json.loads(result.stdout)["objective"] == "reverse_kl"
    assert "from the file" in result.stderr and "from the log density" in result.stderr
    text = whichkl("fit", "--log-prob", "model.py:loud", "--dim", "2", cwd=folder)
    assert "from the" not in text.stdout and "reverse_kl" in text.stdout


def test_what_libraries_and_child_processes_print_stays_out_of_the_result(folder):
    code = """
import os, subprocess, sys
def f(x):
    os.write(1, b"raw")
    sys.__stdout__.write("hidden")
    if len(x) == 1:
        subprocess.run([sys.executable, "-c", "print('child')"])
    return -x.square().sum(-1)
"""
    (folder / "noisy.py").write_text(code)
    found = whichkl("fit", "--log-prob", "noisy.py:f", "--dim", 1, "--json", cwd=folder)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["solver"] == "natural_gradient"
    assert all(text in found.stderr for text in ("raw", "hidden", "child"))


def test_loading_the_command_line_changes_nothing_of_the_process():
    code = """
import codecs, signal, sys
before = (sys.stdout, sys.stderr, sys.unraisablehook, *(signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)))
errors = sys.stdout.errors
import whichkl.cli, whichkl.commands.exits, whichkl.commands.console
after = (sys.stdout, sys.stderr, sys.unraisablehook, *(signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)))
assert before == after and sys.stdout.errors == errors
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_hostile_names_are_shown_in_files_that_a_terminal_may_print(folder):
    evil = HOSTILE["clear"] + HOSTILE["override"]
    (folder / "metric.py").write_text(f"def m(model, x):\n    raise ValueError({evil!r})\nm.__name__ = {evil!r}\n")
    lines = ["target: x.npy", "families: [gaussian]", "seeds: 1", 'metrics: [forward_kl, "metric.py:m"]']
    (folder / "s.yaml").write_text("\n".join(lines))
    assert whichkl("compare", "s.yaml", "--out", "o", cwd=folder).returncode == 0
    for name in ("table.csv", "report.md", "metrics.jsonl"):
        text = (folder / "o" / name).read_text()
        assert not UNSAFE.search(text), name
    page = (folder / "o" / "report.html").read_text()
    ours = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    assert not UNSAFE.search(ours)
    assert "\\u202etxt.csv" in ours
