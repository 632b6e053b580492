"""YAML files that never end, nest without end, say things twice or are none: refused in one line with its number, in seconds."""

import os

import pytest

from programs import whichkl
from whichkl._checks import InputError, ResourceError, cannot
from whichkl.distillation.job import read_job
from whichkl.study.config import read_plan

NINES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
INLINE = "[&a0 [x]" + "".join(f", &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)) + "]"
REFUSED = {
    "bomb": ("a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + NINES, "line 1: `a0` is an anchor or an alias"),
    "bomb in a value": (f"target: bimodal\nteacher: {INLINE}\n", "line 2: `a0` is an anchor"),
    "a value in itself": ("target: &t [*t]\n", "line 1: `t` is an anchor"),
    "an alias of nothing": ("target: bimodal\nseeds: *s\n", "line 2: `s` is an anchor or an alias"),
    "a merge": ("base: &b {seeds: 1}\n<<: *b\n", "line 1: `b` is an anchor"),
    "lists in lists": ("target: " + "[" * 100_000 + "]" * 100_000, "line 1: it is nested more than 100 times"),
    "open lists": ("target: " + "[" * 100_000, "line 1: it is nested more than 100 times"),
    "mappings in mappings": ("target: " + "{a: " * 100_000, "line 1: it is nested more than 100 times"),
    "indented": ("".join("  " * i + "a:\n" for i in range(400)), "line 100: it is nested more than 100 times"),
    "dashes": ("- " * 100_000, "line 1: it is nested more than 100 times"),
    "questions": ("? " * 100_000, "line 1: it is nested more than 100 times"),
    "a list for a name": ("target: bimodal\n? [a, b]\n: c\n", "line 2: a name isn't text"),
    "a mapping for a name": ("{{a: b}: c}\n", "line 1: a name isn't text"),
    "a number for a name": ("target: bimodal\n1: c\n", "line 2: the name `1` isn't text"),
    "a truth for a name": ("target: bimodal\nyes: c\n", "line 2: the name `yes` isn't text"),
    "nothing for a name": ("target: bimodal\n~: c\n", "line 2: the name `~` isn't text"),
    "a name twice": ("target: bimodal\nseeds: 1\nseeds: 2\n", "line 3: `seeds` is repeated, after line 2"),
    "a name twice, quoted": ("target: bimodal\n'target': x\n", "line 2: `target` is repeated, after line 1"),
    "a name twice, inside": ("target:\n  dim: 1\n  dim: 2\n", "line 3: `dim` is repeated, after line 2"),
    "two documents": ("target: bimodal\n---\ntarget: bimodal\n", "line 2: it isn't YAML"),
    "a tag of Python": ("target: !!python/object/apply:os.system [ls]\n", "line 1: it isn't YAML"),
    "a set": ("target: !!set {a, b}\n", "line 1: it isn't YAML of plain values"),
    "pairs": ("target: !!pairs [a: b]\n", "line 1: it isn't YAML of plain values"),
    "bytes": ("target: !!binary AAAA\n", "line 1: it isn't YAML of plain values"),
    "a tag of one's own": ("target: !mine x\n", "line 1: it isn't YAML of plain values"),
    "a tag by its address": ("%TAG ! tag:example.com,2000:\n---\ntarget: !mine x\n", "line 3: it isn't YAML of plain values"),
    "a long text": ("target: " + "x" * 500_000, "line 1: a value has 500,000 characters"),
    "a long block": ("target: |\n" + "  x\n" * 100_000, "line 1: a value has 200,000 characters"),
    "a long name": ("k" * 1_000 + ": 1\n", "line 1: a name has 1,000 characters"),
    "a very long name": ("? " + "k" * 500_000 + "\n: 1\n", "line 1: a value has 500,000 characters"),
    "a long number": ("target: bimodal\nbudget: " + "9" * 5_000, "line 2: a number has 5,000 characters"),
    "a number in base 60": ("target: bimodal\nbudget: 1" + ":1" * 2_000, "line 2: a number has 4,001 characters"),
    "many values": ("target: bimodal\nseeds: [" + "7, " * 60_000 + "7]\n", "line 2: it has more than 50,000 names and values"),
    "many names": ("".join(f"k{i}: 1\n" for i in range(30_000)), "line 25000: it has more than 50,000 names and values"),
    "more than a megabyte": ("#" * 1_000_001, "it is larger than 1,000,000 bytes"),
    "an open quote": ('target: "' + "x" * 100_000, "line 1: it isn't YAML"),
    "a bell": ("target: bimodal\nseeds: \x07\n", "line 2: it isn't YAML (special characters are not allowed)"),
    "a NUL": ("target: bimodal\n\0", "line 2: it isn't YAML (special characters are not allowed)"),
    "Latin-1": ("target: bimodal\nseeds: größe\n".encode("latin-1"), "line 2: it isn't UTF-8 text"),
    "UTF-16": ("target: bimodal\n".encode("utf-16"), "line 1: it isn't UTF-8 text"),
    "a list": ("- bimodal\n", "line 1: it isn't a mapping"),
    "a text": ("bimodal\n", "line 1: it isn't a mapping"),
    "nothing": ("", "line 1: it isn't a mapping"),
    "a comment": ("# bimodal\n", "line 1: it isn't a mapping"),
    "tabs": ("target: bimodal\n\tseeds: 1\n", "line 2: it isn't YAML"),
}


@pytest.mark.parametrize("read", [read_plan, read_job])
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_plain_mapping_is_refused_with_its_line(tmp_path, name, read):
    text, message = REFUSED[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read(path)
    said = str(error.value)
    assert message in said
    assert len(said) < 500 and "\n" not in said


@pytest.mark.parametrize("read", [read_plan, read_job])
@pytest.mark.parametrize("name", ["nowhere.yaml", "folder", "pipe.yaml", "/dev/zero", "loop.yaml", "x" * 5_000, "", "a\0b"])
def test_a_path_that_names_no_file_is_refused_at_once(tmp_path, name, read):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder").mkdir()
    os.symlink("loop.yaml", tmp_path / "loop.yaml")
    with pytest.raises(InputError, match="Cannot read") as error:
        read(tmp_path / name)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("command", ["compare", "distill"])
@pytest.mark.parametrize(
    "name", ["bomb", "bomb in a value", "a value in itself", "lists in lists", "a list for a name", "nothing"]
)
def test_a_command_refuses_it_in_one_line(tmp_path, command, name):
    (tmp_path / "x.yaml").write_text(REFUSED[name][0])
    done = whichkl(command, "x.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert REFUSED[name][1] in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compare", "distill"])
@pytest.mark.parametrize("place", [".", "folder", "nowhere.yaml"])
def test_a_command_refuses_a_folder_and_a_missing_file_in_one_line(tmp_path, command, place):
    (tmp_path / "folder").mkdir()
    done = whichkl(command, place, cwd=tmp_path)
    assert done.returncode == 2
    assert "Cannot read" in done.stderr and "Traceback" not in done.stderr


STUDIES = {
    "seeds": ("seeds: 99999999999999\n", InputError, "line 2, `seeds`: .*the largest number is 100,000"),
    "draws": ("draws: 99999999999999\n", ResourceError, "score on `draws=99999999999999`: it takes at least"),
    "family": ("families: [" + "x" * 9_000 + "]\n", InputError, "line 2, `families.0`: cannot use the family `x{80} … x{40}`"),
    "objective": ("objectives: [" + "x" * 9_000 + "]\n", InputError, "cannot minimise `x{80} … x{40}`"),
    "many mistakes": ("".join(f"k{i}: 1\n" for i in range(2_000)), InputError, "line 2: .*; and 1,980 more. Correct"),
    "the same family": ("families: [" + "gaussian, " * 2_000 + "gaussian]\n", InputError, "it is in the list twice"),
    "a date": ("budget: 2001-99-99\n", InputError, "line 2, `budget`: input should be a valid integer"),
}


@pytest.mark.parametrize("name", STUDIES)
def test_values_that_would_fill_memory_or_a_screen_are_refused(tmp_path, name):
    text, kind, message = STUDIES[name]
    (tmp_path / "x.yaml").write_text("target: bimodal\n" + text)
    with pytest.raises(kind, match=message) as error:
        read_plan(tmp_path / "x.yaml")
    assert len(str(error.value)) < 4_000


@pytest.mark.parametrize(
    "target",
    [
        "{problem: many_well, arguments: {dim: 100000000000}}",
        "{problem: many_well, arguments: {dim: .nan}}",
        "{problem: many_well, arguments: {dim: text}}",
        "{problem: funnel, arguments: {dim: 100000000000}}",
        "{problem: funnel, arguments: {dim: -1}}",
        "{problem: funnel, arguments: {dim: .inf}}",
        "{problem: posterior, arguments: {name: arK-arK, folder: /dev}}",
        "{samples: " + "x" * 9_000 + ".csv}",
        "{samples: [a.csv, a.csv]}",
        "{samples: []}",
        "x" * 9_000,
        "x" * 9_000 + ".py:f",
        "2001-01-01",
        "Normal(" + "1, " * 2_000 + "1)",
    ],
    ids=lambda text: text[:40],
)
def test_targets_that_cannot_be_are_refused(tmp_path, target):
    (tmp_path / "x.yaml").write_text(f"seeds: 1\ntarget: {target}\n")
    with pytest.raises(InputError, match="line 2") as error:
        read_plan(tmp_path / "x.yaml")
    assert len(str(error.value)) < 1_000


def test_a_job_shows_little_of_a_long_value(tmp_path):
    (tmp_path / "x.yaml").write_text("teacher: a.py:f\nstudent: a.py:f\ndata: [" + "x, " * 20_000 + "x]\n")
    (tmp_path / "a.py").write_text("def f():\n    return None\n")
    with pytest.raises(InputError, match="a `list` has no meaning there") as error:
        read_job(tmp_path / "x.yaml")
    assert len(str(error.value)) < 400


def test_what_is_no_harm_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    for data in (
        b"target: bimodal\nseeds: 2\n",
        b"target: bimodal\r\nseeds: 2\r\n",
        b"\xef\xbb\xbftarget: bimodal\nseeds: 2\n",
        b"--- # a study\ntarget: bimodal\nseeds: [0, 1]\n...\n",
        b"%YAML 1.1\n---\n{target: 'bimodal', \"seeds\": 0x2}\n",
    ):
        path.write_bytes(data)
        assert read_plan(path).seeds == (0, 1)


def test_a_quoted_value_is_kept_to_a_line_and_what_stands_between_values_is_left_alone():
    long, between = "x" * 500, "y" * 500
    said = cannot(f"use `{long}`", f"`a` {between} `b`", "Do")
    assert said == f"Cannot use `{'x' * 80} … {'x' * 40}`: `a` {between} `b`. Do."
    assert cannot("read `a\nb\x1b[31m`", "`größe` is\nwrong", "Do") == "Cannot read `a\\nb\\x1b[31m`: `größe` is\nwrong. Do."
