"""Studies in files: what they may say, and the line of whatever they say wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from programs import whichkl
from whichkl._checks import InputError, TargetError
from whichkl.study.config import read_plan
from whichkl.study.plan import family_text

ROOT = Path(__file__).resolve().parents[1]


def plan(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return read_plan(path)


def test_the_example_is_read():
    found = read_plan(ROOT / "examples" / "study.yaml")
    assert (found.source, found.seeds, found.budget) == ("bimodal", tuple(range(6)), 200_000)
    assert [family_text(one) for one in found.families] == ["gaussian", "mixture:2"]
    assert [one.spec for one in found.objectives] == ["forward_kl", "reverse_kl"]
    assert len(found.cells) == 24
    assert len({cell.key for cell in found.cells}) == 24


def test_a_study_needs_no_more_than_a_target(tmp_path):
    found = plan(tmp_path, "target: Normal(0, 1)\n")
    assert found.source == "Normal(0, 1)"
    assert [one.spec for one in found.objectives] == ["forward_kl", "reverse_kl"]
    assert len(found.seeds) == 10


@pytest.mark.parametrize(
    ("target", "source", "access"),
    [
        ("rows.csv", "rows.csv", "samples"),
        ("code.py:make", "code.py:make", "log_prob, differentiable"),
        ("{log_prob: 'code.py:log_prob', dim: 2}", "code.py:log_prob", "log_prob, differentiable"),
        ("{problem: many_well, arguments: {dim: 4}}", "many_well(dim=4)", "sampler, log_prob, differentiable"),
        ("{samples: rows.csv, log_prob: 'code.py:log_prob'}", "rows.csv, code.py:log_prob", "samples, log_prob, differentiable"),
    ],
)
def test_targets_come_in_several_ways(tmp_path, target, source, access):
    np.savetxt(tmp_path / "rows.csv", np.random.default_rng(0).normal(size=(50, 2)), delimiter=",", header="a,b", comments="")
    (tmp_path / "code.py").write_text(
        "import whichkl as wk\n"
        "def log_prob(x):\n    return -x.square().sum(-1)\n"
        "def make():\n    return wk.Target(log_prob=log_prob, dim=2)\n"
    )
    objective = "reverse_kl" if "samples" not in access and "sampler" not in access else "forward_kl"
    found = plan(tmp_path, f"target: {target}\nobjectives: {objective}\n")
    assert (found.source, found.target.access.label) == (source, access)
    assert set(found.codes) == ({"code.py"} if "code.py" in target else set())


WRONG = {
    "unknown field": ("target: bimodal\n\nbudgett: 3\n", "line 3, `budgett`: there is no such field (did you mean `budget`?)"),
    "unknown field inside": (
        "target:\n  problem: bimodal\n  dims: 2\n",
        "line 3, `target.dims`: there is no such field (did you mean `dim`?)",
    ),
    "type": ("target: bimodal\nseeds: 3\nbudget: many\n", "line 3, `budget`: input should be a valid integer"),
    "no seeds": ("target: bimodal\nseeds: ten\n", "line 2, `seeds`: it's neither a whole number nor a list of them. Correct"),
    "nearly a problem": (
        "seeds: 1\ntarget: bimodl\n",
        "line 2: Cannot use the target `bimodl`: it's neither a problem of that name",
    ),
    "argument": ("seeds: 1\ntarget: {problem: many_well, arguments: {dims: 8}}\n", "It takes `dim`"),
    "nearly an objective": ("target: bimodal\nobjectives: foward_kl\n", "Write `forward_kl`, if you meant that"),
    "range": ("target: bimodal\nheld_out: 2.0\n", "line 2, `held_out`: input should be less than or equal to 0.9"),
    "family": (
        "target: bimodal\nfamilies:\n  - gaussian\n  - gausian\n",
        "line 4, `families.1`: cannot use the family `gausian`",
    ),
    "objective": ("target: bimodal\nobjectives: [forward_kl,\n  backward_kl]\n", "line 3, `objectives.1`: cannot minimise"),
    "metric": ("target: bimodal\nmetrics: [fkl]\n", "line 2, `metrics.0`: cannot measure `fkl`"),
    "seeds": ("target: bimodal\nseeds: [1, 1]\n", "line 2, `seeds`: cannot use `seeds=[1, 1]`: one is in it twice"),
    "no target": ("seeds: 2\n", "line 1, `target`: it's missing"),
    "no such problem": ("seeds: 2\ntarget: {problem: bimodall}\n", "line 2, `target.problem`: there is no such problem"),
    "two kinds": ("seeds: 1\ntarget: {problem: bimodal, dim: 1, samples: x.csv}\n", "line 2, `target`: give one of"),
    "no file": ("seeds: 1\ntarget: nowhere.csv\n", "line 2: Cannot read"),
    "no code": ("seeds: 1\ntarget: nowhere.py:make\n", "line 2: Cannot read `nowhere.py`: there is no such file"),
    "no function": ("target: bimodal\nmetrics:\n- khat\n- nowhere.py:f\n", "line 4: Cannot read `nowhere.py`"),
    "syntax": ("target: bimodal\nseeds: [1, 2\nbudget: 3\n", "line 3: it isn't YAML"),
    "twice": ("target: bimodal\nseeds: 2\nseeds: 3\n", "line 3: `seeds` is repeated, after line 2"),
    "no mapping": ("- bimodal\n", "line 1: it isn't a mapping"),
    "a tag": ("target: !!python/object/apply:os.system [ls]\n", "line 1: it isn't YAML"),
}


@pytest.mark.parametrize("name", WRONG)
def test_whatever_is_wrong_is_named_with_its_line(tmp_path, name):
    text, said = WRONG[name]
    with pytest.raises(InputError) as caught:
        plan(tmp_path, text)
    assert said in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path):
    with pytest.raises(InputError, match=r"line 2, `seed`: .*; line 3, `budget`: "):
        plan(tmp_path, "target: bimodal\nseed: 3\nbudget: 0\n")


def test_an_objective_that_the_target_cannot_do_is_refused_with_its_line(tmp_path):
    np.savetxt(tmp_path / "rows.csv", np.random.default_rng(0).normal(size=(50, 2)), delimiter=",", header="a,b", comments="")
    with pytest.raises(
        TargetError, match=r"line 2: Cannot compare `reverse_kl` on this target: it requires `log_prob` or `score`"
    ):
        plan(tmp_path, "target: rows.csv\nobjectives: [forward_kl, reverse_kl]\n")


def test_the_data_and_the_code_are_part_of_a_cells_name(tmp_path):
    path = tmp_path / "rows.csv"
    x = np.random.default_rng(0).normal(size=(50, 2))
    np.savetxt(path, x, delimiter=",", header="a,b", comments="")
    text = "target: rows.csv\nmetrics: ['own.py:m']\n"
    (tmp_path / "own.py").write_text("def m(model, draws):\n    return 1.0\n")
    first = plan(tmp_path, text).cells[0].key
    assert plan(tmp_path, text).cells[0].key == first
    (tmp_path / "own.py").write_text("def m(model, draws):\n    return 2.0\n")
    second = plan(tmp_path, text).cells[0].key
    x[3, 1] += 1e-9
    np.savetxt(path, x, delimiter=",", header="a,b", comments="", fmt="%.17g")
    assert len({first, second, plan(tmp_path, text).cells[0].key}) == 3


def command(*arguments, cwd):
    return whichkl("compare", *arguments, cwd=cwd)


def test_the_command_runs_a_study_and_refuses_a_wrong_one(tmp_path):
    text = "target: bimodal\nfamilies: gaussian\nseeds: 2\nmetrics: [khat]\ndraws: 500\n"
    (tmp_path / "study.yaml").write_text(text)
    done = command("study.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["cells"], found["failed"], found["folder"]) == (4, 0, "study.out")
    assert {row["objective"] for row in found["rows"]} == {"forward_kl", "reverse_kl"}
    assert found["verdict"]["outcome"] == "too_few_seeds"
    assert len((tmp_path / "study.out" / "table.csv").read_text().splitlines()) == 5
    (tmp_path / "study.yaml").write_text(text + "budgett: 3\n")
    wrong = command("study.yaml", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "line 6, `budgett`" in wrong.stderr
    assert "Traceback" not in wrong.stderr
