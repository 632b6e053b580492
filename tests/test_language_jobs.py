"""Jobs of language models: saved, resumed after a kill, reported, and read from YAML."""

import dataclasses
import os
import re
import shutil
import signal

import pytest
import torch

import whichkl as wk
from programs import run

transformers = pytest.importorskip("transformers")
from test_language_trainer import arguments, llama  # noqa: E402
from whichkl.distillation import LanguageDistillation, language_model  # noqa: E402
from whichkl.distillation.language.record import Record  # noqa: E402

DATA = [{"prompt": [3 + k % 19, 4 + k % 5], "completion": [5 + k % 7, 6]} for k in range(95)]
MIXED = {"data": 0.4, "student": 0.3, "teacher": 0.3}
STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def distilled(folder, journal=None, changes=STEPS, **more):
    given = {"teacher": llama(0), "student": llama(1), "data": DATA, "max_new_tokens": 6, "held_out": 0.2, "prefixes": MIXED}
    given |= {"evaluations": 2, "args": arguments(folder / "unused", **changes), "journal": journal, **more}
    return language_model(**given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that wasn't interrupted, without a journal."""
    return distilled(tmp_path_factory.mktemp("whole"), changes={**STEPS, "save_strategy": "no"})


def same(one, other):
    """Whether two results agree to the last bit, but for the time that they took."""
    fields = [{name: value for name, value in result.to_dict().items() if name != "cpu_seconds"} for result in (one, other)]
    fields = [{**one, "settings": {k: v for k, v in one["settings"].items() if k != "args"}} for one in fields]
    pairs = zip(one.student.state_dict().items(), other.student.state_dict().items(), strict=True)
    return fields[0] == fields[1] and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ---- a run that is killed


def until_killed(folder, moment):
    """Run in a child that kills itself at a moment: a name of `Record`, or a step."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        name, after = moment
        known, calls = getattr(Record, name), []

        def patched(self, *args, **kwargs):
            calls.append(args)
            return die() if len(calls) == after else known(self, *args, **kwargs)

        setattr(Record, name, patched)
        distilled(folder, journal=folder / name)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


MOMENTS = {"complete": 2, "measured": 2, "keep_trained": 1}
"""Before the hashes of the second checkpoint, before the measurement at the end, and at the end of training."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The journals of runs that were killed, in a process of its own, which forks."""
    folder = tmp_path_factory.mktemp("killed")
    code = "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import test_language_jobs as t\n"
    code += "for one in t.MOMENTS.items(): t.until_killed(pathlib.Path(sys.argv[2]), one)"
    done = run("-c", code, os.path.dirname(__file__), str(folder), env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_and_ends_with_the_same_bits(killed, whole, moment, tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    shutil.copytree(killed / moment, journal)
    began = []
    monkeypatch.setattr(
        transformers.Trainer, "training_step", lambda self, *a, _step=transformers.Trainer.training_step, **k: (
            began.append(self.state.global_step), _step(self, *a, **k))[1]
    )  # fmt: skip
    resumed = distilled(tmp_path, journal=journal)
    assert began[:1] == {"complete": [2], "measured": [], "keep_trained": [4]}[moment]
    assert same(resumed, whole)
    resumed.journal.clear()
    assert not journal.exists()


def changed(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", ""])
@pytest.mark.parametrize("damage", [changed, lambda path: path.unlink()], ids=["changed", "missing"])
def test_a_checkpoint_that_was_changed_is_named_and_refused(killed, name, damage, tmp_path):
    journal = tmp_path / "journal"
    shutil.copytree(killed / "keep_trained", journal)
    folder = next(journal.glob("*/checkpoint-4"))
    path = folder / name if name else next(folder.parent.glob("checkpoint-4.*.json"))
    damage(path)
    if name or damage is changed:
        with pytest.raises(wk.IntegrityError, match=re.escape(f"`{path}` isn't what was written")):
            distilled(tmp_path, journal=journal)
    else:  # a checkpoint without hashes isn't whole: the one before is taken
        assert distilled(tmp_path, journal=journal).steps == 6


def test_other_settings_have_a_journal_of_their_own(killed, tmp_path):
    journal = tmp_path / "journal"
    shutil.copytree(killed / "keep_trained", journal)
    few = {**STEPS, "max_steps": 1}
    for other in (
        {"seed": 1},
        {"student": llama(2)},
        {"data": DATA[:60]},
        {"args": arguments(tmp_path, **{**few, "learning_rate": 2e-2})},
    ):
        distilled(tmp_path, journal=journal, changes=few, **other).journal.clear()
    assert len(list(journal.iterdir())) == 1 and next(journal.glob("*/checkpoint-4/model.safetensors")).is_file()


def test_nothing_of_the_users_is_changed(tmp_path):
    state = torch.random.get_rng_state()
    changes = {**STEPS, "max_steps": 1}
    given, saved = arguments(tmp_path / "own", **changes), arguments(tmp_path / "own", **changes).to_dict()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    result = distilled(tmp_path, journal=tmp_path / "journal", args=given)
    (tmp_path / "journal" / "mine").mkdir()
    result.journal.clear()
    assert torch.equal(state, torch.random.get_rng_state()) and given.to_dict() == saved
    assert sorted(one.relative_to(tmp_path).as_posix() for one in tmp_path.rglob("*")) == [
        *("journal", "journal/mine", "own", "own/notes.txt")
    ]


# ---- saved results


def test_a_saved_result_loads_here_and_by_transformers(whole, tmp_path):
    whole.save(tmp_path)
    assert same(LanguageDistillation.load(tmp_path), whole) and same(LanguageDistillation.load(tmp_path, student=llama(3)), whole)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, use_safetensors=True)
    for one, other in zip(model.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(one, other)
    assert model.generation_config.eos_token_id == whole.student.generation_config.eos_token_id


def test_another_result_replaces_it_and_nothing_else_is_touched(whole, tmp_path):
    other = dataclasses.replace(whole, student=llama(4, width=32).eval())
    whole.save(tmp_path)
    other.save(tmp_path)
    assert same(LanguageDistillation.load(tmp_path), other)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(wk.InputError, match=r"holds something else, `mine\.txt`"):
        whole.save(tmp_path)
    foreign = tmp_path / "model"
    llama(0).save_pretrained(foreign)
    before = {one: one.read_bytes() for one in foreign.iterdir()}
    with pytest.raises(wk.InputError, match="holds something else"):
        whole.save(foreign)
    assert {one: one.read_bytes() for one in foreign.iterdir()} == before


def test_a_module_that_transformers_cannot_make_needs_a_student(whole, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(3))

    dataclasses.replace(whole, student=Own()).save(tmp_path)
    with pytest.raises(wk.InputError, match="isn't a plain model of transformers. Pass `student=`"):
        LanguageDistillation.load(tmp_path)
    assert LanguageDistillation.load(tmp_path, student=Own()).steps == whole.steps
    with pytest.raises(wk.InputError, match="aren't those of such a `LlamaForCausalLM`"):
        LanguageDistillation.load(tmp_path, student=llama(0))


def test_what_was_changed_or_cut_short_is_refused(whole, tmp_path):
    whole.save(tmp_path)
    for name in ("language_distillation.json", next(tmp_path.glob("student-*")).name):
        path, data = tmp_path / name, (tmp_path / name).read_bytes()
        for damaged in (data[: len(data) // 2], b"", data.replace(b"7", b"8")):
            path.write_bytes(damaged)
            with pytest.raises(wk.IntegrityError):
                LanguageDistillation.load(tmp_path)
        path.write_bytes(data)
    assert same(LanguageDistillation.load(tmp_path), whole)


# ---- the report


def test_the_report_has_all_parts_and_text_stays_text(whole, tmp_path):
    shown = dataclasses.replace(whole.examples[0], prompt="<script>alert(1)</script> | \x1b[2J\u202e", after="**bold**\n# head")
    result = dataclasses.replace(whole, examples=(shown,), notes=("a note",))
    text = wk.report(result, tmp_path / "r.html").read_text()
    for part in ("The student came closer to its teacher", "were cut at 6 tokens", "What was minimised", "distinct 2", "A note."):
        assert part in text
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; | \\x1b[2J\\u202e" in text
    assert "http:" not in re.sub(r"<script nonce=\"[^\"]*\">.*?</script>", "", text, flags=re.DOTALL)
    assert whole.verdict.sentence in whole._repr_html_() and "forward KL" in whole.after._repr_html_()


def test_the_model_card_states_the_figures_and_shows_no_data(whole):
    card = whole.model_card()
    assert card.startswith("---\nlibrary_name: transformers\n") and "clustered by prompt" in card
    assert whole.after.forward_kl.number in card and '"max_steps": 6' in card
    assert whole.examples[0].prompt not in card.split("Exact configuration")[0]


def test_the_verdict_follows_the_figures(whole):
    def moved(forward, reverse):
        scaled = {
            name: dataclasses.replace(getattr(whole.before, name), value=factor * getattr(whole.before, name).value)
            for name, factor in (("forward_kl", forward), ("reverse_kl", reverse))
        }
        return dataclasses.replace(whole, after=dataclasses.replace(whole.before, **scaled)).verdict

    assert moved(1, 1).outcome == "No change was detected" and "hardly moved" in moved(1, 1).sentence
    assert moved(0.2, 0.2).outcome == moved(0.2, 1).outcome == "The student came closer to its teacher"
    assert moved(5, 5).outcome == "The student moved away from its teacher"
    assert moved(0.2, 5).outcome == "The student came closer in the forward direction only"
    infinite = moved(float("inf"), 0.2)
    assert infinite.outcome == "The student came closer in the reverse direction only"
    assert any(doubt.startswith("Forward KL is infinite") for doubt in infinite.doubts)
