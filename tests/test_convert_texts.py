"""Texts of `whichkl convert`: errors in the terms of its options, what was written, and commands in place of attributes."""

import shlex

import numpy as np
import pandas as pd
import pytest

from programs import whichkl

LAWS = ("--prior", "rate=Gamma(2,1)", "--prior", "shift=Normal(0,1)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(3)
    rate, shift = rng.gamma(2.0, size=600), 1.5 * rng.normal(size=600)
    frame = pd.DataFrame({"rate": rate, "a": shift + rng.normal(size=600), "b": rate + rng.normal(size=600), "shift": shift})
    frame.assign(log_q=-1.0).to_csv(home / "runs.csv", index=False)
    return home


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("moments", "--of", "a,b", "--values", "0.7"), "names 2 observables, and `--values` has 1 number"),
        (("moments", "--of", "a", "--values", "1", "--stderr", "1,2"), "2 standard errors for 1 value."),
        (("simulations", *LAWS, "--proposal", "shift="), "it names no law"),
        (("simulations", *LAWS, "--proposal", "Normal(0,2)"), "it doesn't name a parameter"),
        (("simulations", *LAWS, "--proposal", "a=Normal(0,2)"), "`a`, and those of the parameters `rate`, `shift`"),
        (("simulations", *LAWS, "--proposal", "shift"), "Write, say, `--proposal 'shift=Normal(0,2)'`"),
        (("simulations", *LAWS, "--proposal", "log_q", "--proposal", "shift=Normal(0,2)"), "Give that column alone"),
        (("simulations", "--prior", "shift=Normal(0,1.5)", "--proposal", "x1=Normal(0,2)"), "the names are `x1`"),
    ],
)
def test_what_is_wrong_with_an_option_is_said_in_its_terms(folder, command, said):
    run = whichkl("convert", command[0], "runs.csv", *command[1:], cwd=folder)
    assert run.returncode == 2 and said in " ".join(run.stderr.split()), run.stderr


def test_labels_in_words_are_asked_for_as_numbers(tmp_path):
    x = np.random.default_rng(0).normal(size=40)
    frame = pd.DataFrame({"x": x, "ok": x > 0})
    frame.to_csv(tmp_path / "flags.csv", index=False)
    assert whichkl("convert", "labels", "flags.csv", "--passed", "ok", cwd=tmp_path).returncode == 0
    frame.assign(name="a", ok=np.where(x > 0, "yes", "no")).to_csv(tmp_path / "words.csv", index=False)
    run = whichkl("convert", "labels", "words.csv", "--passed", "ok", cwd=tmp_path)
    said = "Cannot use `--passed ok`: this column holds no numbers. Write 1 for draws that passed, and 0 for the others."
    assert run.returncode == 2 and said in " ".join(run.stderr.split())


def test_simulations_name_their_data_and_what_to_type_next(folder):
    proposal = ("--proposal", "shift=Normal(0,1.5)", "--drop", "log_q")
    run = whichkl("convert", "simulations", "runs.csv", *LAWS, *proposal, "--out", "pairs.csv", cwd=folder)
    shown = " ".join(run.stdout.split())
    assert "pairs of the data `a`, `b` and the parameters `rate`, `shift`" in shown
    assert "Wrote pairs.csv: 600 rows of a, b, rate, shift, weight; and pairs.csv.origin.json." in shown
    assert "every fit reports it" in shown and "target.origin" not in shown and "fit.diagnostics" not in shown
    assert "target.origin" not in (folder / "pairs.csv.origin.json").read_text()
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("Next: whichkl ")]
    command = shlex.split(line.removeprefix("Next: whichkl "))[:-2]  # without the family
    for more, said in (
        (("--family", "gaussian"), "Use `--family linear_gaussian`"),
        (("--family", "flow:1"), "The family is written flow[:KIND[:TRANSFORMS"),
        (("--seed", "x"), "It isn't a whole number"),
    ):
        refused = whichkl(*command, *more, cwd=folder)
        assert refused.returncode == 2 and said in " ".join(refused.stderr.split()), refused.stderr
        assert "whichkl.families" not in refused.stderr
