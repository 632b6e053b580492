"""Language models in `advise` and `compare`: objectives with their prefixes, what access allows, and studies at equal FLOPs."""

import copy
import json
import pickle

import pytest
import torch

import whichkl as wk
from whichkl import Access
from whichkl.distillation import LanguageDistillation, LanguageTarget, TokenScores, capture
from whichkl.distillation.language.objective import LanguageObjective
from whichkl.study import LANGUAGE_NEEDS, Study, decide
from whichkl.verifying import verify

SCORES = TokenScores(lambda ids, mask: torch.full(ids.shape, 0.25).log())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("forward_kl", "forward_kl@data"),
        ("jeffreys:0.3@student", "jeffreys:0.3@student"),
        ("reverse_kl @ 0.25 student + 0.75*data", "reverse_kl@0.75data+0.25student"),
        ("forward_kl@student+teacher+data", None),
        ("reverse_kl@student:sequence", "reverse_kl@student:sequence"),
        ("renyi@teacher", "renyi:0.5@teacher"),
    ],
)
def test_an_objective_is_text_that_reads_back(text, name):
    found = LanguageObjective.of(text)
    assert name is None or found.name == name
    assert LanguageObjective.of(found.name).name == found.name
    assert abs(sum(found.shares.values()) - 1) < 1e-9


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("forward_kl@prompt", "can't be read.*forward_kl@data"),
        ("forward_kl@data:token", "can't be read"),
        ("forward_kl@", "can't be read"),
        ("forward_kl@0.5data", "sum to 1"),
        ("forward_kl@0.5data+0.7student", "sum to 1"),
        ("kl@data", "kl"),
        ("forward_kl@student:sequence", "score-function term belongs"),
        (3, "it is a `int`"),
    ],
)
def test_an_objective_that_cannot_be_read_is_refused(text, match):
    with pytest.raises(ValueError, match=match):
        LanguageObjective.of(text)


def test_every_pair_states_what_it_minimises():
    says = {name: LanguageObjective.of(name).minimises for name in ("forward_kl@teacher", "reverse_kl@student:sequence")}
    assert all("exact gradient" in one for one in says.values())
    assert "less its score-function term" in LanguageObjective.of("reverse_kl@student").minimises
    for name in ("forward_kl@data", "forward_kl@student", "reverse_kl@data", "reverse_kl@0.5data+0.5student", "jeffreys@teacher"):
        assert LanguageObjective.of(name).minimises.startswith("no KL of sequences")


ACCESS = [
    (torch.nn.Linear(2, 2), "both", 8),
    (None, "samples", ["forward_kl@data"]),
    (SCORES, "log_prob", ["reverse_kl@student", "reverse_kl@student:sequence"]),
]


@pytest.mark.parametrize(("teacher", "cell", "possible"), ACCESS, ids=["model", "text", "scores"])
def test_the_teachers_access_decides(teacher, cell, possible):
    target = LanguageTarget(teacher=teacher, data=[[1, 2, 3]])
    advice = wk.advise(target)
    assert target.access.cell == cell == advice.access.cell
    names = [option.objective.name for option in advice.options]
    assert len(names) == possible if isinstance(possible, int) else names == possible
    assert len(names) + len(advice.missing) == 8
    for name in (*names, *advice.missing):
        assert name in str(advice)
    for name in advice.missing:
        with pytest.raises(ValueError, match="Cannot"):
            target.name_of(name)
    assert advice.best.objective.name == names[0] and json.dumps(advice.to_dict())
    assert max(map(len, str(advice).splitlines())) <= 96 and len(repr(advice)) < 300
    for option in advice.options:  # the line to type chooses the objective
        chosen = eval(option.solver.replace("language_model", "dict").replace(", …", ""))  # noqa: S307
        assert option.objective.arguments == {"credit": "token", **chosen}


def test_stored_rows_allow_one_direction(monkeypatch):
    from whichkl.distillation import StoredTeacher

    stored = object.__new__(StoredTeacher)
    stored.manifest = {"k": None, "draws": 20, "temperature": 1.0}
    target = LanguageTarget(teacher=stored, data=[[1, 2, 3]])
    assert target.access == Access.SAMPLES
    assert [option.objective.name for option in wk.advise(target).options] == ["forward_kl@data"]
    assert "ask the teacher nothing else" in wk.advise(target).situation


def test_prompts_alone_leave_prefixes_that_are_drawn():
    advice = wk.advise(LanguageTarget(teacher=torch.nn.Linear(2, 2), data=[{"prompt": [1]}]))
    assert advice.best.objective.name == "forward_kl@teacher" and "'forward_kl@teacher'" in advice.verdict
    assert {name for name in advice.missing} == {"forward_kl@data", "jeffreys:0.5@data", "reverse_kl@data"}
    nothing = wk.advise(LanguageTarget(teacher=None, data=[{"messages": [{"role": "user", "content": "a"}]}]))
    assert nothing.best is None and "Nothing can be minimised" in str(nothing)


def test_text_alone_is_the_teachers_own():
    advice = wk.advise(LanguageTarget(teacher=None, data=[[1, 2, 3]]))
    assert "the forward KL of sequences" in str(advice)


def test_settings_are_checked_at_once():
    teacher = torch.nn.Linear(2, 2)
    for settings, match in (
        ({"seed": 3}, "`compare` sets seed itself"),
        ({"max_tokens": 3}, "`max_tokens` is no argument of `language_model`.*max_new_tokens"),
        ({"data": "text"}, "they are one `str`"),
    ):
        with pytest.raises(ValueError, match=match):
            LanguageTarget(**{"teacher": teacher, "data": [[1, 2]], **settings})
    target = LanguageTarget(teacher=teacher, data=[[1, 2]], hard_label_weight=0.3)
    with pytest.raises(ValueError, match="hard_label_weight"):
        target.name_of("reverse_kl@student")


# ---- with transformers

DATA = [{"prompt": [3 + k % 7, 4, 3 + k % 5], "completion": [5 + k % 11] * (1 + k % 6)} for k in range(80)]
ARMS = ["forward_kl@data", "reverse_kl@student"]


def llama(seed):
    transformers = pytest.importorskip("transformers", reason="language models need transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, pad_token_id=2, **shape))


def target_of(**changes):
    settings = {"max_new_tokens": 6, "held_out": 0.5, "budget": 1e7, **changes}
    return LanguageTarget(**{"teacher": llama(0), "data": DATA, **settings})


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "study"
    return wk.compare(target_of(), {"small": llama(1)}, ARMS, seeds=2, out=folder), folder


def test_arms_spend_the_same_and_start_from_one_student(study):
    rows = study[0].rows
    assert [row["objective"] for row in rows] == ARMS * 2 and {row["status"] for row in rows} == {"finished"}
    for name in ("forward_kl_before", "reverse_kl_before", "entropy_teacher", "length_teacher"):
        by_seed = [{row[name] for row in rows if row["seed"] == seed} for seed in (0, 1)]
        assert all(len(one) == 1 for one in by_seed) and by_seed[0] != by_seed[1], name
    for row in rows:  # less than a step below the budget, and hardly above it where steps differ
        step = row["flops"] / row["iterations"]
        assert 1e7 - step < row["flops"] <= 1e7 + 0.2 * step and "budget" not in row["notes"]
        assert row["forward_kl"] > 0 and row["forward_kl_stderr"] > 0 and row["cpu_seconds"] > 0
        assert row["jeffreys"] == row["forward_kl"] + row["reverse_kl"]
        assert row["entropy_gap"] == pytest.approx(abs(row["entropy"] - row["entropy_teacher"]))
    steps = {row["objective"]: row["iterations"] for row in rows}
    assert steps["reverse_kl@student"] < steps["forward_kl@data"]  # draws cost


def test_a_study_resumes_and_is_read_back(study, monkeypatch):
    found, folder = study
    assert "all 4 cells" in str(verify(folder)[0])
    seen = []
    again = wk.compare(target_of(), {"small": llama(1)}, ARMS, seeds=2, out=folder, tell=seen.append)
    assert seen[0].skipped == 4 and again.rows == found.rows == Study.load(folder).rows
    kept = LanguageDistillation.load(found.cells[0].folder / "fit")
    with pytest.raises(
        wk.InputError, match=r"holds a student, which is no fit\. Use .*\.LanguageDistillation\.load\('.*fit'\)\.$"
    ):
        found.fit(0)
    assert kept.after.forward_kl.value == found.rows[0]["forward_kl"]
    assert "small · reverse_kl@student" in str(found) and "needs at least 6 seeds" in found.verdict.sentence
    other = target_of(teacher=llama(5))
    for change in (other, target_of(data=DATA[1:]), target_of(max_new_tokens=5)):
        with pytest.raises(ValueError, match="another study|other"):
            wk.compare(change, {"small": llama(1)}, ARMS, seeds=2, out=folder)
    with pytest.raises(ValueError, match="score-function"):
        wk.compare(target_of(), {"small": llama(1)}, ["forward_kl@student:sequence"], seeds=2)


def test_a_cell_is_what_distill_returns(study):
    target = target_of()
    alone = target.distill(lambda: llama(1), "reverse_kl@student", seed=1)
    row = next(one for one in study[0].rows if one["objective"] == "reverse_kl@student" and one["seed"] == 1)
    mine = target.columns(alone)
    timed = {"cpu_seconds"}
    assert {name: row[name] for name in mine if name not in timed} == {k: v for k, v in mine.items() if k not in timed}
    assert pickle.loads(pickle.dumps(target)).identity == target.identity  # noqa: S301


def test_the_report_names_students_and_flops(study, tmp_path):
    page = wk.report(study[0], tmp_path / "page.html").with_suffix(".md").read_text()
    for said in (
        "Which student serves best?",
        "10,000,000 FLOPs a cell",
        "CPU time",
        "entropy gap",
        "less its score-function term",
    ):
        assert said in page


def test_the_teacher_is_asked_to_draw_once_for_all_arms(monkeypatch):
    from whichkl.distillation.language import sequence_kl as home

    drawn, original = [], home.continued
    monkeypatch.setattr(home, "continued", lambda model, *rest: drawn.append(model.who) or original(model, *rest))
    target, student = target_of(budget=4e6), llama(1)
    for arm in ARMS:
        target.distill(student, arm, seed=0)
    assert drawn.count("teacher") == 1 and drawn.count("student") == 3  # the start, and each arm


def test_the_learning_rate_falls_to_zero_with_the_budget(tmp_path):
    transformers = pytest.importorskip("transformers", reason="language models need transformers")
    from whichkl.distillation import LanguageTrainer

    for prefixes in ("data", "student"):
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), learning_rate=1e-2, num_train_epochs=1000, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no", logging_strategy="no", warmup_steps=0.2,
        )  # fmt: skip
        trainer = LanguageTrainer(
            teacher=llama(0),
            student=llama(1),
            prefixes={prefixes: 1.0},
            max_new_tokens=6,
            args=args,
            train_dataset=DATA,
            budget=2e7,
        )
        rates = []

        class Watch(transformers.TrainerCallback):
            def on_step_end(self, *_, rates=rates, trainer=trainer, **__):
                rates.append((trainer.flops / trainer.budget, trainer.lr_scheduler.get_last_lr()[0]))

        trainer.add_callback(Watch())
        trainer.train()
        for spent, rate in rates[1:]:
            wanted = 1e-2 * (spent / 0.2 if spent < 0.2 else max(0.0, (1 - spent) / 0.8))
            assert rate == pytest.approx(wanted, abs=1e-2 * 0.01)
        assert rates[-1][0] > 1 - 1.2 / len(rates) and rates[-1][1] < 2e-2 / len(rates)


def test_held_out_prompts_may_be_given(study):
    other = [{"prompt": [9, 3 + k % 6]} for k in range(12)]
    result = target_of(held_out=other, budget=4e6).distill(llama(1), "forward_kl@data", seed=0)
    assert result.after.prompts == 12


def test_text_alone_is_compared_by_its_likelihood():
    study = wk.compare(target_of(teacher=None, budget=4e6), {"a": llama(1), "b": llama(2)}, ["forward_kl"], seeds=2)
    row = study.rows[0]
    assert row["objective"] == "forward_kl@data" and row["forward_kl"] is None
    assert "entropy_p" in row["forward_kl_per_token_up_to"] and row["forward_kl_per_token"] == row["nll"] > 0
    with pytest.raises(ValueError, match="with text alone"):
        wk.compare(target_of(teacher=None), {"a": llama(1)}, ["reverse_kl@student"], seeds=2)


def test_a_study_of_stored_laws_shows_the_numbers_that_it_judges_by(tmp_path):
    stored = capture(teacher=llama(0), data=DATA, folder=tmp_path / "stored", k=4)
    students = {"a": llama(1), "b": llama(2)}
    study = wk.compare(target_of(teacher=stored, budget=4e6), students, ["forward_kl", "reverse_kl"], seeds=2)
    page = wk.report(study, tmp_path / "page.html").with_suffix(".md").read_text()
    assert "forward_kl_per_token" in str(study) and "reverse_kl_per_token" in str(study)
    for text in (str(study), page):
        said = " ".join(text.replace("\\", "").split()).lower()
        assert "forward_kl is a lower bound" in said and "reverse_kl is a lower bound" in said
    assert not study.verdict.front and "Filled points" not in page


def test_students_are_judged_by_their_own_needs():
    base = {"family": "small", "status": "finished", "flops": 1e9}
    rows = []
    for seed in range(8):
        for name, forward, gap in (("forward_kl@data", 3.0, 2.0), ("reverse_kl@student", 4.0, 1.0)):
            values = {"forward_kl": forward + 0.01 * seed, "reverse_kl": 2.0, "entropy_gap": gap + 0.01 * seed}
            rows.append({**base, **values, "objective": name, "seed": seed})
    found = decide(rows, LANGUAGE_NEEDS)
    winners = {one.need: one.winner for one in found.choices}
    assert winners["coverage"] == "small · forward_kl@data" and winners["diversity"] == "small · reverse_kl@student"
    assert found.arms[0].unit == "FLOPs" and found.arms[0].cost_text == "1e+09"


@pytest.mark.slow
def test_a_small_study_finds_what_each_direction_costs():
    teacher = llama(0)
    student = copy.deepcopy(llama(1))
    target = target_of(teacher=teacher, budget=2e8, data=DATA * 2)
    study = wk.compare(target, {"small": student}, ["forward_kl@data", "reverse_kl@student:sequence"], seeds=6)
    assert not study.failed
    for row in study.rows:
        better = "forward_kl" if row["objective"] == "forward_kl@data" else "reverse_kl"
        assert row[better] < row[f"{better}_before"]
    assert {choice.need for choice in study.verdict.choices} >= {"coverage", "precision", "diversity"}
