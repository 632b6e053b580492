"""Nothing of the user's is removed or changed: canaries next to every output, and one function that removes."""

import ast
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import whichkl as wk
from canaries import plant, seen
from programs import whichkl
from whichkl._checks import InputError, IntegrityError, ResourceError, WhichklError
from whichkl.files.journal import Journal
from whichkl.files.writing import check_writable, remove_own, write_whole
from whichkl.reporting import report
from whichkl.study import Study
from whichkl.verifying import verify

SOURCES = Path(wk.__file__).parent
STUDY = {"families": "gaussian", "objectives": "forward_kl", "seeds": 2, "metrics": ["khat"], "draws": 200}


def rows(n=120, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def study(out, **changes):
    return wk.compare(wk.Target(samples=rows()), **{**STUDY, "out": out, **changes})


def test_only_one_module_removes_renames_or_overwrites():
    removing = {
        "unlink",
        "rmtree",
        "rmdir",
        "removedirs",
        "rename",
        "renames",
        "truncate",
        "ftruncate",
        "move",
        "copyfile",
        "copy2",
    }
    writing = {"write_text", "write_bytes", "savez", "tofile"}
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, on = node.func.attr, ast.unparse(node.func.value)
            texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            overwrites = name == "replace" and len(node.args) == 1 and not node.keywords  # a text's own takes two
            opens = name in ("open", "fdopen") and any(set("wax+") & set(text) and len(text) <= 3 for text in texts)
            if name in removing | writing or (name == "remove" and on == "os") or overwrites or opens:
                found.append((path.relative_to(SOURCES).as_posix(), f"{on}.{name}"))
    assert {place for place, _ in found} == {"files/writing.py"}, found


class TestRemoveOwn:
    def test_only_own_names_go_and_the_folder_only_when_it_is_empty(self, tmp_path):
        (tmp_path / "cell" / "fit").mkdir(parents=True)
        (tmp_path / "cell" / "fit" / "fit.json").write_text("{}")
        (tmp_path / "cell" / "mine").mkdir()
        assert not remove_own(tmp_path / "cell", lambda name: name in ("fit/", "fit/fit.json"))
        assert [one.name for one in (tmp_path / "cell").iterdir()] == ["mine"]
        (tmp_path / "cell" / "mine").rmdir()
        assert remove_own(tmp_path / "cell", lambda name: False)
        assert not (tmp_path / "cell").exists()

    def test_an_empty_folder_of_the_users_stays(self, tmp_path):
        (tmp_path / "cell" / "todo").mkdir(parents=True)
        assert not remove_own(tmp_path / "cell", lambda name: not name.endswith("/"))
        assert (tmp_path / "cell" / "todo").is_dir()

    def test_links_are_neither_followed_nor_removed(self, tmp_path):
        plant(tmp_path / "mine")
        (tmp_path / "cell").mkdir()
        (tmp_path / "cell" / "fit").symlink_to(tmp_path / "mine")
        (tmp_path / "to-cell").symlink_to(tmp_path / "cell")
        before = seen(tmp_path)
        assert not remove_own(tmp_path / "cell", lambda name: True)
        assert not remove_own(tmp_path / "to-cell", lambda name: True)
        assert seen(tmp_path) == before

    def test_a_missing_path_is_removed_already(self, tmp_path):
        assert remove_own(tmp_path / "nowhere", lambda name: True)


def test_trying_a_folder_leaves_it_as_it_was(tmp_path):
    before = seen(plant(tmp_path / "mine"))
    check_writable(tmp_path / "mine")
    check_writable(tmp_path / "mine" / "new" / "below")
    assert seen(tmp_path / "mine") == before


def test_a_link_is_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    (tmp_path / "report.html").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(InputError, match="it is a link"):
        write_whole(tmp_path / "report.html", b"new")
    assert (tmp_path / "mine.txt").read_text() == "x"


class TestStudies:
    @pytest.mark.parametrize(
        "place", ["thesis.tex", "cells/plate1/img.tif", "cells/readme", f"cells/{'a' * 64}/img.tif", "table.csv", "report.html"]
    )
    def test_a_folder_that_holds_something_else_is_refused(self, tmp_path, place):
        (tmp_path / "out" / place).parent.mkdir(parents=True)
        (tmp_path / "out" / place).write_text("irreplaceable")
        before = seen(tmp_path)
        with pytest.raises(InputError, match="Cannot start a study in .*something else"):
            study(tmp_path / "out")
        assert seen(tmp_path) == before

    def test_a_folder_of_cells_that_is_a_link_is_refused(self, tmp_path):
        plant(tmp_path / "mine")
        (tmp_path / "mine" / ("a" * 64)).mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "cells").symlink_to(tmp_path / "mine")
        before = seen(tmp_path)
        with pytest.raises(InputError, match="is a link"):
            study(tmp_path / "out")
        assert seen(tmp_path) == before

    def test_files_that_come_later_are_passed_over(self, tmp_path):
        out = tmp_path / "out"
        study(out)
        table = (out / "table.csv").read_bytes()
        for place in (out, out / "cells", out / "cells" / "mine"):
            plant(place)
        before = seen(tmp_path, but=["out/table.csv", "out/metrics.jsonl", "out/times.jsonl", "out/table.parquet"])
        for again in (
            lambda: study(out),
            lambda: study(out, recompute=True),
            lambda: study(out, seeds=3),
            lambda: Study.load(out),
        ):
            again()
        assert (
            seen(tmp_path, but=["out/table.csv", "out/metrics.jsonl", "out/times.jsonl", "out/table.parquet"]).items()
            >= {name: one for name, one in before.items() if name[1] != "out/study.json"}.items()
        )
        assert (out / "table.csv").read_bytes().startswith(table[:100])

    @pytest.mark.parametrize("how", ["unfinished", "failed"])
    def test_a_users_file_in_a_cell_stays_and_is_named(self, tmp_path, how):
        out = tmp_path / "out"
        cell = study(out).cells[0].folder
        if how == "unfinished":
            (cell / "DONE").unlink()
        else:
            (cell / "cell.json").write_text("{}")
        (cell / "img.tif").write_text("irreplaceable")
        with pytest.raises(IntegrityError, match="something that no study writes"):
            study(out, recompute=True)
        assert (cell / "img.tif").read_text() == "irreplaceable"

    @pytest.mark.parametrize("place", ["", "fit", "cell.json"])
    def test_a_linked_cell_is_refused_and_what_it_leads_to_stays(self, tmp_path, place):
        out = tmp_path / "out"
        cell = study(out).cells[0].folder
        elsewhere = tmp_path / "elsewhere"
        shutil.move(cell / place, elsewhere)
        (cell / place).symlink_to(elsewhere)
        before = seen(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
        for recompute in (False, True):
            with pytest.raises(IntegrityError):
                study(out, recompute=recompute)
        assert (seen(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()) == before


class TestJournals:
    @pytest.mark.parametrize("family", ["gaussian", "mixture:2", "flow"])
    def test_a_fit_removes_its_own_entries_alone(self, tmp_path, family):
        mine = plant(tmp_path / "mine")
        other = Journal.of(mine, {"another": "fit"})
        other.save("em", {"x": torch.zeros(3)}, {})
        before = seen(mine)
        wk.fit(rows(), family, journal=mine, judge=False)
        assert seen(mine) == before

    def test_a_users_file_among_the_entries_stays(self, tmp_path):
        journal = Journal.of(tmp_path / "j", {"a": "fit"})
        journal.save("em", {"x": torch.zeros(3)}, {})
        (tmp_path / "j" / journal.key / "notes.txt").write_text("x")
        journal.clear()
        assert [one.name for one in (tmp_path / "j" / journal.key).iterdir()] == ["notes.txt"]

    def test_an_empty_journal_leaves_no_folder(self, tmp_path):
        wk.fit(rows(), "mixture:2", journal=tmp_path / "j", judge=False)
        assert not (tmp_path / "j").exists()

    def test_a_distillation_writes_beside_the_users_files(self, tmp_path):
        mine = plant(tmp_path / "mine")
        before = seen(mine)
        result = wk.distill(teacher=nn.Linear(2, 3), student=nn.Linear(2, 3), data=rows().float(), epochs=2, journal=mine)
        result.journal.clear()
        assert seen(mine) == before


class TestSaves:
    def test_a_folder_that_holds_something_else_is_refused(self, tmp_path):
        mine = plant(tmp_path / "mine")
        before = seen(mine)
        fit = wk.fit(rows(), judge=False)
        distilled = wk.distill(teacher=nn.Linear(2, 3), student=nn.Linear(2, 3), data=rows().float(), epochs=1)
        for one in (fit, distilled):
            with pytest.raises(InputError, match="holds something else"):
                one.save(mine)
        assert seen(mine) == before

    @pytest.mark.parametrize("name", ["fit.json", "model-0123456789abcdef.safetensors"])
    @pytest.mark.parametrize("kind", ["link", "folder"])
    def test_links_and_folders_of_our_names_are_refused(self, tmp_path, name, kind):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine.txt").write_text("x")
        if kind == "link":
            (tmp_path / "mine" / name).symlink_to(tmp_path / "mine.txt")
        else:
            (tmp_path / "mine" / name).mkdir()
        before = seen(tmp_path)
        with pytest.raises(InputError, match="holds something else"):
            wk.fit(rows(), judge=False).save(tmp_path / "mine")
        assert seen(tmp_path) == before

    def test_only_weights_that_the_replaced_fit_named_are_removed(self, tmp_path):
        folder = tmp_path / "fit"
        first, second = (wk.fit(rows(seed=seed), judge=False) for seed in (0, 1))
        first.save(folder)
        named = next(folder.glob("model-*"))
        (folder / "model-0123456789abcdef.safetensors").write_bytes(b"put there by hand")
        (folder / ".new-fit.json-abcdefgh").write_bytes(b"left by a kill")
        second.save(folder)
        left = {one.name for one in folder.iterdir()}
        assert named.name not in left and "model-0123456789abcdef.safetensors" in left and len(left) == 3
        assert wk.Fit.load(folder).model.mean.tolist() == second.model.mean.tolist()


class TestReports:
    def test_a_file_that_is_no_report_is_never_replaced(self, tmp_path):
        fit = wk.fit(rows(), judge=False)
        (tmp_path / "page.html").write_text("<p>mine, about whichkl</p>")
        with pytest.raises(InputError, match="whichkl didn't write"):
            report(fit, tmp_path / "page.html")
        assert (tmp_path / "page.html").read_text() == "<p>mine, about whichkl</p>"
        report(fit, tmp_path / "new.html")
        report(fit, tmp_path / "new.html")  # its own is

    def test_notes_beside_the_report_of_a_study_stay(self, tmp_path):
        found = study(tmp_path / "out")
        (tmp_path / "page.md").write_text("my notes")
        with pytest.raises(InputError, match="whichkl didn't write"):
            report(found, tmp_path / "page.html")
        assert (tmp_path / "page.md").read_text() == "my notes"


class TestCommands:
    @pytest.fixture
    def project(self, tmp_path):
        """A folder with a user's work in it, and what the commands read."""
        folder = plant(tmp_path / "project")
        np.save(folder / "x.npy", rows(60).numpy())
        (folder / "nets.py").write_text(
            "import torch\nfrom torch import nn\ndef net():\n    return nn.Linear(2, 3)\n"
            "def data():\n    return torch.randn(60, 2, generator=torch.Generator().manual_seed(0))\n"
        )
        (folder / "s.yaml").write_text("target: Normal(0, 1)\nfamilies: gaussian\nseeds: 1\nmetrics: [khat]\ndraws: 500\n")
        return folder

    def test_outputs_in_a_project_touch_nothing_of_it(self, project):
        before = seen(project)
        new = ["fit", "student", "report.html", "__pycache__"]
        assert whichkl("fit", "x.npy", "--out", ".", cwd=project).returncode == 0
        nets = ("--teacher", "nets.py:net", "--student", "nets.py:net", "--data", "nets.py:data", "--epochs", "1")
        assert whichkl("distill", *nets, "--out", ".", cwd=project).returncode == 0
        assert whichkl("fit", "x.npy", "--out", ".", cwd=project).returncode == 0
        assert seen(project, but=new) == before
        assert (project / "fit" / "fit.json").exists() and (project / "student" / "distillation.json").exists()

    @pytest.mark.parametrize("name", ["report.html", "fit/notes.txt"])
    def test_a_users_file_in_the_way_is_refused_before_the_fit(self, project, name):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("mine")
        before = seen(project)
        found = whichkl("fit", "x.npy", "--out", ".", cwd=project)
        assert found.returncode == 2 and found.stdout == "", found.stderr
        assert seen(project, but=["__pycache__"]) == before

    def test_a_study_into_a_project_is_refused(self, project):
        before = seen(project)
        found = whichkl("compare", "s.yaml", "--out", ".", cwd=project)
        assert found.returncode == 2 and "something else" in found.stderr
        assert seen(project) == before

    def test_a_demo_never_replaces_a_users_report(self, project):
        (project / "report.json").write_text('{"mine": 1}')
        before = seen(project)
        assert whichkl("demo", "--out", ".", cwd=project).returncode == 2
        assert seen(project, but=["report.html"]) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such folder")
def test_a_full_or_forbidden_place_is_exit_four(tmp_path):
    with pytest.raises(ResourceError, match="Cannot write"):
        check_writable(Path("/proc/whichkl"))


class TestWhatOnlyLooksLikeOurs:
    """Files with the names that whichkl gives, but with another content, and entries that aren't regular files."""

    @pytest.mark.parametrize("content", ['{"learning_rate": 0.1, "note": "hand tuned"}', "not JSON", ""])
    @pytest.mark.parametrize("kind", ["fit", "distillation"])
    def test_a_file_named_as_a_result_is_refused(self, tmp_path, kind, content):
        folder = tmp_path / "mine"
        folder.mkdir()
        (folder / f"{kind}.json").write_text(content)
        if kind == "fit":
            result = wk.fit(rows(), judge=False)
        else:
            result = wk.distill(teacher=nn.Linear(2, 3), student=nn.Linear(2, 3), data=rows().float(), epochs=1)
        with pytest.raises(InputError, match=rf"`{kind}.json`, which whichkl didn't write"):
            result.save(folder)
        assert (folder / f"{kind}.json").read_text() == content

    def test_a_damaged_result_is_replaced(self, tmp_path):
        fit = wk.fit(rows(), judge=False)
        fit.save(tmp_path / "f")
        path = tmp_path / "f" / "fit.json"
        path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
        with pytest.raises(IntegrityError):
            wk.Fit.load(tmp_path / "f")
        fit.save(tmp_path / "f")
        assert wk.Fit.load(tmp_path / "f").seed == 0

    def test_files_among_a_journals_entries_stay(self, tmp_path):
        journal = Journal.of(tmp_path / "j", {"a": "fit"})
        journal.save("em", {"x": torch.zeros(3)}, {})
        own = tmp_path / "j" / journal.key
        names = ["my-weights.safetensors", "model-0123456789abcdef.safetensors", ".new-x", "notes.txt"]
        for name in names:
            (own / name).write_text("mine")
        (own / f".new-em.{journal.key}.safetensors-abcd1234").write_text("killed")
        journal.clear()
        assert sorted(one.name for one in own.iterdir()) == sorted(names)

    @pytest.mark.parametrize("place", ["file", "", "dangling"])
    def test_a_journal_that_cannot_be_kept_is_refused_before_the_work(self, tmp_path, place):
        (tmp_path / "file").write_text("x")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match="keep a journal"):
            wk.fit(rows(), journal=tmp_path / place if place else "", judge=False)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX's")
    def test_a_pipe_is_neither_read_nor_replaced(self, tmp_path):
        fit = wk.fit(rows(), judge=False)
        (tmp_path / "f").mkdir()
        for place in (tmp_path / "report.html", tmp_path / "f" / "fit.json"):
            os.mkfifo(place)
        with pytest.raises(InputError, match="isn't a regular file"):
            wk.report(fit, tmp_path / "report.html")
        with pytest.raises(InputError, match="holds something else"):
            fit.save(tmp_path / "f")
        with pytest.raises(WhichklError, match="isn't a regular file"):
            wk.Fit.load(tmp_path / "f")
        assert stat.S_ISFIFO((tmp_path / "report.html").stat().st_mode)

    def test_a_resumed_fit_reports_the_same_evaluations(self, tmp_path):
        whole = wk.fit(rows(), "mixture:3", judge=False).diagnostics.evaluations
        told = []

        def stop(step, done):
            told.append(step)
            if len(told) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            wk.fit(rows(), "mixture:3", journal=tmp_path / "j", judge=False, tell=stop)
        assert wk.fit(rows(), "mixture:3", journal=tmp_path / "j", judge=False).diagnostics.evaluations == whole

    @pytest.mark.parametrize("recompute", [False, True])
    def test_a_study_json_of_the_users_is_refused_and_kept(self, tmp_path, recompute):
        out = tmp_path / "o"
        out.mkdir()
        mine = {"study.json": '{"my study": [1, 2, 3]}', "table.csv": "a,b\n1,2\n", "times.jsonl": '{"lap": 3}\n'}
        for name, text in mine.items():
            (out / name).write_text(text)
        with pytest.raises(InputError, match="`study.json` in it that whichkl didn't write"):
            study(out, recompute=recompute)
        with pytest.raises(InputError, match="isn't one that whichkl wrote"):
            verify(out)
        assert {name: (out / name).read_text() for name in mine} == mine

    @pytest.mark.parametrize("name", ["table.csv", "times.jsonl", "metrics.jsonl", "table.parquet"])
    def test_a_table_of_the_users_in_a_study_is_refused_and_kept(self, tmp_path, name):
        out = tmp_path / "o"
        study(out)
        (out / name).write_text("MY OWN NOTES\n1,2\n")
        with pytest.raises(InputError, match=f"`{out / name}`: there is a file of this name that whichkl didn't write"):
            study(out)
        assert (out / name).read_text() == "MY OWN NOTES\n1,2\n"

    @pytest.mark.parametrize("place", ["extra.txt", "fit/extra.txt"])
    def test_nothing_of_a_cell_is_removed_where_a_file_of_the_users_lies_in_it(self, tmp_path, place):
        out = tmp_path / "o"
        cell = study(out).cells[0].folder
        (cell / place).write_text("mine")
        with (cell / "cell.json").open("a") as file:
            file.write(" ")
        before = seen(out)
        with pytest.raises(IntegrityError, match=f"`{cell / place}` is a link, or something that no study writes"):
            study(out, recompute=True)
        now = seen(out)
        assert {key: one for key, one in now.items() if "cells" in key[1]} == {
            key: one for key, one in before.items() if "cells" in key[1]
        }

    def test_verify_sees_cells_and_tables_that_are_gone(self, tmp_path):
        out = tmp_path / "o"
        cell = study(out).cells[0].folder
        (out / "table.parquet").unlink(missing_ok=True)
        assert "except table.parquet" in str(verify(out)[0])
        shutil.move(cell, tmp_path / "elsewhere")
        with pytest.raises(IntegrityError, match="which table.csv lists, is missing"):
            verify(out)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["fit", "x.npy", "--out", ""], "the name is empty"),
            (["fit", "x.npy", "--out", "x.npy"], "`x.npy` is a file"),
            (["fit", "x.npy", "--out", "x.npy/deeper"], "`x.npy` is a file"),
            (["fit", "x.npy", "--out", "nowhere"], "`nowhere` is a link to nothing"),
            (["fit"], "neither samples nor a log density are given"),
            (["fit", "x.npy", "--seed", "9" * 23], "more than 18 digits"),
            (["verify", "nosuch"], "there is no such folder"),
            (["verify", "x.npy"], "it is a file"),
            (["verify", "."], "it holds no fit.json"),
        ],
        ids=lambda one: " ".join(one)[:20] if isinstance(one, list) else "",
    )
    def test_what_names_no_place_is_bad_input(self, tmp_path, arguments, says):
        np.save(tmp_path / "x.npy", rows().numpy())
        (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
        done = whichkl(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and says in " ".join(done.stderr.replace("│", "").split()), done.stderr
        assert sorted(one.name for one in tmp_path.iterdir()) == ["nowhere", "x.npy"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            np.ma.masked_array(np.random.default_rng(0).normal(size=(50, 2)), mask=np.eye(50, 2) > 0),
            "2 of their numbers are masked",
        ),
        (np.arange(300) + 2**60, "integers that float64"),
        (torch.arange(300) + 2**60, "integers that float64"),
    ],
    ids=["masked", "array", "tensor"],
)
def test_numbers_that_float64_would_change_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        wk.fit(values)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_integers_in_a_file_that_float64_would_change_are_refused(tmp_path, suffix):
    values, path = np.arange(300) + 2**60, tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, values)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table({"a": values}), path)
    with pytest.raises(InputError, match="integers that float64"):
        wk.fit(path)
